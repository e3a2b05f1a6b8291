// When a cache is evicted, and from where on what that does is evaluated.
#pragma once

#include <algorithm>

namespace kvreplay {

/// An eviction of a trace. What stands between its position and the first evaluation query stays cached.
struct Eviction {
  int position = 0;       ///< positions before it may be evicted, and queries before it be looked at
  int evaluate_from = 0;  ///< evaluation queries are the captured ones at or after it; not before `position`

  /// Evaluated from `from` on, and where that is before the eviction, from there on.
  Eviction(int at, int from = 0) : position(at), evaluate_from(std::max(at, from)) {}
};

}  // namespace kvreplay
