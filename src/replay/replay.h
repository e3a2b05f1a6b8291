// Replays policies over traces.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "replay/engine.h"
#include "replay/request.h"
#include "replay/result.h"
#include "trace/reader.h"

namespace kvreplay {

/// Does all units of an engine and returns everything at once. `progress` is told the share of the work that is done,
/// in [0, 1].
std::vector<TraceReplay> replay(const ReplayEngine& engine, const std::function<void(double)>& progress = {});

/// The same without measuring what the kept sets do: these alone.
std::vector<TraceReplay> decide(const ReplayEngine& engine, const std::function<void(double)>& progress = {});

/// Replays every policy at every capacity over every trace, once per eviction position: traces in the order given,
/// eviction positions within. `progress` is told the share of the work that is done, in [0, 1]. For results that do not
/// fit into memory there is ReplayEngine, which hands them out layer by layer; what throws there throws here.
std::vector<TraceReplay> replay(std::span<const TraceReader> traces, const ReplayRequest& request,
                                const std::function<void(double)>& progress = {});

/// The same for one trace.
std::vector<TraceReplay> replay(const TraceReader& trace, const ReplayRequest& request);

}  // namespace kvreplay
