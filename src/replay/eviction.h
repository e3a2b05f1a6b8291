// When a cache is evicted, and from where on what that does is evaluated.
#pragma once

#include <algorithm>
#include <span>

#include "base/matrix.h"
#include "trace/trace.h"

namespace kvreplay {

/// An eviction of a trace. What stands between its position and the first evaluation query stays cached.
struct Eviction {
  int position = 0;       ///< positions before it may be evicted, and queries before it be looked at
  int evaluate_from = 0;  ///< evaluation queries are the captured ones at or after it; not before `position`

  /// Evaluated from `from` on, and where that is before the eviction, from there on.
  Eviction(int at, int from = 0) : position(at), evaluate_from(std::max(at, from)) {}
};

/// The captured queries that an eviction is evaluated on.
struct EvaluationQueries {
  Index first = 0;                 ///< index of the first among the trace's query_positions
  std::span<const int> positions;  ///< [E], ascending

  int count() const { return static_cast<int>(positions.size()); }
};

/// Those of a trace; none where no query was captured from eviction.evaluate_from on.
EvaluationQueries evaluation_queries(const TraceInfo& info, const Eviction& eviction);

}  // namespace kvreplay
