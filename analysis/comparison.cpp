#include "analysis/comparison.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "analysis/weighing.h"
#include "base/error.h"
#include "base/parallel.h"
#include "policy/parameter.h"

namespace kvreplay {
namespace {

constexpr std::array<std::pair<std::string_view, bool Grouping::*>, 6> kKeys = {{
    {"policy", &Grouping::policy},
    {"capacity", &Grouping::capacity},
    {"trace", &Grouping::trace},
    {"evict-at", &Grouping::eviction_position},
    {"layer", &Grouping::layer},
    {"head", &Grouping::head},
}};

// Whether numbers of neighbouring queries stand beside each other.
bool is_per_query(const MeasureTraits& measure) {
  return measure.per == MeasureTraits::Per::query || measure.per == MeasureTraits::Per::head_and_query ||
         measure.per == MeasureTraits::Per::model_query;
}

// A result with its numbers [layers, heads, width], and those of what it is compared with. Numbers of the whole model
// are of no layer: [1, 1, width].
struct Numbers {
  const StoredResult* result = nullptr;
  std::vector<int> layers;            // that are chosen
  std::vector<int> of_layers = {-1};  // that the numbers tell apart
  std::size_t heads = 1;
  std::size_t width = 1;  // queries or spans
  bool squared = false;   // what means are taken of, whose roots are told
  Table table;
  const Table* reference = nullptr;
};

Numbers numbers_of(const ResultSet& results, std::size_t index, Measure measure) {
  Numbers numbers;
  numbers.result = &results.results()[index];
  numbers.layers = results.layers_of(*numbers.result);
  numbers.table = results.read(index, measure);
  const MeasureTraits& traits = traits_of(measure);
  numbers.squared = traits.root_mean_square;
  if (traits.is_of_layers()) {
    numbers.of_layers = numbers.layers;
    if (traits.per != MeasureTraits::Per::query && traits.per != MeasureTraits::Per::span_and_query) {
      numbers.heads = static_cast<std::size_t>(numbers.result->num_query_heads);
    }
  }
  if (!numbers.table.numbers.empty()) {
    numbers.width = numbers.table.numbers.size() / (numbers.of_layers.size() * numbers.heads);
  }
  return numbers;
}

// What of a result's numbers a row is about. −1: all.
struct Cell {
  int layer = -1;
  int head = -1;
};

// Calls action(offset) for each run of `width` numbers of the cell.
template <class Action>
void for_each_run(const Numbers& numbers, Cell cell, const Action& action) {
  for (std::size_t l = 0; l < numbers.of_layers.size(); ++l) {
    if (cell.layer >= 0 && numbers.of_layers[l] != cell.layer) continue;
    for (std::size_t h = 0; h < numbers.heads; ++h) {
      if (cell.head >= 0 && static_cast<int>(h) != cell.head) continue;
      action((l * numbers.heads + h) * numbers.width);
    }
  }
}

// Whether there was nothing to measure, here or where it is compared with.
bool is_missing(const Numbers& numbers, std::size_t at) {
  return std::isnan(numbers.table.numbers[at]) ||
         (numbers.reference != nullptr && std::isnan(numbers.reference->numbers[at]));
}

bool has(const Numbers& numbers, Cell cell) {
  bool any = false;
  for_each_run(numbers, cell, [&](std::size_t offset) {
    for (std::size_t i = 0; i < numbers.width && !any; ++i) any = !is_missing(numbers, offset + i);
  });
  return any;
}

// Those of a cell, with their weights.
struct Weighed {
  std::vector<const Numbers*> members;  // those of a trace stand together, and there those of an eviction position
  std::vector<double> weights;          // of each member's mean; together 1
  int traces = 0;
};

Weighed weigh(std::vector<const Numbers*> members) {
  Weighed weighed;
  std::map<std::string, std::size_t> traces;
  for (const Numbers* member : members) traces.try_emplace(member->result->trace, traces.size());
  std::ranges::stable_sort(members, {}, [&traces](const Numbers* member) {
    return std::pair(traces.at(member->result->trace), member->result->eviction_position);
  });
  std::vector<EvictionKey> evictions;
  for (const Numbers* member : members) evictions.push_back({member->result->trace, member->result->eviction_position});
  weighed.weights = weights_of(evictions);
  weighed.members = std::move(members);
  weighed.traces = static_cast<int>(traces.size());
  return weighed;
}

// The mean of value(numbers, index) over a cell, for each query (or span) of a member that has numbers there.
template <class Value>
std::vector<double> means_of(const Numbers& numbers, Cell cell, const Value& value) {
  std::vector<Mean> of_each(numbers.width);
  for_each_run(numbers, cell, [&](std::size_t offset) {
    for (std::size_t i = 0; i < numbers.width; ++i) {
      if (!is_missing(numbers, offset + i)) of_each[i].add(value(numbers, offset + i));
    }
  });
  std::vector<double> means;
  for (const Mean& mean : of_each) {
    if (mean.count() > 0) means.push_back(mean.value());
  }
  return means;
}

// What a trace gives at one query: the sum over its eviction positions of value × weight, and of weights.
struct AtQuery {
  double sum = 0;
  double weight = 0;
  std::vector<int> evictions;  // that the query comes after
};

// Series of one trace. Its eviction positions share their later queries, and so these must be drawn together: a series
// holds queries that come after the same evictions, each as the mean over them.
void add_trace(const std::map<int, AtQuery>& queries, int trace, std::vector<Series>& series) {
  std::vector<std::vector<const AtQuery*>> stretches;
  for (const auto& [position, query] : queries) {
    if (stretches.empty() || stretches.back().back()->evictions != query.evictions) {
      // A single query cannot be drawn anew alone.
      const bool alone = !stretches.empty() && stretches.back().size() == 1;
      if (!alone) stretches.emplace_back();
    }
    stretches.back().push_back(&query);
  }
  if (stretches.size() > 1 && stretches.back().size() == 1) {
    stretches[stretches.size() - 2].push_back(stretches.back().front());
    stretches.pop_back();
  }
  double all = 0;
  for (const auto& [position, query] : queries) all += query.weight;
  for (const std::vector<const AtQuery*>& stretch : stretches) {
    double weight = 0;
    for (const AtQuery* query : stretch) weight += query->weight;
    Series& one = series.emplace_back();
    one.trace = trace;
    one.weight = weight / all;
    for (const AtQuery* query : stretch) {
      one.values.push_back(query->sum * static_cast<double>(stretch.size()) / weight);
    }
  }
}

template <class Value>
std::vector<Series> series_of(const Weighed& weighed, Cell cell, bool per_query, const Value& value) {
  std::vector<Series> series;
  int trace = 0;
  for (std::size_t i = 0; i < weighed.members.size();) {
    const std::string& name = weighed.members[i]->result->trace;
    if (i + 1 == weighed.members.size() || weighed.members[i + 1]->result->trace != name) {
      std::vector<double> means = means_of(*weighed.members[i], cell, value);
      if (!per_query) means = {std::accumulate(means.begin(), means.end(), 0.0) / static_cast<double>(means.size())};
      series.push_back({std::move(means), 1, trace++});
      ++i;
      continue;
    }
    std::map<int, AtQuery> queries;
    for (; i < weighed.members.size() && weighed.members[i]->result->trace == name; ++i) {
      const Numbers& member = *weighed.members[i];
      const std::vector<double> means = means_of(member, cell, value);
      const double weight = weighed.weights[i] / static_cast<double>(means.size());
      for (std::size_t q = 0; q < means.size(); ++q) {
        // Spans and heads are no series: their mean stands alone.
        AtQuery& query = queries[per_query ? member.result->evaluation_positions[q] : 0];
        query.sum += weight * means[q];
        query.weight += weight;
        if (query.evictions.empty() || query.evictions.back() != member.result->eviction_position) {
          query.evictions.push_back(member.result->eviction_position);
        }
      }
    }
    add_trace(queries, trace++, series);
  }
  return series;
}

double number_of(const Table& table, std::size_t at, bool squared) {
  const auto value = static_cast<double>(table.numbers[at]);
  return squared ? value * value : value;
}

double number(const Numbers& numbers, std::size_t at) { return number_of(numbers.table, at, numbers.squared); }

double reference_number(const Numbers& numbers, std::size_t at) {
  return number_of(*numbers.reference, at, numbers.squared);
}

// The estimate of a mean of squares as that of its root.
MeanEstimate rooted(MeanEstimate estimate) {
  const auto root = [](double number) { return std::isnan(number) ? number : std::sqrt(std::max(number, 0.0)); };
  estimate.mean = root(estimate.mean);
  estimate.interval = {root(estimate.interval.low), root(estimate.interval.high)};
  return estimate;
}

// The mean of numbers, or the root of the mean of their squares.
MeanEstimate mean_in(const Weighed& weighed, Cell cell, const MeasureTraits& measure,
                     const BootstrapOptions& bootstrap) {
  MeanEstimate estimate = bootstrap_mean(series_of(weighed, cell, is_per_query(measure), number), bootstrap);
  return measure.root_mean_square ? rooted(estimate) : estimate;
}

// Of a difference of mean squares, that of their roots: a² − b² is (a − b)(a + b).
void take_roots(PairedDifference& difference) {
  const double reference = std::sqrt(difference.reference);
  const double sum = std::sqrt(std::max(difference.reference + difference.mean, 0.0)) + reference;
  const double scale = sum > 0 ? 1 / sum : 0;
  difference.reference = reference;
  difference.mean *= scale;
  difference.interval = {difference.interval.low * scale, difference.interval.high * scale};
}

double difference(const Numbers& numbers, std::size_t at) {
  return number(numbers, at) - reference_number(numbers, at);
}

PairedDifference difference_of(const Weighed& pairs, Cell cell, const MeasureTraits& measure,
                               const BootstrapOptions& bootstrap) {
  const MeanEstimate estimate = bootstrap_mean(series_of(pairs, cell, is_per_query(measure), difference), bootstrap);
  PairedDifference result;
  result.mean = estimate.mean;
  result.interval = estimate.interval;
  result.p_value = estimate.p_value;
  result.adjusted = estimate.p_value;
  result.traces = pairs.traces;
  bool all_equal = true;
  for (std::size_t i = 0; i < pairs.members.size(); ++i) {
    const Numbers& member = *pairs.members[i];
    double sum = 0;
    double wins = 0;
    int count = 0;
    for_each_run(member, cell, [&](std::size_t offset) {
      for (std::size_t at = offset; at < offset + member.width; ++at) {
        if (is_missing(member, at)) continue;
        const double apart = difference(member, at);
        const bool better = measure.lower_is_better ? apart < 0 : apart > 0;
        wins += apart == 0 ? 0.5 : better ? 1 : 0;
        all_equal = all_equal && apart == 0;
        sum += reference_number(member, at);
        ++count;
      }
    });
    result.pairs += count;
    result.wins += pairs.weights[i] * wins / count;
    result.reference += pairs.weights[i] * sum / count;
  }
  if (measure.root_mean_square) take_roots(result);
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  result.relative = result.reference != 0 ? result.mean / result.reference : kNone;
  // Where both keep the same there is nothing to compare, and nothing that others are to be corrected for.
  if (all_equal) result.p_value = result.adjusted = kNone;
  return result;
}

Distribution distribution_in(const Weighed& weighed, Cell cell, bool lower_is_better) {
  std::vector<WeightedNumber> numbers;
  for (std::size_t i = 0; i < weighed.members.size(); ++i) {
    const Numbers& member = *weighed.members[i];
    const std::size_t first = numbers.size();
    for_each_run(member, cell, [&](std::size_t offset) {
      for (std::size_t at = offset; at < offset + member.width; ++at) {
        if (!is_missing(member, at)) numbers.push_back({member.table.numbers[at], 1});
      }
    });
    const double weight = weighed.weights[i] / static_cast<double>(numbers.size() - first);
    for (std::size_t at = first; at < numbers.size(); ++at) numbers[at].weight = weight;
  }
  return weighted_distribution(std::move(numbers), lower_is_better);
}

// What was kept, and what that costs.
Keeping kept_by(const Weighed& weighed) {
  Keeping keeping;
  double granted = 0;
  for (std::size_t i = 0; i < weighed.members.size(); ++i) {
    const StoredResult& result = *weighed.members[i]->result;
    const std::vector<int>& layers = weighed.members[i]->layers;
    const StoredResult::Kept of_member = result.kept_in(layers);
    const double weight = weighed.weights[i];
    const int group = result.num_query_heads / result.num_kv_heads;
    const int sets = result.granularity == Granularity::query ? group : 1;
    keeping.kept += weight * of_member.positions;
    keeping.kept_share += weight * of_member.share;
    keeping.stored += weight * of_member.positions * sets;
    for (const int layer : layers) {
      // Nobody keeps more than there is.
      const int most = std::min(result.capacity, result.held[static_cast<std::size_t>(layer)]);
      granted += weight * most / static_cast<double>(layers.size());
    }
    const bool told = result.bytes_per_token > 0;
    keeping.bytes_per_token += weight * (told ? result.bytes_per_token : std::numeric_limits<double>::quiet_NaN());
    keeping.nothing_to_choose = keeping.nothing_to_choose || *result.nothing_to_choose;
  }
  keeping.budget = keeping.stored / granted;
  return keeping;
}

// The results of a group, layers and heads not yet told apart.
struct Group {
  GroupKey key;
  std::vector<std::size_t> results;
};

std::vector<Group> groups_of(const ResultSet& results, const Grouping& grouping) {
  std::vector<Group> groups;
  std::map<GroupKey, std::size_t> place;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    const StoredResult& result = results.results()[i];
    GroupKey key;
    if (grouping.policy) key.policy = result.policy;
    if (grouping.capacity) key.capacity_request = result.capacity_request;
    if (grouping.trace) key.trace = result.trace;
    if (grouping.eviction_position) key.eviction_position = result.eviction_position;
    const auto [found, is_new] = place.try_emplace(key, groups.size());
    if (is_new) groups.push_back({key, {}});
    groups[found->second].results.push_back(i);
  }
  return groups;
}

// What each result is compared with.
class Baseline {
 public:
  Baseline(const ResultSet& results, const std::string& policy, Measure measure) : results_(results), policy_(policy) {
    for (const std::string& capacity : results.capacities()) {
      for (const std::size_t i : results.of_setting({policy, capacity})) {
        const StoredResult& result = results.results()[i];
        Table table = results.read(i, measure);
        if (table.numbers.empty()) continue;
        tables_.emplace(std::tuple(capacity, result.trace, result.eviction_position), std::move(table));
      }
    }
  }

