// Which traces can be replayed.
#pragma once

#include <string>

#include "trace/trace.h"

namespace kvreplay {

/// Why a trace cannot be replayed, naming layer and feature; empty if it can. Not taken into account are layers without
/// attention, of another shape than the others or with another width of values than of keys, layers that read another's
/// cache, values within keys, and what stands between a layer's outputs and the residual stream beside its projection.
std::string replay_obstacle(const TraceInfo& info);

}  // namespace kvreplay
