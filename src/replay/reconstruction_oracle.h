// Kept sets improved with hindsight: what the layer error could be at the same capacity.
#pragma once

#include <vector>

#include "policy/policy.h"
#include "replay/eviction.h"
#include "trace/reader.h"

namespace kvreplay {

/// What the cost and the memory of exchanges in a layer depend on.
struct ExchangeShape {
  Granularity granularity = Granularity::kv;
  int positions = 0;  ///< that the layer holds
  Index tokens = 0;   ///< positions up to the last evaluation query
  Index queries = 0;  ///< evaluation queries
};

/// The operations of `exchanges` in every kept set of a layer, and of what is calculated before them.
double exchange_operations(const ModelInfo& model, const ExchangeShape& shape, int exchanges);

/// Exchanges positions of a layer's kept sets as long as that lowers the mean squared layer error over the evaluation
/// queries, at most `exchanges` times per set; sizes stay as they are. `sets` is as in KeptSets: one per query head at
/// granularity query, else one per KV head, all equal at granularity layer; all of positions that the layer holds, as
/// are those that come in. Arithmetic is float64. Method, cost, and what is not guaranteed: docs/oracles.md. Heads are
/// read by so many threads. Throws Error as TraceReader does.
std::vector<std::vector<int>> exchange_positions(const TraceReader& trace, int layer, const Eviction& eviction,
                                                 Granularity granularity, std::vector<std::vector<int>> sets,
                                                 int exchanges, int threads);

/// The most bytes that exchange_positions() takes beside the sets.
Index exchange_memory(const ModelInfo& model, const ExchangeShape& shape, int threads);

}  // namespace kvreplay