  const std::string& policy() const { return policy_; }

  // Of the same capacity, trace and eviction position; of one that keeps everything, of whatever capacity.
  const Table* counterpart(std::size_t result) const {
    const StoredResult& of = results_.results()[result];
    if (of.policy == policy_) return nullptr;
    for (const std::string& capacity : {of.capacity_request, std::string(kAllPositions)}) {
      const auto found = tables_.find({capacity, of.trace, of.eviction_position});
      if (found != tables_.end()) return &found->second;
    }
    return nullptr;
  }

 private:
  const ResultSet& results_;
  std::string policy_;
  std::map<std::tuple<std::string, std::string, int>, Table> tables_;
};

std::vector<Cell> cells_of(const std::vector<Numbers>& members, const Grouping& grouping) {
  std::set<int> layers;
  std::size_t heads = 0;
  for (const Numbers& member : members) {
    layers.insert(member.of_layers.begin(), member.of_layers.end());
    heads = std::max(heads, member.heads);
  }
  if (!grouping.layer) layers = {-1};
  std::vector<Cell> cells;
  for (const int layer : layers) {
    if (!grouping.head) {
      cells.push_back({layer, -1});
      continue;
    }
    for (int head = 0; head < static_cast<int>(heads); ++head) cells.push_back({layer, head});
  }
  return cells;
}

std::vector<ComparisonRow> rows_of(const ResultSet& results, const Group& group, const Baseline* baseline,
                                   const ComparisonOptions& options) {
  const MeasureTraits& measure = traits_of(options.measure);
  std::vector<Numbers> members;
  for (const std::size_t i : group.results) {
    Numbers numbers = numbers_of(results, i, options.measure);
    if (numbers.table.numbers.empty()) continue;
    if (baseline != nullptr) numbers.reference = baseline->counterpart(i);
    members.push_back(std::move(numbers));
  }
  std::vector<ComparisonRow> rows;
  for (const Cell cell : cells_of(members, options.grouping)) {
    std::vector<const Numbers*> all;
    std::vector<const Numbers*> pairs;
    for (const Numbers& member : members) {
      if (!has(member, cell)) continue;
      all.push_back(&member);
      if (member.reference != nullptr) pairs.push_back(&member);
    }
    if (all.empty()) continue;
    const Weighed weighed = weigh(std::move(all));
    ComparisonRow& row = rows.emplace_back();
    row.key = group.key;
    row.key.layer = cell.layer;
    row.key.head = cell.head;
    row.granularity = weighed.members.front()->result->granularity;
    row.traces = weighed.traces;
    row.oracle = options.grouping.policy && weighed.members.front()->result->oracle;
    static_cast<Keeping&>(row) = kept_by(weighed);
    row.distribution = distribution_in(weighed, cell, measure.lower_is_better);
    const MeanEstimate estimate = mean_in(weighed, cell, measure, options.bootstrap);
    row.distribution.mean = estimate.mean;
    row.interval = estimate.interval;
    if (!pairs.empty()) row.difference = difference_of(weigh(std::move(pairs)), cell, measure, options.bootstrap);
  }
  return rows;
}

}  // namespace

