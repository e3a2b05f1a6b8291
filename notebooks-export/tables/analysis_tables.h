// An analysis as text: the tables on the terminal, and all of its numbers as one tidy table.
#pragma once

#include <map>
#include <span>
#include <string>

#include "analysis/analysis.h"
#include "notebooks-export/tables/data_table.h"

namespace kvreplay {

/// What the results are of, in a line.
std::string analysis_headline(std::span<const StoredResult> results);

/// A further column of means: of another measure, by policy and capacity.
struct MeansBeside {
  std::string head = {};
  std::map<SettingKey, double> means = {};  ///< none: no column
};

/// A comparison by the keys of `grouping`: a table of means and what is kept for them, and one of the differences from
/// the baseline where there are any, with titles. Of many rows only the best of each place and the baseline, and then a
/// line that says so. Settings that are `apart` are marked, and so is what had nothing to choose or stores more or less
/// than its capacity.
std::string comparison_text(const std::vector<ComparisonRow>& rows, const Grouping& grouping,
                            const AnalysisOptions& options, std::span<const SettingKey> apart = {},
                            const MeansBeside& beside = {});

/// The findings and every table that the analysis has something for. At most some 110 columns wide.
std::string analysis_text(const Analysis& analysis);

/// A row per quantity: columns `section`, `policy`, `other` (what it is compared with), `detail`, `capacity_request`,
/// `trace`, `evict_at`, `layer`, `head`, `quantity`, `value`, `low`, `high` (docs/analysis.md).
DataTable comparison_numbers(const std::vector<ComparisonRow>& rows, const AnalysisOptions& options);

/// The same of everything that analysis_text() shows, and more: nothing is cut.
DataTable analysis_numbers(const Analysis& analysis);

}  // namespace kvreplay
