// Results at full resolution, as HDF5.
#pragma once

#include <filesystem>
#include <vector>

#include "replay/overlap.h"
#include "replay/replay.h"

namespace kvreplay {

/// Writes results.h5 (docs/results-format.md): `/results/<i>` for every result, `/overlap/<i>` for every overlap table.
/// The file is complete or absent. Throws Error.
void write_results(const std::filesystem::path& path, const std::vector<TraceReplay>& replays,
                   const std::vector<OverlapTable>& overlaps);

/// Writes the kept sets of all results: `/kept/<i>` with `kept` and `offsets`; set s (layer-major, then head) is
/// `kept[offsets[s]:offsets[s+1]]`. The file is complete or absent. Throws Error.
void write_kept_sets(const std::filesystem::path& path, const std::vector<TraceReplay>& replays);

}  // namespace kvreplay