Grouping Grouping::parse(std::string_view keys) {
  Grouping grouping{.policy = false, .capacity = false};
  std::vector<std::string> known;
  for (const auto& [name, member] : kKeys) known.emplace_back(name);
  while (true) {
    const std::size_t comma = keys.find(',');
    const std::string_view key = keys.substr(0, comma);
    const auto* found = std::ranges::find(kKeys, key, &std::pair<std::string_view, bool Grouping::*>::first);
    if (found == kKeys.end()) {
      throw UsageError(fmt::format("--by: '{}' is not what results are told apart by.{} Keys: {}", key,
                                   suggestion(key, known), fmt::join(known, ", ")));
    }
    grouping.*found->second = true;
    if (comma == std::string_view::npos) return grouping;
    keys.remove_prefix(comma + 1);
  }
}

namespace {

// A result as the table sees it.
struct Placed {
  std::pair<std::string, int> context;      // within which rows are compared: trace, eviction position
  std::pair<std::string, std::string> row;  // policy, capacity; or trace, eviction position where neither is told apart
  std::tuple<std::string, std::string, std::string, int> others;  // what the row is averaged over
};

Placed placed(const StoredResult& result, const Grouping& grouping) {
  Placed place;
  auto& [policy, capacity, trace, eviction] = place.others;
  if (!grouping.policy && !grouping.capacity) {
    // Of other traces nothing is the same but the settings.
    if (grouping.trace) place.row.first = result.trace;
    if (grouping.eviction_position) place.row.second = std::to_string(result.eviction_position);
    policy = result.policy;
    capacity = result.capacity_request;
    return place;
  }
  (grouping.policy ? place.row.first : policy) = result.policy;
  (grouping.capacity ? place.row.second : capacity) = result.capacity_request;
  (grouping.trace ? place.context.first : trace) = result.trace;
  (grouping.eviction_position ? place.context.second : eviction) = result.eviction_position;
  return place;
}

using Others = std::set<decltype(Placed::others)>;

// The set of others that covers most: rows that have all of it, times its size.
const Others* covering_most(const std::map<std::pair<std::string, std::string>, Others>& rows, const Others& common) {
  std::vector<const Others*> candidates;
  for (const auto& [row, others] : rows) {
    const auto is_known = [&its = others](const Others* other) { return *other == its; };
    if (std::ranges::none_of(candidates, is_known)) candidates.push_back(&others);
  }
  if (!common.empty()) candidates.push_back(&common);
  return *std::ranges::max_element(candidates, {}, [&rows](const Others* candidate) {
    const auto covers = [candidate](const auto& entry) { return std::ranges::includes(entry.second, *candidate); };
    return static_cast<std::size_t>(std::ranges::count_if(rows, covers)) * candidate->size();
  });
}

}  // namespace

