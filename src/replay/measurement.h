// What kept sets do to a layer's output.
#pragma once

#include <vector>

#include "replay/engine.h"
#include "replay/evaluation.h"

namespace kvreplay {

/// What one layer's kept sets do.
struct LayerMeasures {
  std::vector<HeadMeasures> heads;  ///< [H]
  std::vector<float> layer_error;   ///< [E]
};

/// Measures several kept sets of a layer against the same full outputs. Throws Error, naming the query, where attention
/// leaves float32's range.
std::vector<LayerMeasures> measure_layer(const TraceReader& trace, int layer, int eviction_position,
                                         const std::vector<const LayerSets*>& settings);

/// Replaces the kept sets of oracles that exchange positions by better ones, starting from the best of the run.
void improve_oracles(const TraceReader& trace, int layer, int eviction_position, const std::vector<Setting>& settings,
                     std::vector<LayerSets>& kept);

}  // namespace kvreplay
