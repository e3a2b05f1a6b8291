// What processes that work together do at the same time.
#pragma once

#include <fmt/format.h>

#include <new>
#include <string>

#include "base/error.h"
#include "sweep/ranks.h"

namespace kvreplay::cli {

/// Does something in every process. Where it fails in one, all of them fail, with the message of the lowest.
template <class Action>
void together(Ranks& ranks, const Action& action) {
  std::string failure;
  try {
    action();
  } catch (const UsageError& error) {
    failure = fmt::format("u{}", error.what());
  } catch (const std::bad_alloc&) {
    failure = "eout of memory";
  } catch (const std::exception& error) {
    failure = fmt::format("e{}", error.what());
  }
  failure = ranks.first_failure(failure);
  if (failure.empty()) return;
  if (failure.front() == 'u') throw UsageError(failure.substr(1));
  throw Error(failure.substr(1));
}

}  // namespace kvreplay::cli
