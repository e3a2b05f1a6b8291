#include "analysis/time_course.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "analysis/summary.h"
#include "analysis/weighing.h"

namespace kvreplay {
namespace {

int step_of(const StoredResult& result, std::size_t query) {
  return result.evaluation_positions[query] - result.eviction_position + 1;
}

int steps_of(const StoredResult& result) { return step_of(result, result.evaluation_positions.size() - 1); }

bool is_over_time(const ResultSet& results, const SettingKey& key) {
  return results.has(results.of_setting(key).front(), Measure::cache_size);
}

// The longest of all results: so that settings of different traces share their bins.
int most_steps(const ResultSet& results) {
  int most = 0;
  for (const StoredResult& result : results.results()) most = std::max(most, steps_of(result));
  return most;
}

// Below which `share` of the numbers, ascending, are: between two of them linearly.
double quantile(const std::vector<double>& ascending, double share) {
  const double place = share * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  return ascending[below] + (place - static_cast<double>(below)) * (ascending[above] - ascending[below]);
}

// Means of what stands at the queries of every bin: `number(query)`.
template <class Number>
std::vector<double> means_of_bins(const StoredResult& result, const StepBins& bins, const Number& number) {
  std::vector<Mean> means(static_cast<std::size_t>(bins.count()));
  for (std::size_t query = 0; query < result.evaluation_positions.size(); ++query) {
    means[static_cast<std::size_t>(bins.bin_of(step_of(result, query)))].add(number(query));
  }
  std::vector<double> values;
  for (const Mean& mean : means) values.push_back(mean.value());
  return values;
}

TimeCourse time_course(const ResultSet& results, const SettingKey& key, Measure measure, const StepBins& bins) {
  struct Bin {
    MeanOverTraces mean;
    std::vector<double> numbers;  // of layers and traces
  };
  std::vector<Bin> of_bins(static_cast<std::size_t>(bins.count()));
  for (const std::size_t index : results.of_setting(key)) {
    const StoredResult& result = results.results()[index];
    const Table table = results.read(index, measure);
    if (table.numbers.empty()) continue;
    const std::size_t queries = result.evaluation_positions.size();
    const std::size_t layers = results.layers_of(result).size();
    const std::size_t heads = table.numbers.size() / (layers * queries);
    std::vector<Mean> of_result(of_bins.size());
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::vector<double> means = means_of_bins(result, bins, [&](std::size_t query) {
        Mean over_heads;
        for (std::size_t head = 0; head < heads; ++head) {
          over_heads.add(static_cast<double>(table.numbers[(layer * heads + head) * queries + query]));
        }
        return over_heads.value();
      });
      for (std::size_t bin = 0; bin < of_bins.size(); ++bin) {
        if (std::isnan(means[bin])) continue;
        of_result[bin].add(means[bin]);
        of_bins[bin].numbers.push_back(means[bin]);
      }
    }
    for (std::size_t bin = 0; bin < of_bins.size(); ++bin) {
      if (of_result[bin].count() > 0) of_bins[bin].mean.add(result.trace, of_result[bin].value());
    }
  }
  TimeCourse course{.policy = key.policy, .capacity_request = key.capacity_request, .measure = measure, .points = {}};
  for (std::size_t bin = 0; bin < of_bins.size(); ++bin) {
    std::vector<double>& numbers = of_bins[bin].numbers;
    if (numbers.empty()) continue;
    std::ranges::sort(numbers);
    course.points.push_back({.first_step = bins.first_step(static_cast<int>(bin)),
                             .last_step = bins.last_step(static_cast<int>(bin)),
                             .mean = of_bins[bin].mean.mean().value(),
                             .low = quantile(numbers, 0.25),
                             .high = quantile(numbers, 0.75)});
  }
  return course;
}

}  // namespace

int StepBins::last_step(int bin) const { return std::min((bin + 1) * width, steps); }

StepBins StepBins::of(int steps, int most) { return {.steps = steps, .width = std::max(1, (steps + most - 1) / most)}; }

std::vector<TimeCourse> time_courses(const ResultSet& results, std::span<const Measure> measures, int most_bins) {
  std::vector<TimeCourse> courses;
  const bool any =
      std::ranges::any_of(results.settings(), [&](const SettingKey& key) { return is_over_time(results, key); });
  if (!any) return courses;
  const StepBins bins = StepBins::of(most_steps(results), most_bins);
  for (const Measure measure : measures) {
    for (const SettingKey& key : results.settings()) {
      if (key.capacity_request == kAllPositions) continue;
      TimeCourse course = time_course(results, key, measure, bins);
      if (!course.points.empty()) courses.push_back(std::move(course));
    }
  }
  return courses;
}

