// Which policy is best where, by how much, and how sure: aggregates, and paired comparisons with a baseline.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "analysis/bootstrap.h"
#include "analysis/result_set.h"
#include "analysis/summary.h"

namespace kvreplay {

/// What results are told apart by; they are averaged over everything else.
struct Grouping {
  bool policy = true;
  bool capacity = true;
  bool trace = false;
  bool eviction_position = false;
  bool layer = false;
  bool head = false;

  /// Reads "policy,capacity,layer". Throws UsageError, naming the keys that there are.
  static Grouping parse(std::string_view keys);
};

/// Where a row stands. Empty texts and −1: all of them.
struct GroupKey {
  std::string policy;
  std::string capacity_request;
  std::string trace;
  int eviction_position = -1;
  int layer = -1;
  int head = -1;

  auto operator<=>(const GroupKey&) const = default;
};

/// Against the baseline, paired on the same trace, eviction position, layer, head and query.
struct PairedDifference {
  double mean = 0;  ///< less than 0: smaller numbers than the baseline's
  Interval interval;
  double relative = 0;  ///< of the baseline's mean
  double wins = 0;      ///< share of the pairs in which it is better than the baseline; ties count half
  double p_value = 0;   ///< that there is no difference
  double adjusted = 0;  ///< the same, corrected for the number of rows of the comparison (Holm)
  int pairs = 0;        ///< layer, head and query of all traces
};

struct ComparisonRow {
  GroupKey key;
  bool oracle = false;
  double kept = 0;            ///< mean positions in a kept set
  double kept_share = 0;      ///< of the positions before the eviction
  Distribution distribution;  ///< every trace and eviction position weighs the same; worst over all numbers
  Interval interval;          ///< of the mean
  int traces = 0;
  std::optional<PairedDifference> difference;  ///< where the baseline was replayed on the same traces, and is another
};

struct ComparisonOptions {
  Measure measure = Measure::layer_error;
  Grouping grouping;
  std::string baseline;  ///< canonical spec, or a method's name that one policy has; empty: none
  BootstrapOptions bootstrap;
};

/// A row per group: capacities in the order of the results, best mean first within. Throws UsageError, naming those
/// there are, where the baseline is not among the policies; Error where no result has the measure or where a head or
/// layer is asked for that the measure does not tell apart.
std::vector<ComparisonRow> compare(const ResultSet& results, const ComparisonOptions& options);

}  // namespace kvreplay
