#include "analysis/summary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>

#include "replay/measure.h"

namespace kvreplay {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// The means of a PolicyRow that are of a measure.
constexpr std::array<std::pair<Measure, double PolicyRow::*>, 12> kMeasures = {{
    {Measure::layer_error, &PolicyRow::layer_error},
    {Measure::residual_error, &PolicyRow::residual_error},
    {Measure::head_error, &PolicyRow::head_error},
    {Measure::attention_recall, &PolicyRow::attention_recall},
    {Measure::cosine, &PolicyRow::cosine},
    {Measure::span_recall, &PolicyRow::span_recall},
    {Measure::spearman, &PolicyRow::spearman},
    {Measure::kendall, &PolicyRow::kendall},
    {Measure::kl, &PolicyRow::kl},
    {Measure::nll_increase, &PolicyRow::nll_increase},
    {Measure::agree, &PolicyRow::agree},
    {Measure::turnover, &PolicyRow::turnover},
}};

// The layers that means over layers are of.
std::vector<int> layers_of(const TraceReplay& replay, bool full_layers) {
  std::vector<int> layers;
  for (int layer = 0; layer < replay.model.num_layers; ++layer) {
    if (!full_layers || replay.held[static_cast<std::size_t>(layer)] == replay.eviction_position) {
      layers.push_back(layer);
    }
  }
  return layers;
}

// One layer's part of a table [L, …].
std::span<const float> of_layer(const Table& table, int layer) {
  const std::size_t size = table.numbers.size() / static_cast<std::size_t>(table.shape.front());
  return std::span(table.numbers).subspan(static_cast<std::size_t>(layer) * size, size);
}

double root_mean_square(std::span<const float> numbers) {
  Mean squares;
  for (const float number : numbers) squares.add(static_cast<double>(number) * static_cast<double>(number));
  return std::sqrt(squares.value());
}

// The numbers of some layers.
std::vector<float> of_layers(const Table& table, const std::vector<int>& layers) {
  std::vector<float> numbers;
  for (const int layer : layers) {
    const std::span<const float> some = of_layer(table, layer);
    numbers.insert(numbers.end(), some.begin(), some.end());
  }
  return numbers;
}

// NaN where there is nothing.
double mean_of(const Table& table, const std::vector<int>& layers) {
  Mean mean;
  for (const int layer : layers) {
    for (const float number : of_layer(table, layer)) mean.add(static_cast<double>(number));
  }
  return mean.value();
}

// One number for all that a result has of a measure: NaN where that is nothing.
double number_of(const ReplayResult& result, Measure measure, const std::vector<int>& layers) {
  const Table& table = result.measures[measure];
  const MeasureTraits& traits = traits_of(measure);
  if (!traits.is_of_layers()) return distribution_of(table.numbers, true).mean;
  if (table.numbers.empty()) return kNone;
  return traits.root_mean_square ? root_mean_square(of_layers(table, layers)) : mean_of(table, layers);
}

double kept_in(const ReplayResult& result, const std::vector<int>& layers) {
  if (layers.size() * static_cast<std::size_t>(result.kept.sets_per_layer) == result.kept.sets.size()) {
    return mean_kept(result);
  }
  double sum = 0;
  for (const int layer : layers) sum += mean_kept(result, layer);
  return sum / static_cast<double>(layers.size());
}

double quantile(const std::vector<float>& ascending, double share) {
  const double place = share * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  const double weight = place - static_cast<double>(below);
  return (1 - weight) * static_cast<double>(ascending[below]) + weight * static_cast<double>(ascending[above]);
}

}  // namespace

Distribution distribution_of(std::vector<float> numbers, bool lower_is_better) {
  std::erase_if(numbers, [](float number) { return std::isnan(number); });
  if (numbers.empty()) return {kNone, kNone, kNone, kNone};
  std::ranges::sort(numbers);
  return {.mean = std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size()),
          .median = quantile(numbers, 0.5),
          .p90 = quantile(numbers, lower_is_better ? 0.9 : 0.1),
          .worst = static_cast<double>(lower_is_better ? numbers.back() : numbers.front())};
}

Distribution distribution_of(std::vector<float> numbers, const MeasureTraits& measure) {
  const double root = measure.root_mean_square ? root_mean_square(numbers) : kNone;
  Distribution distribution = distribution_of(std::move(numbers), measure.lower_is_better);
  if (measure.root_mean_square) distribution.mean = root;
  return distribution;
}

