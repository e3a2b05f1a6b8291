// What tells a run from others: for what was made for one run alone.
#pragma once

#include <string>

namespace kvreplay {

/// A run at an eviction.
struct RunIdentity {
  std::string trace_digest;   ///< the same for copies of a capture alone
  std::string tokens_digest;  ///< of the tokens before the eviction: the same for every run of them
  std::string model = {};     ///< as the trace names it
  int tokens = 0;             ///< of the prompt and of what came after it
};

}  // namespace kvreplay