ResultSet over_the_same_others(const ResultSet& results, const Grouping& grouping, std::vector<std::string>& notes) {
  std::map<std::pair<std::string, int>, std::map<std::pair<std::string, std::string>, Others>> contexts;
  for (const StoredResult& result : results.results()) {
    if (result.capacity_request == kAllPositions) continue;
    const Placed place = placed(result, grouping);
    contexts[place.context][place.row].insert(place.others);
  }
  std::map<std::pair<std::string, int>, Others> chosen;
  std::set<std::pair<std::string, std::string>> without;  // rows that lack some
  for (const auto& [context, rows] : contexts) {
    Others common = rows.begin()->second;
    for (const auto& [row, others] : rows) {
      std::erase_if(common, [&its = others](const auto& other) { return !its.contains(other); });
    }
    chosen[context] = *covering_most(rows, common);
    for (const auto& [row, others] : rows) {
      if (!std::ranges::includes(others, chosen[context])) without.insert(row);
    }
  }
  std::size_t beside = 0;
  ResultSet same = results.only([&](const StoredResult& result) {
    if (result.capacity_request == kAllPositions) return true;
    const Placed place = placed(result, grouping);
    const Others& of_all = chosen.at(place.context);
    if (!std::ranges::includes(contexts.at(place.context).at(place.row), of_all)) return false;
    if (of_all.contains(place.others)) return true;
    ++beside;
    return false;
  });
  if (without.empty() && beside == 0) return same;
  std::vector<std::string> parts;
  if (!without.empty()) {
    const auto& [first, second] = *without.begin();
    const std::string name = first.empty() || second.empty() ? first + second : fmt::format("{} at {}", first, second);
    parts.push_back(fmt::format(
        "{}{}, which lack{} some of what the others are averaged over", name,
        without.size() == 1 ? ""
                            : fmt::format(" and {} more row{}", without.size() - 1, without.size() == 2 ? "" : "s"),
        without.size() == 1 ? "s" : ""));
  }
  if (beside > 0) {
    parts.push_back(fmt::format("{} result{} that not all rows have", beside, beside == 1 ? "" : "s"));
  }
  notes.push_back(
      fmt::format("each row is a mean over the same policies, capacities, traces and eviction positions: left "
                  "out are {}",
                  fmt::join(parts, ", and ")));
  return same;
}

