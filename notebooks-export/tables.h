// Results as text: the table on the terminal, tidy CSV, JSON.
#pragma once

#include <string>
#include <vector>

#include "analysis/summary.h"
#include "replay/overlap.h"
#include "replay/replay.h"

namespace kvreplay {

/// Columns set flush: the first to the left, the others to the right, with a rule under the heads.
std::string aligned_table(const std::vector<std::vector<std::string>>& rows);

/// `text` broken at spaces into lines of at most `width` columns, each after `indent` spaces and ended by a newline.
std::string wrapped(const std::string& text, std::size_t indent, std::size_t width = 100);

/// The table that a replay ends with: a row per policy and capacity, best first.
std::string policy_table(const std::vector<PolicyRow>& rows);

/// One row per trace, policy, capacity, eviction position, layer (or "all") and measure.
std::string summary_csv(const std::vector<MeasureSummary>& rows);

/// The same summaries with models, notes, and mean overlaps between policies.
std::string summary_json(const std::vector<TraceReplay>& replays, const std::vector<MeasureSummary>& rows,
                         const std::vector<OverlapTable>& overlaps);

}  // namespace kvreplay
