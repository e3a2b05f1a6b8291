// Result tables turned into the few numbers that a person compares.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "analysis/weighing.h"
#include "replay/result.h"

namespace kvreplay {

/// The distribution of one measure.
struct Distribution {
  double mean = 0;  ///< or, of a measure that is summarised so, the root of the mean square
  double median = 0;
  double p90 = 0;    ///< the value that 90 % are not worse than
  double worst = 0;  ///< largest error, smallest recall or cosine
};

/// Of `numbers`; `lower_is_better` says which end is the worst. Quantiles interpolate linearly. NaN is left out; of
/// nothing at all everything is NaN.
Distribution distribution_of(std::vector<float> numbers, bool lower_is_better);

/// The same of numbers of a measure, whose mean may be the root of the mean square.
Distribution distribution_of(std::vector<float> numbers, const MeasureTraits& measure);

/// A number that counts as many times as its weight says.
struct WeightedNumber {
  float number = 0;
  double weight = 1;  ///< above 0
};

/// The same of numbers with weights. Sorted, each number lies in the middle of its weight, and quantiles interpolate
/// linearly from the middle of the first to that of the last: with equal weights as above.
Distribution weighted_distribution(std::vector<WeightedNumber> numbers, bool lower_is_better);

/// One measure of one replayed setting, over one layer or all of them.
struct MeasureSummary {
  std::string trace;
  std::string policy;
  std::string capacity_request;
  int capacity = 0;
  double kept = 0;  ///< mean positions per kept set that the capacity led to, over the layers of a mean over layers
  double bytes_per_token = 0;  ///< that the kept sets of all layers cost
  double peak = 0;             ///< see peak_cache_size()
  double footprint = 0;        ///< see cache_footprint()
  int eviction_position = 0;
  int evaluate_from = 0;  ///< position of the first evaluation query
  Granularity granularity = Granularity::kv;
  Share share = Share::mean;
  bool oracle = false;
  bool nothing_to_choose = false;  ///< see ReplayResult
  int layer = -1;  ///< −1: all layers, or those that hold the whole prompt where only they were asked for
  bool full_layers = false;
  bool late_layers = false;  ///< of these only late ones
  std::string measure;
  Distribution distribution;
};

/// Of some layers of a model of `num_layers` those that its last two thirds hold: from layer ⌊L/3⌋ on. Where errors are
/// held against the residual stream, those of the first third, where it is short, say little of what the model loses
/// (docs/live.md).
std::vector<int> late_layers(const std::vector<int>& layers, int num_layers);

/// Every measure of every result, per layer and over all layers, in the order of the results. Head measures weigh every
/// head and evaluation query alike; span recall weighs every head and span alike. Of a layer where there was nothing to
/// measure all numbers are NaN. With `full_layers`, what is over all layers is over those alone that hold the whole
/// prompt, of which there must be one at least.
std::vector<MeasureSummary> summarize(const std::vector<TraceReplay>& replays, bool full_layers = false);

/// The same for one result of `replay`.
std::vector<MeasureSummary> summarize(const TraceReplay& replay, const ReplayResult& result, bool full_layers = false);

/// A row of the table that a replay prints: a policy at a capacity, averaged over the places (a trace evicted at a
/// position) where it was replayed: every trace weighs the same, and in it every eviction position.
struct PolicyRow {
  std::string policy;
  std::string capacity_request;
  Granularity granularity = Granularity::kv;
  bool oracle = false;
  bool nothing_to_choose = false;  ///< in one of the places at least: see ReplayResult
  int places = 0;                  ///< how many
  int same_places = 0;             ///< equal for rows of the same places: only these are comparable
  double kept = 0;
  double kept_share = 0;       ///< of the positions that the layers hold
  bool windowed = false;       ///< whether some of these layers hold less than the prompt
  double bytes_per_token = 0;  ///< that the kept sets of all layers cost
  double budget = 1;           ///< the same over what the capacity costs in every KV head
  double peak = 0;             ///< see peak_cache_size(); NaN where nothing was measured over time, as is the next
  double turnover = 0;
  double layer_error = 0;
  double residual_error =
      0;  ///< of late layers, root of the mean square; NaN where no trace tells of the residual stream
  double head_error = 0;
  double attention_recall = 0;
  double cosine = 0;
  double span_recall = 0;  ///< NaN where no trace has spans
  double spearman = 0;     ///< rank agreement; NaN where it was not measured
  double kendall = 0;
  double kl = 0;            ///< of live runs, as are the next two; NaN where the model did not run on
  double nll_increase = 0;  ///< NaN also where no token came after one
  double agree = 0;
  double same_tokens = 0;  ///< written before the first that is another one than with the full cache; NaN: none written
  double answered = 0;     ///< share of the places whose text has an answer in it; NaN where no answer is known
};

/// All capacities that policies were replayed at, what is kept whole first: in the order of the policy that has most,
/// the others' where theirs have them. A policy may lack some.
std::vector<std::string> in_order(const std::map<std::string, std::vector<std::string>>& capacities);

/// Makes such rows from results that come one after the other.
class PolicyRanking {
 public:
  /// With `full_layers`, means are over the layers alone that hold the whole prompt.
  explicit PolicyRanking(bool full_layers = false) : full_layers_(full_layers) {}

  /// Adds one of the results of `replay`.
  void add(const TraceReplay& replay, const ReplayResult& result);

  /// What is kept whole first, then by capacity in the order of the results; within, rows of most places first, and of
  /// the same places the best: smallest mean KL divergence of live runs, otherwise smallest residual error where traces
  /// allow it, otherwise smallest mean layer error.
  std::vector<PolicyRow> rows() const;

  /// In how many places anything was replayed.
  int places() const { return static_cast<int>(places_.size()); }

 private:
  struct Sum {
    PolicyRow row;
    std::vector<int> places;
    MeanOverTraces kept;
    MeanOverTraces kept_share;
    MeanOverTraces bytes_per_token;
    MeanOverTraces bytes_of_capacity;
    MeanOverTraces peak;
    MeanOverTraces same_tokens;
    MeanOverTraces answered;
    std::map<Measure, MeanOverTraces> measures;
  };
  bool full_layers_;
  std::vector<Sum> sums_;                                             // in the order of the results
  std::map<std::pair<std::string, std::string>, std::size_t> place_;  // of a policy and capacity among the sums
  std::map<std::string, std::vector<std::string>> capacities_;        // of each policy, as they came
  std::map<std::pair<std::string, int>, int> places_;                 // trace, eviction position: in their order
};

/// The rows of a whole replay.
std::vector<PolicyRow> rank_policies(const std::vector<TraceReplay>& replays, bool full_layers = false);

}  // namespace kvreplay