Distribution weighted_distribution(std::vector<WeightedNumber> numbers, bool lower_is_better) {
  const double weight_of_first = numbers.front().weight;
  const bool equal = std::ranges::all_of(
      numbers, [weight_of_first](const WeightedNumber& each) { return each.weight == weight_of_first; });
  if (equal) {
    std::vector<float> plain(numbers.size());
    std::ranges::transform(numbers, plain.begin(), &WeightedNumber::number);
    return distribution_of(std::move(plain), lower_is_better);
  }
  std::ranges::sort(numbers, {}, &WeightedNumber::number);
  double sum = 0;
  double weight = 0;
  for (const WeightedNumber& each : numbers) {
    sum += each.weight * static_cast<double>(each.number);
    weight += each.weight;
  }
  const double first = numbers.front().weight / 2;
  const double span = weight - first - numbers.back().weight / 2;
  const auto quantile_at = [&](double share) {
    const double place = first + share * span;
    double before = 0;  // the middle of the number that was looked at before
    double passed = 0;  // the weight up to the one that is looked at
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const double middle = passed + numbers[i].weight / 2;
      if (middle >= place && i == 0) break;
      if (middle >= place) {
        const double part = (place - before) / (middle - before);
        return (1 - part) * static_cast<double>(numbers[i - 1].number) + part * static_cast<double>(numbers[i].number);
      }
      before = middle;
      passed += numbers[i].weight;
    }
    return static_cast<double>(passed == 0 ? numbers.front().number : numbers.back().number);
  };
  return {.mean = sum / weight,
          .median = quantile_at(0.5),
          .p90 = quantile_at(lower_is_better ? 0.9 : 0.1),
          .worst = static_cast<double>(lower_is_better ? numbers.back().number : numbers.front().number)};
}

std::vector<int> late_layers(const std::vector<int>& layers, int num_layers) {
  std::vector<int> late;
  std::ranges::copy_if(layers, std::back_inserter(late), [num_layers](int layer) { return layer >= num_layers / 3; });
  return late;
}

std::vector<MeasureSummary> summarize(const TraceReplay& replay, const ReplayResult& result, bool full_layers) {
  const std::vector<int> layers = layers_of(replay, full_layers);
  std::vector<MeasureSummary> rows;
  MeasureSummary row{.trace = result.trace,
                     .policy = result.policy,
                     .capacity_request = result.capacity_request,
                     .capacity = result.capacity,
                     .kept = kept_in(result, layers),
                     .bytes_per_token = bytes_per_token(replay, result),
                     .peak = peak_cache_size(result),
                     .footprint = cache_footprint(result),
                     .eviction_position = result.eviction_position,
                     .evaluate_from = replay.evaluation_positions.front(),
                     .granularity = result.granularity,
                     .share = result.share,
                     .oracle = result.oracle,
                     .nothing_to_choose = result.nothing_to_choose,
                     .layer = -1,
                     .full_layers = full_layers,
                     .measure = {},
                     .distribution = {}};
  for (const MeasureTraits& measure : measures()) {
    const Table& table = result.measures[measure.measure];
    if (table.numbers.empty()) continue;
    row.measure = measure.name;
    row.layer = -1;
    if (!measure.is_of_layers()) {
      row.distribution = distribution_of(table.numbers, measure);
      rows.push_back(row);
      continue;
    }
    row.distribution = distribution_of(of_layers(table, layers), measure);
    rows.push_back(row);
    if (measure.root_mean_square) {
      row.late_layers = true;
      row.distribution = distribution_of(of_layers(table, late_layers(layers, replay.model.num_layers)), measure);
      rows.push_back(row);
      row.late_layers = false;
    }
    for (row.layer = 0; row.layer < replay.model.num_layers; ++row.layer) {
      const std::span<const float> some = of_layer(table, row.layer);
      row.distribution = distribution_of({some.begin(), some.end()}, measure);
      rows.push_back(row);
    }
  }
  return rows;
}

std::vector<MeasureSummary> summarize(const std::vector<TraceReplay>& replays, bool full_layers) {
  std::vector<MeasureSummary> rows;
  for (const TraceReplay& replay : replays) {
    for (const ReplayResult& result : replay.results) {
      std::ranges::move(summarize(replay, result, full_layers), std::back_inserter(rows));
    }
  }
  return rows;
}

std::vector<std::string> in_order(const std::map<std::string, std::vector<std::string>>& capacities) {
  std::vector<std::vector<std::string>> lists;
  for (const auto& [policy, asked] : capacities) lists.push_back(asked);
  std::ranges::stable_sort(lists, std::greater<>(), &std::vector<std::string>::size);
  std::vector<std::string> order = {std::string(kAllPositions)};
  for (const std::vector<std::string>& list : lists) {
    auto after = order.begin();
    for (const std::string& capacity : list) {
      const auto found = std::ranges::find(order, capacity);
      after = found == order.end() ? order.insert(after + 1, capacity) : found;
    }
  }
  return order;
}

