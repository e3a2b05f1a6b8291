// Results as text: the table on the terminal, tidy CSV, JSON.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "analysis/parameter_effects.h"
#include "analysis/summary.h"
#include "replay/overlap.h"
#include "replay/result.h"

namespace kvreplay {

/// Columns set flush: the first to the left, the others to the right, with a rule under the heads.
std::string aligned_table(const std::vector<std::vector<std::string>>& rows);

/// `text` broken at spaces, though not between a number and its unit, into lines of at most `width` columns, each after
/// `indent` spaces and ended by a newline.
std::string wrapped(const std::string& text, std::size_t indent, std::size_t width = 100);

/// The lines of a policy's spec that is too long for a column of `width`, broken after ',' and before '+' and ' '.
std::vector<std::string> broken_spec(const std::string& spec, std::size_t width);

/// "512", or "512 to 1852": the first and the last; empty of none.
std::string range_text(const std::set<int>& numbers);

/// The table that a replay ends with: a row per policy and capacity, as PolicyRanking puts them. A '*' marks what costs
/// more or less than its capacity in every KV head; rows of fewer places than others say of how many.
std::string policy_table(const std::vector<PolicyRow>& rows);

/// What each parameter changed: a row per value.
std::string parameter_table(const std::vector<ParameterEffect>& effects);

/// One row per trace, policy, capacity, eviction position, layer (or "all") and measure.
std::string summary_csv(const std::vector<MeasureSummary>& rows);

/// The same summaries with models, notes, and mean overlaps between policies.
std::string summary_json(const std::vector<TraceReplay>& replays, const std::vector<MeasureSummary>& rows,
                         const std::vector<OverlapTable>& overlaps);

/// The parts of summary_csv and summary_json, for summaries that come one after the other. A CSV file is the head and
/// then rows; a JSON file the head, rows (the first of all without a comma before it), and the foot.
std::string summary_csv_head();
std::string summary_csv_rows(const std::vector<MeasureSummary>& rows);
std::string summary_json_head(const std::vector<TraceReplay>& replays);
std::string summary_json_rows(const std::vector<MeasureSummary>& rows, bool first);
std::string summary_json_foot();

}  // namespace kvreplay