std::vector<SpanSurvival> span_survivals(const ResultSet& results, int most_bins) {
  std::vector<SpanSurvival> survivals;
  if (results.results().empty()) return survivals;
  const StepBins bins = StepBins::of(most_steps(results), most_bins);
  const auto points_of = [&bins](const std::vector<double>& shares) {
    std::vector<SpanSurvival::Point> points;
    for (std::size_t bin = 0; bin < shares.size(); ++bin) {
      if (std::isnan(shares[bin])) continue;
      points.push_back({bins.first_step(static_cast<int>(bin)), bins.last_step(static_cast<int>(bin)), shares[bin]});
    }
    return points;
  };
  for (const SettingKey& key : results.settings()) {
    if (key.capacity_request == kAllPositions) continue;
    std::vector<SpanSurvival> of_setting;
    std::vector<MeanOverTraces> all(static_cast<std::size_t>(bins.count()));
    for (const std::size_t index : results.of_setting(key)) {
      const StoredResult& result = results.results()[index];
      const Table table = results.read(index, Measure::span_survival);
      if (table.numbers.empty()) continue;
      const std::size_t queries = result.evaluation_positions.size();
      const std::size_t spans = result.spans.size();
      const std::size_t layers = results.layers_of(result).size();
      std::vector<Mean> of_result(all.size());
      for (std::size_t span = 0; span < spans; ++span) {
        const std::vector<double> shares = means_of_bins(result, bins, [&](std::size_t query) {
          Mean over_layers;
          for (std::size_t layer = 0; layer < layers; ++layer) {
            over_layers.add(static_cast<double>(table.numbers[(layer * spans + span) * queries + query]));
          }
          return over_layers.value();
        });
        for (std::size_t bin = 0; bin < shares.size(); ++bin) of_result[bin].add(shares[bin]);
        std::vector<SpanSurvival::Point> points = points_of(shares);
        if (points.empty()) continue;
        of_setting.push_back({.policy = key.policy,
                              .capacity_request = key.capacity_request,
                              .trace = result.trace,
                              .label = result.spans[span].label,
                              .start = result.spans[span].start,
                              .points = std::move(points)});
      }
      for (std::size_t bin = 0; bin < all.size(); ++bin) {
        if (of_result[bin].count() > 0) all[bin].add(result.trace, of_result[bin].value());
      }
    }
    if (of_setting.empty()) continue;
    std::vector<double> shares;
    for (const MeanOverTraces& mean : all) shares.push_back(mean.mean().value());
    survivals.push_back({.policy = key.policy,
                         .capacity_request = key.capacity_request,
                         .trace = "",
                         .label = "",
                         .start = 0,
                         .points = points_of(shares)});
    std::ranges::move(of_setting, std::back_inserter(survivals));
  }
  return survivals;
}

std::vector<ResidencyRaster> residency_rasters(const ResultSet& results, const RetentionSet& kept, int most_step_bins,
                                               int most_position_bins) {
  std::vector<ResidencyRaster> rasters;
  for (const RetentionSet::Entry& entry : kept.entries()) {
    const StoredResult& result = results.results()[entry.result];
    if (!results.has(entry.result, Measure::cache_size)) continue;
    const std::vector<int>& queries = result.evaluation_positions;
    ResidencyRaster raster{.trace = result.trace,
                           .policy = result.policy,
                           .capacity_request = result.capacity_request,
                           .eviction_position = result.eviction_position,
                           .steps = StepBins::of(steps_of(result), most_step_bins),
                           .positions = RasterBins::of(queries.back() + 1, most_position_bins),
                           .share = {}};
    std::vector<int> layers = results.layers_of(result);
    std::erase_if(layers, [&result](int layer) { return !result.holds_everything(layer); });
    if (layers.empty()) continue;
    const KeptSets sets = kept.read(entry, results);
    const auto bins = static_cast<std::size_t>(raster.positions.count());
    // By how many a bin's cached positions change at each query, and those that had come.
    std::vector<std::vector<double>> changes(bins, std::vector<double>(queries.size() + 1, 0.0));
    std::vector<std::vector<double>> coming = changes;
    const auto add = [&](std::vector<std::vector<double>>& to, int position, int from, int until) {
      const auto first = std::ranges::lower_bound(queries, from) - queries.begin();
      const auto end = std::ranges::upper_bound(queries, until) - queries.begin();
      if (first >= end) return;
      std::vector<double>& of_bin = to[static_cast<std::size_t>(position / raster.positions.width)];
      of_bin[static_cast<std::size_t>(first)] += 1;
      of_bin[static_cast<std::size_t>(end)] -= 1;
    };
    double count = 0;
    for (const int layer : layers) {
      for (int set = 0; set < sets.sets_per_layer; ++set) {
        const Residency& residency = sets.sets[static_cast<std::size_t>(layer * sets.sets_per_layer + set)];
        for (const auto& [position, from, until] :
             residency.seen_between(queries.front(), queries.back(), result.eviction_position)) {
          add(changes, position, from, until);
        }
        ++count;
      }
    }
    for (int position = 0; position <= queries.back(); ++position) {
      add(coming, position, position, std::numeric_limits<int>::max());
    }
    const auto step_bins = static_cast<std::size_t>(raster.steps.count());
    raster.share.assign(step_bins * bins, std::numeric_limits<float>::quiet_NaN());
    for (std::size_t bin = 0; bin < bins; ++bin) {
      std::vector<double> cached(step_bins, 0);
      std::vector<double> come(step_bins, 0);
      double cached_now = 0;
      double come_now = 0;
      for (std::size_t query = 0; query < queries.size(); ++query) {
        cached_now += changes[bin][query];
        come_now += coming[bin][query];
        const auto at = static_cast<std::size_t>(raster.steps.bin_of(step_of(result, query)));
        cached[at] += cached_now;
        come[at] += come_now;
      }
      for (std::size_t step = 0; step < step_bins; ++step) {
        if (come[step] > 0) raster.share[step * bins + bin] = static_cast<float>(cached[step] / (come[step] * count));
      }
    }
    rasters.push_back(std::move(raster));
  }
  return rasters;
}

}  // namespace kvreplay
