// Which policy is best where, by how much, and how sure: aggregates, and paired comparisons with a baseline.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
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

  SettingKey setting() const { return {policy, capacity_request}; }

  bool operator==(const GroupKey&) const = default;
  bool operator<(const GroupKey& other) const {
    const auto all = [](const GroupKey& key) {
      return std::tie(key.policy, key.capacity_request, key.trace, key.eviction_position, key.layer, key.head);
    };
    return all(*this) < all(other);
  }
};

/// Against the baseline, paired on the same trace, eviction position, layer, head and query.
struct PairedDifference {
  double mean = 0;       ///< less than 0: smaller numbers than the baseline's
  double reference = 0;  ///< the baseline's mean over the pairs
  Interval interval;
  double relative = 0;  ///< of the baseline's mean; NaN where that is 0
  double wins = 0;      ///< share of the pairs, weighed like means, in which it is better; ties count half
  double p_value = 0;   ///< that there is no difference; NaN where nothing can be said, or all pairs are equal
  double adjusted = 0;  ///< the same, corrected for the rows of the table at its capacity (Holm)
  int pairs = 0;        ///< layer, head and query of all traces
  int traces = 0;       ///< those that both were replayed on
};

/// What results keep, as means over them.
struct Keeping {
  double kept = 0;             ///< positions in a kept set
  double kept_share = 0;       ///< of the positions that the layers held
  double stored = 0;           ///< positions that the sets of a KV head hold: as kept, or the group's multiple of it
  double budget = 1;           ///< the same over what the capacity grants a KV head
  double bytes_per_token = 0;  ///< of the prompt; NaN where a file does not say
  bool nothing_to_choose = false;  ///< in one of the results at least: see ReplayResult

  /// Whether more is stored than dividing a budget into whole positions explains: one position in a KV head or more.
  bool stores_more_than(const Keeping& other) const { return stored >= other.stored + 1; }
};

struct ComparisonRow : Keeping {
  GroupKey key;
  bool oracle = false;
  Granularity granularity = Granularity::kv;  ///< of its first result
  Distribution distribution;  ///< every trace and eviction position weighs the same; worst over all numbers
  Interval interval;          ///< of the mean
  int traces = 0;
  std::optional<PairedDifference> difference;  ///< where the baseline was replayed on the same traces, and is another
};

struct ComparisonOptions {
  Measure measure = Measure::layer_error;
  Grouping grouping = {};
  std::string baseline = {};  ///< a policy's spec, or a method's name that one policy has; empty: none
  BootstrapOptions bootstrap = {};
};

/// The results without those over which the means of some rows would be taken and those of others not. Rows are
/// compared within a trace and an eviction position where these are told apart; there each is averaged over the same of
/// what is not told apart: over that which covers most of the table, as rows times what they are averaged over. Rows
/// without all of it are left out. What keeps everything stays. `notes` receives what was left out.
ResultSet over_the_same_others(const ResultSet& results, const Grouping& grouping, std::vector<std::string>& notes);

/// A row per group: capacities in the order of the results, then traces, eviction positions, layers and heads, and best
/// mean first within. A baseline that keeps everything is compared with at every capacity. Throws UsageError, naming
/// those there are, where the baseline is not among the policies, and where the measure does not tell layers or heads
/// apart that are asked for; Error where no result has the measure.
std::vector<ComparisonRow> compare(const ResultSet& results, const ComparisonOptions& options);

/// Results taken together, as in a row of a comparison.
struct Aggregate : Keeping {
  MeanEstimate estimate;
};

/// Of those that have the measure; nothing where none has.
std::optional<Aggregate> aggregate(const ResultSet& results, std::span<const std::size_t> which, Measure measure,
                                   const BootstrapOptions& bootstrap);

/// A result and what it is compared with, of one trace and eviction position.
using ResultPair = std::pair<std::size_t, std::size_t>;

/// Differences of pairs, as in a row of a comparison: over all layers, then per layer (ascending, with its number).
/// Pairs of which one lacks the measure do not count; none are left, nothing is returned. `adjusted` is the plain p
/// value.
std::vector<std::pair<int, PairedDifference>> paired_differences(const ResultSet& results,
                                                                 std::span<const ResultPair> pairs, Measure measure,
                                                                 const BootstrapOptions& bootstrap);

}  // namespace kvreplay