namespace {

// What it would take that results have a measure, to go on with after what is said of it.
std::string why_lacking(const ResultSet& results, const MeasureTraits& measure) {
  const auto any_has = [&results](Measure other) {
    for (std::size_t i = 0; i < results.results().size(); ++i) {
      if (results.has(i, other)) return true;
    }
    return false;
  };
  const bool any_over_time = any_has(Measure::cache_size);
  if (measure.over_time && !any_over_time) return ": replay policies with a schedule, such as snapkv+every(64)";
  switch (measure.per) {
    case MeasureTraits::Per::head_and_span:
    case MeasureTraits::Per::span_and_query:
      return ": their traces have no spans";
    case MeasureTraits::Per::head:
      return ": replay with --rank-agreement policies that rank by scores";
    case MeasureTraits::Per::model_query:
      if (measure.measure != Measure::residual_sum) return ": run the model on over what is kept, with kvreplay live";
      [[fallthrough]];
    case MeasureTraits::Per::query:
    case MeasureTraits::Per::head_and_query:
      if (any_has(Measure::layer_error)) {
        const bool of_residual_stream =
            measure.measure == Measure::residual_error || measure.measure == Measure::residual_sum;
        if (of_residual_stream && any_has(Measure::residual_error)) {
          return ": sweeps do not add up the changes of layers; replay the settings with kvreplay replay";
        }
        return of_residual_stream ? ": their traces have no residual_norm; capture them again" : "";
      }
      return any_has(Measure::kl) ? ": only the model's own loss was measured, which --measure kl compares" : "";
  }
  return "";
}

}  // namespace

