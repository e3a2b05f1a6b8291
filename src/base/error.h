// Failures that a user can act on.
#pragma once

#include <stdexcept>
#include <string>

namespace kvreplay {

/// A failure told in one line: what is wrong, where, and what to do about it.
/// The command line prints it and exits with 1.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A request that no input could make right: an unknown policy, a malformed option.
/// The command line prints it and exits with 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

}  // namespace kvreplay
