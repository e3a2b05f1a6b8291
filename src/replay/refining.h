// Kept sets refined in the light of all settings of a run.
#pragma once

#include <span>
#include <vector>

#include "policy/decision.h"
#include "policy/setting.h"
#include "replay/eviction.h"
#include "replay/result.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// Refines the sets of a layer's settings whose policies ask for it, as Refinement says, once all are drawn; `results`
/// are those of `settings`. `at_once` settings are measured at a time, by `threads` threads. `source` is the layer.
void refine_sets(const CapturedRun& trace, const LayerSource& source, const Eviction& eviction,
                 std::span<const Setting> settings, std::vector<LayerResult>& results, Index at_once, int threads);

}  // namespace kvreplay
