#include "analysis/prediction.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>
#include <variant>

#include "analysis/summary.h"
#include "analysis/weighing.h"
#include "replay/rank_agreement.h"

namespace kvreplay {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double mean_of(std::span<const float> numbers, bool squared) {
  Mean mean;
  for (const float number : numbers) {
    const auto value = static_cast<double>(number);
    mean.add(squared ? value * value : value);
  }
  return mean.value();
}

double mean_of(const std::vector<double>& numbers) {
  Mean mean;
  for (const double number : numbers) mean.add(number);
  return mean.value();
}

// Places of numbers as they ascend, from 0; equal ones share the first.
std::vector<float> levels_of(const std::vector<double>& numbers) {
  std::vector<double> ascending = numbers;
  std::ranges::sort(ascending);
  std::vector<float> levels;
  for (const double number : numbers) {
    levels.push_back(static_cast<float>(std::ranges::lower_bound(ascending, number) - ascending.begin()));
  }
  return levels;
}

// What a predictor says of settings, as far as it was measured, beside their losses.
struct Pairs {
  std::vector<double> offline;  // larger is worse
  std::vector<double> losses;

  void add(double value, double loss) {
    if (std::isnan(value)) return;
    offline.push_back(value);
    losses.push_back(loss);
  }
};

double spearman(const Pairs& pairs) {
  if (std::ssize(pairs.losses) < kFewestPredicted) return kNone;
  const auto is_flat = [](const std::vector<double>& numbers) {
    return std::ranges::all_of(numbers, [&](double number) { return number == numbers.front(); });
  };
  if (is_flat(pairs.offline) || is_flat(pairs.losses)) return kNone;
  const std::vector<float> offline = levels_of(pairs.offline);
  return RankedValues(levels_of(pairs.losses)).correlation(offline, 0, std::ssize(offline)).spearman;
}

Prediction prediction_of(const LossPredictions& all, std::size_t which, const BootstrapOptions& bootstrap) {
  Prediction prediction;
  prediction.predictor = all.predictors[which];
  const bool lower_is_better = traits_of(prediction.predictor.measure).lower_is_better;
  Pairs of_all;
  // By trace, eviction position and capacity.
  std::map<std::tuple<std::string, int, std::string>, Pairs> groups;
  for (const PredictedLoss& setting : all.settings) {
    const double worse = lower_is_better ? setting.offline[which] : -setting.offline[which];
    of_all.add(worse, setting.loss);
    groups[{setting.trace, setting.eviction_position, setting.capacity_request}].add(worse, setting.loss);
  }
  prediction.all = spearman(of_all);
  std::map<std::string, std::vector<double>> of_prompts;
  std::map<std::string, std::map<std::string, std::vector<double>>> of_capacities;  // and then by prompt
  for (const auto& [place, pairs] : groups) {
    const double correlation = spearman(pairs);
    if (std::isnan(correlation)) continue;
    const auto& [trace, eviction_position, capacity] = place;
    of_prompts[trace].push_back(correlation);
    of_capacities[capacity][trace].push_back(correlation);
    prediction.smallest = prediction.groups == 0 ? correlation : std::min(prediction.smallest, correlation);
    ++prediction.groups;
  }
  for (const auto& [capacity, prompts] : of_capacities) {
    std::vector<double> means;
    for (const auto& [trace, correlations] : prompts) means.push_back(mean_of(correlations));
    prediction.of_capacity[capacity] = mean_of(means);
  }
  prediction.prompts = static_cast<int>(of_prompts.size());
  if (of_prompts.empty()) return prediction;
  // Capacities are not drawn: a prompt is one number.
  std::vector<Series> series;
  for (const auto& [trace, correlations] : of_prompts) {
    series.push_back({{mean_of(correlations)}, 1, static_cast<int>(series.size())});
  }
  BootstrapOptions prompts = bootstrap;
  prompts.resampling = Resampling::traces;
  const MeanEstimate estimate = bootstrap_mean(series, prompts);
  prediction.mean = estimate.mean;
  // A correlation is from −1 to 1.
  if (!std::isnan(estimate.interval.low)) {
    prediction.interval = {std::max(estimate.interval.low, -1.0), std::min(estimate.interval.high, 1.0)};
  }
  return prediction;
}

// Of a table of `layers` the numbers of those that are late.
std::vector<float> of_late_layers(const Table& table, const std::vector<int>& layers, const StoredResult& result) {
  const std::vector<int> late = late_layers(layers, result.num_layers);
  const std::size_t per_layer = table.numbers.size() / layers.size();
  // They are the last of them.
  const std::size_t before = (layers.size() - late.size()) * per_layer;
  return {table.numbers.begin() + static_cast<std::ptrdiff_t>(before), table.numbers.end()};
}

bool is_of_live_runs(const MeasureTraits& measure) {
  return std::holds_alternative<MeasureFunction<ModelOutcome>>(measure.definition);
}

bool is_telling(const StoredResult& result) {
  std::vector<int> layers(static_cast<std::size_t>(result.num_layers));
  std::iota(layers.begin(), layers.end(), 0);
  return !result.oracle && result.capacity_request != kAllPositions && result.kept_in(layers).share < 1;
}

}  // namespace