std::vector<ComparisonRow> compare(const ResultSet& results, const ComparisonOptions& options) {
  const MeasureTraits& measure = traits_of(options.measure);
  if ((options.grouping.layer || options.grouping.head) && !measure.is_of_layers()) {
    throw UsageError(fmt::format("{} is of the whole model, and has no {}: choose another measure, such as {}",
                                 measure.noun, options.grouping.head ? "heads" : "layers",
                                 traits_of(options.grouping.head ? Measure::head_error : Measure::layer_error).name));
  }
  if (options.grouping.head &&
      (measure.per == MeasureTraits::Per::query || measure.per == MeasureTraits::Per::span_and_query)) {
    throw UsageError(
        fmt::format("{} has no heads: it is of all heads of a layer together; choose another measure, "
                    "such as head_error",
                    measure.noun));
  }
  std::optional<Baseline> baseline;
  if (!options.baseline.empty() && options.grouping.policy) {
    baseline.emplace(results, results.policy_named(options.baseline), options.measure);
  }
  const std::vector<Group> groups = groups_of(results, options.grouping);
  std::vector<std::vector<ComparisonRow>> of_group(groups.size());
  parallel_for(static_cast<int>(groups.size()), [&](int i) {
    const auto at = static_cast<std::size_t>(i);
    of_group[at] = rows_of(results, groups[at], baseline ? &*baseline : nullptr, options);
  });
  std::vector<ComparisonRow> rows;
  for (std::vector<ComparisonRow>& some : of_group) std::ranges::move(some, std::back_inserter(rows));
  if (rows.empty()) {
    const bool vowel = std::string_view("aeiou").find(measure.noun.front()) != std::string_view::npos;
    throw Error(fmt::format("no result has a{} {}{}", vowel ? "n" : "", measure.noun, why_lacking(results, measure)));
  }
  const std::vector<std::string> capacities = results.capacities();
  const auto sorted_before = [&](const ComparisonRow& a, const ComparisonRow& b) {
    const auto place = [&](const ComparisonRow& row) {
      // What keeps everything stands first, as in every table.
      const auto capacity = row.key.capacity_request == kAllPositions
                                ? -1
                                : std::ranges::find(capacities, row.key.capacity_request) - capacities.begin();
      return std::tuple(capacity, row.key.trace, row.key.eviction_position, row.key.layer, row.key.head,
                        measure.lower_is_better ? row.distribution.mean : -row.distribution.mean);
    };
    return place(a) < place(b);
  };
  std::ranges::stable_sort(rows, sorted_before);

  std::vector<double> p_values;
  std::vector<std::string> asked_at;
  for (const ComparisonRow& row : rows) {
    p_values.push_back(row.difference ? row.difference->p_value : std::numeric_limits<double>::quiet_NaN());
    asked_at.push_back(row.key.capacity_request);
  }
  p_values = holm_within(p_values, asked_at);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].difference) rows[i].difference->adjusted = p_values[i];
  }
  return rows;
}

