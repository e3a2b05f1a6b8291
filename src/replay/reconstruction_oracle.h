// Kept sets improved with hindsight: what the layer error could be at the same capacity.
#pragma once

#include <vector>

#include "policy/policy.h"
#include "replay/eviction.h"
#include "trace/reader.h"

namespace kvreplay {

/// Exchanges positions of a layer's kept sets as long as that lowers the mean squared layer error over the evaluation
/// queries, at most `exchanges` times per set; sizes stay as they are. `sets` is as in KeptSets: one per query head at
/// granularity query, else one per KV head, all equal at granularity layer. Arithmetic is float64. Method, cost, and
/// what is not guaranteed: docs/oracles.md. Throws Error as TraceReader does.
std::vector<std::vector<int>> exchange_positions(const TraceReader& trace, int layer, const Eviction& eviction,
                                                 Granularity granularity, std::vector<std::vector<int>> sets,
                                                 int exchanges);

}  // namespace kvreplay
