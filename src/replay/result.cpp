#include "replay/result.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "replay/left_out.h"
#include "trace/inspection.h"

namespace kvreplay {

const Residency& KeptSets::of_query_head(int layer, int query_head, int group_size) const {
  const int set = granularity == Granularity::query ? query_head : query_head / group_size;
  return sets[static_cast<std::size_t>(layer * sets_per_layer + set)];
}

double KeptSets::mean_size() const {
  double positions = 0;
  for (const Residency& set : sets) positions += static_cast<double>(set.kept().size());
  return positions / static_cast<double>(sets.size());
}

double KeptSets::mean_size(int layer) const {
  double positions = 0;
  for (int set = layer * sets_per_layer; set < (layer + 1) * sets_per_layer; ++set) {
    positions += static_cast<double>(sets[static_cast<std::size_t>(set)].kept().size());
  }
  return positions / sets_per_layer;
}

namespace {

// Of one position of one head: a key and a value.
double bytes_per_position(const ModelInfo& model) {
  constexpr double kBytesPerNumber = 2;
  return kBytesPerNumber * 2 * model.head_dim;
}

}  // namespace

namespace {

double mean_cache_size(const ReplayResult& result, std::span<const float> numbers) {
  if (numbers.empty()) return result.kept.mean_size();
  return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
}

}  // namespace

double mean_kept(const ReplayResult& result) {
  return mean_cache_size(result, result.measures[Measure::cache_size].numbers);
}

double mean_kept(const ReplayResult& result, int layer) {
  const Table& table = result.measures[Measure::cache_size];
  if (table.numbers.empty()) return result.kept.mean_size(layer);
  const std::size_t of_layer = table.numbers.size() / static_cast<std::size_t>(table.shape.front());
  return mean_cache_size(result,
                         std::span(table.numbers).subspan(static_cast<std::size_t>(layer) * of_layer, of_layer));
}

double peak_cache_size(const ReplayResult& result) {
  const std::vector<float>& sizes = result.measures[Measure::cache_size].numbers;
  return sizes.empty() ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(std::ranges::max(sizes));
}

double cache_footprint(const ReplayResult& result) {
  const Table& sizes = result.measures[Measure::cache_size];
  if (sizes.numbers.empty()) return std::numeric_limits<double>::quiet_NaN();
  return mean_kept(result) * static_cast<double>(sizes.shape.back());
}

bool is_measured(const MeasureTraits& measure, const ReplayResult& result) {
  if (measure.measure == Measure::cache_size) return (result.replayed || result.live) && result.scheduled;
  if (measure.over_time) return result.replayed && result.scheduled;
  if (measure.measure == Measure::residual_sum) return result.replayed && result.residual_sum;
  if (!measure.is_of_layers()) return result.live;
  if (measure.measure == Measure::residual_error && !result.residual_norms) return false;
  return result.replayed && (measure.per != MeasureTraits::Per::head || result.rank_agreement);
}

double bytes_per_token(const TraceReplay& replay, const ReplayResult& result) {
  double positions = 0;
  for (const Residency& set : result.kept.sets) positions += static_cast<double>(set.kept().size());
  if (result.scheduled) positions = mean_kept(result) * static_cast<double>(result.kept.sets.size());
  return positions * bytes_per_position(replay.model) / replay.eviction_position;
}

double bytes_per_token_of_capacity(const TraceReplay& replay, const ReplayResult& result) {
  double positions = 0;
  for (const int held : replay.held) {
    const bool asked = result.capacity_request != kAllPositions;
    const int granted = asked ? CapacityRequest::parse(result.capacity_request).resolve(held) : result.capacity;
    positions += std::min(granted, held);
  }
  return positions * replay.model.num_key_value_heads * bytes_per_position(replay.model) / replay.eviction_position;
}

void allocate_tables(TraceReplay& replay) {
  for (ReplayResult& result : replay.results) {
    for (const MeasureTraits& measure : measures()) {
      if (!is_measured(measure, result)) continue;
      result.measures[measure.measure] =
          Table::of_shape(table_shape(measure, replay.model.num_layers, replay.extent()));
    }
  }
}

void store_layer(TraceReplay& replay, int layer, std::vector<LayerResult> results) {
  for (std::size_t i = 0; i < results.size(); ++i) {
    ReplayResult& result = replay.results[i];
    for (const MeasureTraits& measure : measures()) {
      const std::vector<float>& numbers = results[i].measures[measure.measure];
      if (result.measures[measure.measure].numbers.empty()) continue;
      std::ranges::copy(numbers, result.measures[measure.measure].numbers.begin() +
                                     layer * static_cast<std::ptrdiff_t>(numbers.size()));
    }
    std::ranges::move(results[i].kept, std::back_inserter(result.kept.sets));
  }
}

void note_outputs(TraceReplay& replay, std::span<const double> errors) {
  if (std::string warning = outputs_warning(errors); !warning.empty()) replay.notes.push_back(std::move(warning));
}

void settle_capacities(TraceReplay& replay) {
  for (ReplayResult& result : replay.results) {
    if (result.kept.sets.empty()) continue;  // a running model's are yet to come
    // A pattern with a capacity of its own is compared with those that were asked for as many positions.
    const double kept = result.kept.mean_size();
    const double held = std::accumulate(replay.held.begin(), replay.held.end(), 0.0);
    if (result.capacity_request != kAllPositions || kept * replay.model.num_layers == held) continue;
    result.capacity = static_cast<int>(std::lround(kept));
    result.capacity_request = fmt::format("{}", result.capacity);
  }
}

bool is_frozen_on_prompt(const Residency& cache, int held) {
  if (cache.is_one_eviction() || std::ssize(cache.kept()) == held) return false;
  const std::vector<int> last = {Residency::kNever};
  return cache.kept_at_each(0, Residency::kNever, last).front() == static_cast<int>(cache.kept().size());
}

void note_frozen_caches(TraceReplay& replay, std::vector<bool> frozen) {
  if (frozen.empty()) {
    for (const ReplayResult& result : replay.results) {
      bool everywhere = result.scheduled;
      for (std::size_t set = 0; everywhere && set < result.kept.sets.size(); ++set) {
        const std::size_t layer = set / static_cast<std::size_t>(result.kept.sets_per_layer);
        everywhere = is_frozen_on_prompt(result.kept.sets[set], replay.held[layer]);
      }
      frozen.push_back(everywhere);
    }
  }
  SettingNames names;
  for (std::size_t i = 0; i < frozen.size(); ++i) {
    if (frozen[i]) names.add(replay.results[i].policy, replay.results[i].capacity_request);
  }
  if (names.count() == 0) return;
  replay.notes.push_back(
      fmt::format("frozen on the prompt: {}: no position of the prompt ever went, and only what was generated did; "
                  "protect recent positions, as +protect(last=32) does",
                  names.text()));
}

}  // namespace kvreplay