std::optional<Aggregate> aggregate(const ResultSet& results, std::span<const std::size_t> which, Measure measure,
                                   const BootstrapOptions& bootstrap) {
  std::vector<Numbers> members;
  for (const std::size_t i : which) {
    Numbers numbers = numbers_of(results, i, measure);
    if (!numbers.table.numbers.empty()) members.push_back(std::move(numbers));
  }
  if (members.empty()) return std::nullopt;
  std::vector<const Numbers*> all;
  for (const Numbers& member : members) all.push_back(&member);
  const Weighed weighed = weigh(std::move(all));
  Aggregate found;
  found.estimate = mean_in(weighed, {}, traits_of(measure), bootstrap);
  static_cast<Keeping&>(found) = kept_by(weighed);
  return found;
}

std::vector<std::pair<int, PairedDifference>> paired_differences(const ResultSet& results,
                                                                 std::span<const ResultPair> pairs, Measure measure,
                                                                 const BootstrapOptions& bootstrap) {
  std::vector<Numbers> members;
  std::vector<Table> references(pairs.size());
  std::set<int> layers;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    Numbers numbers = numbers_of(results, pairs[i].first, measure);
    references[i] = results.read(pairs[i].second, measure);
    if (numbers.table.numbers.empty() || references[i].numbers.empty()) continue;
    numbers.reference = &references[i];
    layers.insert(numbers.of_layers.begin(), numbers.of_layers.end());
    members.push_back(std::move(numbers));
  }
  std::vector<std::pair<int, PairedDifference>> differences;
  if (members.empty()) return differences;
  layers.insert(-1);
  for (const int layer : layers) {
    const Cell cell{layer, -1};
    std::vector<const Numbers*> of_layer;
    for (const Numbers& member : members) {
      if (has(member, cell)) of_layer.push_back(&member);
    }
    differences.emplace_back(layer, difference_of(weigh(std::move(of_layer)), cell, traits_of(measure), bootstrap));
  }
  return differences;
}

}  // namespace kvreplay