void PolicyRanking::add(const TraceReplay& replay, const ReplayResult& result) {
  const std::vector<int> layers = layers_of(replay, full_layers_);
  const auto [place, is_new] = place_.try_emplace({result.policy, result.capacity_request}, sums_.size());
  if (is_new) {
    PolicyRow& row = sums_.emplace_back().row;
    capacities_[result.policy].push_back(result.capacity_request);
    row.policy = result.policy;
    row.capacity_request = result.capacity_request;
    row.granularity = result.granularity;
    row.oracle = result.oracle;
  }
  Sum& sum = sums_[place->second];
  const auto next = static_cast<int>(places_.size());
  sum.places.push_back(places_.try_emplace({result.trace, result.eviction_position}, next).first->second);
  PolicyRow& row = sum.row;
  row.nothing_to_choose = row.nothing_to_choose || result.nothing_to_choose;
  const double kept = kept_in(result, layers);
  double held = 0;
  for (const int layer : layers) held += replay.held[static_cast<std::size_t>(layer)];
  row.windowed = row.windowed || held < static_cast<double>(layers.size()) * replay.eviction_position;
  sum.kept.add(result.trace, kept);
  sum.kept_share.add(result.trace, held == 0 ? 1 : kept * static_cast<double>(layers.size()) / held);
  sum.bytes_per_token.add(result.trace, bytes_per_token(replay, result));
  sum.bytes_of_capacity.add(result.trace, bytes_per_token_of_capacity(replay, result));
  sum.peak.add(result.trace, peak_cache_size(result));
  const std::vector<int> late = late_layers(layers, replay.model.num_layers);
  for (const auto& [measure, number] : kMeasures) {
    const bool of_late = measure == Measure::residual_error;
    sum.measures[measure].add(result.trace, number_of(result, measure, of_late ? late : layers));
  }
  if (!result.generation) return;
  const auto all = static_cast<int>(result.generation->ids.size());
  sum.same_tokens.add(result.trace, result.generation->first_difference.value_or(all));
  if (result.generation->answered) sum.answered.add(result.trace, *result.generation->answered ? 1 : 0);
}

std::vector<PolicyRow> PolicyRanking::rows() const {
  std::vector<PolicyRow> rows;
  std::map<std::vector<int>, int> same_places;
  for (const Sum& sum : sums_) {
    PolicyRow& row = rows.emplace_back(sum.row);
    row.places = static_cast<int>(sum.places.size());
    row.same_places = same_places.try_emplace(sum.places, static_cast<int>(same_places.size())).first->second;
    row.kept = sum.kept.mean().value();
    row.kept_share = sum.kept_share.mean().value();
    row.bytes_per_token = sum.bytes_per_token.mean().value();
    row.peak = sum.peak.mean().value();
    row.budget = row.bytes_per_token / sum.bytes_of_capacity.mean().value();
    for (const auto& [measure, number] : kMeasures) row.*number = sum.measures.at(measure).mean().value();
    row.same_tokens = sum.same_tokens.mean().value();
    row.answered = sum.answered.mean().value();
  }
  const std::vector<std::string> capacities = in_order(capacities_);
  const auto capacity_rank = [&capacities](const PolicyRow& row) {
    return std::ranges::find(capacities, row.capacity_request) - capacities.begin();
  };
  const auto known = [&rows](double PolicyRow::*number) {
    return std::ranges::none_of(rows, [number](const PolicyRow& row) { return std::isnan(row.*number); });
  };
  const auto loss = known(&PolicyRow::kl)               ? &PolicyRow::kl
                    : known(&PolicyRow::residual_error) ? &PolicyRow::residual_error
                                                        : &PolicyRow::layer_error;
  std::ranges::stable_sort(rows, [&](const PolicyRow& a, const PolicyRow& b) {
    return std::tuple(capacity_rank(a), -a.places, a.same_places, a.*loss) <
           std::tuple(capacity_rank(b), -b.places, b.same_places, b.*loss);
  });
  return rows;
}

std::vector<PolicyRow> rank_policies(const std::vector<TraceReplay>& replays, bool full_layers) {
  PolicyRanking ranking(full_layers);
  for (const TraceReplay& replay : replays) {
    for (const ReplayResult& result : replay.results) ranking.add(replay, result);
  }
  return ranking.rows();
}

}  // namespace kvreplay
