#include "replay/eviction.h"

namespace kvreplay {

EvaluationQueries evaluation_queries(const TraceInfo& info, const Eviction& eviction) {
  const std::span<const int> positions = info.query_positions;
  const Index first = std::ranges::lower_bound(positions, eviction.evaluate_from) - positions.begin();
  return {first, positions.subspan(static_cast<std::size_t>(first))};
}

}  // namespace kvreplay
