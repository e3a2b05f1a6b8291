// The same test on every instruction set that vector code was compiled for.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstdint>

namespace kvreplay::test {

/// Every set of instructions that this processor has and the library was compiled for, one after the other.
class EveryProcessor {
 public:
  EveryProcessor() : all_(hwy::SupportedTargets()) {}
  ~EveryProcessor() { hwy::GetChosenTarget().Update(all_); }
  EveryProcessor(const EveryProcessor&) = delete;
  EveryProcessor& operator=(const EveryProcessor&) = delete;

  template <class Action>
  void for_each(const Action& action) {
    for (std::int64_t rest = all_; rest != 0; rest &= rest - 1) {
      const std::int64_t target = rest & -rest;
      SCOPED_TRACE(hwy::TargetName(target));
      hwy::GetChosenTarget().Update(target);
      action();
    }
  }

 private:
  std::int64_t all_;
};

}  // namespace kvreplay::test