std::string Predictor::name() const {
  return fmt::format("{}{}{}", traits_of(measure).name, squared ? " squared" : "", late ? " late" : "");
}

std::string Predictor::noun() const {
  return fmt::format("{}{}{}", squared ? "squared " : "", traits_of(measure).noun, late ? " of late layers" : "");
}

LossPredictions loss_predictions(const ResultSet& results, const BootstrapOptions& bootstrap) {
  std::vector<std::size_t> telling;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    if (results.has(i, Measure::kl) && is_telling(results.results()[i])) telling.push_back(i);
  }
  LossPredictions all;
  for (const MeasureTraits& measure : measures()) {
    const auto has = [&](std::size_t i) { return results.has(i, measure.measure); };
    if (is_of_live_runs(measure) || std::ranges::none_of(telling, has)) continue;
    all.predictors.push_back({.measure = measure.measure});
    if (measure.root_mean_square) {
      all.predictors.push_back({.measure = measure.measure, .late = true});
    } else if (measure.lower_is_better) {
      all.predictors.push_back({.measure = measure.measure, .squared = true});
    }
  }
  if (all.predictors.empty()) return all;
  for (const std::size_t i : telling) {
    const StoredResult& result = results.results()[i];
    const double loss = mean_of(results.read(i, Measure::kl).numbers, false);
    if (std::isnan(loss)) continue;
    PredictedLoss& setting = all.settings.emplace_back();
    setting = {result.trace, result.eviction_position, result.policy, result.capacity_request, loss, {}};
    Table table;
    for (const Predictor& predictor : all.predictors) {
      // Squares and late layers come after the numbers that they are of.
      if (!predictor.squared && !predictor.late) table = results.read(i, predictor.measure);
      const bool of_squares = predictor.squared || traits_of(predictor.measure).root_mean_square;
      const std::vector<int> layers = results.layers_of(result);
      const std::vector<float> late = predictor.late ? of_late_layers(table, layers, result) : std::vector<float>();
      const double mean = mean_of(predictor.late ? late : table.numbers, of_squares);
      setting.offline.push_back(of_squares && !predictor.squared ? std::sqrt(mean) : mean);
    }
  }
  for (std::size_t which = 0; which < all.predictors.size(); ++which) {
    const auto was_measured = [which](const PredictedLoss& setting) { return !std::isnan(setting.offline[which]); };
    if (std::ranges::none_of(all.settings, was_measured)) continue;
    all.predictions.push_back(prediction_of(all, which, bootstrap));
  }
  std::ranges::stable_sort(all.predictions, [](const Prediction& a, const Prediction& b) {
    const auto rank = [](const Prediction& each) {
      const auto or_least = [](double number) { return std::isnan(number) ? -2.0 : number; };
      return std::pair(-or_least(each.mean), -or_least(each.all));
    };
    return rank(a) < rank(b);
  });
  return all;
}

}  // namespace kvreplay
