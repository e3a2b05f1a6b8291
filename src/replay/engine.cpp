#include "replay/engine.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "base/error.h"
#include "base/parallel.h"
#include "replay/evaluation.h"
#include "replay/measurement.h"
#include "replay/selection.h"

namespace kvreplay {
namespace {

float span_recall(const std::vector<int>& kept, const Span& span, int eviction_position) {
  const int end = std::min(span.end, eviction_position);
  const auto first = std::ranges::lower_bound(kept, span.start);
  const auto last = std::ranges::lower_bound(kept, end);
  return static_cast<float>(last - first) / static_cast<float>(end - span.start);
}

TraceReplay prepare(const TraceReader& trace, int eviction_position) {
  const TraceInfo& info = trace.info();
  TraceReplay replay;
  replay.trace = trace.path().string();
  replay.model = info.model;
  replay.prompt_length = info.prompt_length;
  replay.eviction_position = eviction_position;
  if (eviction_position < 1 || eviction_position > info.num_tokens()) {
    throw Error(fmt::format("{}: eviction position {} is outside the trace's {} tokens", replay.trace,
                            eviction_position, info.num_tokens()));
  }
  const auto positions = evaluation_queries(info, eviction_position).positions;
  replay.evaluation_positions.assign(positions.begin(), positions.end());
  if (replay.evaluation_positions.empty()) {
    throw Error(fmt::format(
        "{}: no query at or after position {} was captured, so there is nothing to evaluate; capture with --generate 2 "
        "or more, or evict earlier with --evict-at",
        replay.trace, eviction_position));
  }
  for (const Span& span : info.spans) {
    if (span.start < eviction_position && span.end > span.start) replay.spans.push_back(span);
  }
  return replay;
}

// A result of the outline: what the setting is, without numbers.
ReplayResult outline_of(const Setting& setting, const TraceReplay& replay) {
  ReplayResult result;
  result.trace = replay.trace;
  result.policy = setting.policy->canonical;
  result.capacity_request = setting.capacity_request;
  result.capacity = setting.capacity;
  result.eviction_position = replay.eviction_position;
  result.granularity = setting.granularity;
  result.share = setting.share;
  result.oracle = setting.policy->oracle;
  result.kept.granularity = setting.granularity == Granularity::query ? Granularity::query : Granularity::kv;
  result.kept.sets_per_layer = replay.model.num_key_value_heads * setting.sets_per_kv_head(replay.model);
  return result;
}

// A layer's measures and kept sets of one setting as they are handed out.
LayerResult result_of(LayerSets kept, const LayerMeasures& measures, const TraceReplay& replay) {
  LayerResult result;
  const int heads = replay.model.num_attention_heads;
  for (int head = 0; head < heads; ++head) {
    const HeadMeasures& found = measures.heads[static_cast<std::size_t>(head)];
    std::ranges::copy(found.head_error, std::back_inserter(result.head_error));
    std::ranges::copy(found.attention_recall, std::back_inserter(result.attention_recall));
    std::ranges::copy(found.cosine, std::back_inserter(result.cosine));
    const bool per_query_head = static_cast<int>(kept.size()) == heads;
    const auto set = static_cast<std::size_t>(per_query_head ? head : head / replay.model.group_size());
    for (const Span& span : replay.spans) {
      result.span_recall.push_back(span_recall(kept[set], span, replay.eviction_position));
    }
  }
  result.layer_error = measures.layer_error;
  result.kept = std::move(kept);
  return result;
}

}  // namespace

ReplayEngine::ReplayEngine(std::span<const TraceReader> traces, ReplayRequest request)
    : traces_(traces), request_(std::move(request)) {
  for (std::size_t t = 0; t < traces_.size(); ++t) {
    std::vector<int> evictions = request_.eviction_positions;
    if (evictions.empty()) evictions.push_back(traces_[t].info().prompt_length);
    for (const int eviction : evictions) {
      TraceReplay& outline = outlines_.emplace_back(prepare(traces_[t], eviction));
      settings_.push_back(settings_for(traces_[t], request_, eviction, outline.notes));
      for (const Setting& setting : settings_.back()) outline.results.push_back(outline_of(setting, outline));
      trace_of_outline_.push_back(t);
    }
  }
}

std::vector<ReplayUnit> ReplayEngine::units() const {
  std::vector<ReplayUnit> units;
  for (std::size_t r = 0; r < outlines_.size(); ++r) {
    for (int layer = 0; layer < outlines_[r].model.num_layers; ++layer) units.push_back({static_cast<int>(r), layer});
  }
  return units;
}

Work ReplayEngine::cost(const ReplayUnit& unit) const {
  const TraceReplay& outline = outlines_[static_cast<std::size_t>(unit.replay)];
  const ModelInfo& model = outline.model;
  const double tokens = outline.evaluation_positions.back() + 1;
  const double heads = model.num_attention_heads;
  const double head_dim = model.head_dim;
  const auto queries = static_cast<double>(outline.evaluation_positions.size());
  const auto settings = static_cast<double>(outline.results.size());
  const auto stored = static_cast<double>(size_of(trace_of(unit).stored_tensors().front().type));
  Work work;
  work.bytes = (2 * model.num_key_value_heads * tokens + heads * queries) * head_dim * stored;
  work.operations = 4 * heads * queries * tokens * head_dim;  // full attention of the evaluation queries
  for (const ReplayResult& result : outline.results) {
    work.operations += 4 * heads * queries * (result.capacity + queries) * head_dim;
  }
  if (trace_of(unit).has_output_projection(unit.layer)) {
    work.bytes += heads * head_dim * model.hidden_size * stored;
    work.operations += 2 * settings * queries * heads * head_dim * model.hidden_size;
  }
  return work;
}

Index ReplayEngine::memory() const { return memory_; }

void ReplayEngine::limit_memory(Index bytes) { memory_ = std::min(memory_, bytes); }

const TraceReader& ReplayEngine::trace_of(const ReplayUnit& unit) const {
  return traces_[trace_of_outline_[static_cast<std::size_t>(unit.replay)]];
}

// The fewest units whose heads keep all threads busy to the end, or nearly.
std::size_t ReplayEngine::units_at_once(std::span<const ReplayUnit> units) const {
  constexpr double kBusyEnough = 0.95;
  const auto threads = static_cast<std::size_t>(omp_get_max_threads());
  std::size_t heads = 0;
  std::size_t count = 0;
  while (count < units.size()) {
    heads +=
        static_cast<std::size_t>(outlines_[static_cast<std::size_t>(units[count].replay)].model.num_key_value_heads);
    ++count;
    const std::size_t rounds = (heads + threads - 1) / threads;
    if (static_cast<double>(heads) >= kBusyEnough * static_cast<double>(rounds * threads)) break;
  }
  return count;
}

void ReplayEngine::run(std::span<const ReplayUnit> units,
                       const std::function<void(const ReplayUnit&, std::vector<LayerResult>)>& done) const {
  while (!units.empty()) {
    const std::span<const ReplayUnit> group = units.first(units_at_once(units));
    units = units.subspan(group.size());
    std::vector<LayerSelection> selections;
    std::vector<std::pair<int, int>> heads;     // (index in the group, KV head)
    std::vector<std::pair<int, int>> settings;  // (index in the group, setting)
    for (std::size_t i = 0; i < group.size(); ++i) {
      const auto replay = static_cast<std::size_t>(group[i].replay);
      const TraceReplay& outline = outlines_[replay];
      selections.emplace_back(trace_of(group[i]), settings_[replay], group[i].layer, outline.eviction_position);
      for (int head = 0; head < outline.model.num_key_value_heads; ++head) heads.emplace_back(i, head);
      for (std::size_t s = 0; s < settings_[replay].size(); ++s) settings.emplace_back(i, static_cast<int>(s));
    }
    parallel_for(static_cast<int>(heads.size()), [&](int i) {
      const auto [unit, head] = heads[static_cast<std::size_t>(i)];
      selections[static_cast<std::size_t>(unit)].rank_head(head);
    });
    parallel_for(static_cast<int>(settings.size()), [&](int i) {
      const auto [unit, setting] = settings[static_cast<std::size_t>(i)];
      selections[static_cast<std::size_t>(unit)].select_together(setting);
    });
    for (std::size_t i = 0; i < group.size(); ++i) {
      const auto replay = static_cast<std::size_t>(group[i].replay);
      const TraceReplay& outline = outlines_[replay];
      const TraceReader& trace = trace_of(group[i]);
      std::vector<LayerSets> kept = selections[i].take();
      improve_oracles(trace, group[i].layer, outline.eviction_position, settings_[replay], kept);
      std::vector<const LayerSets*> all;
      for (const LayerSets& sets : kept) all.push_back(&sets);
      const std::vector<LayerMeasures> measures = measure_layer(trace, group[i].layer, outline.eviction_position, all);
      std::vector<LayerResult> results;
      for (std::size_t s = 0; s < kept.size(); ++s) {
        results.push_back(result_of(std::move(kept[s]), measures[s], outline));
      }
      done(group[i], std::move(results));
    }
  }
}

void allocate_tables(TraceReplay& replay) {
  const auto layers = static_cast<Index>(replay.model.num_layers);
  const auto heads = static_cast<Index>(replay.model.num_attention_heads);
  const auto queries = static_cast<Index>(replay.evaluation_positions.size());
  for (ReplayResult& result : replay.results) {
    result.head_error = Table::of_shape({layers, heads, queries});
    result.layer_error = Table::of_shape({layers, queries});
    result.attention_recall = Table::of_shape({layers, heads, queries});
    result.cosine = Table::of_shape({layers, heads, queries});
    result.span_recall = Table::of_shape({layers, heads, static_cast<Index>(replay.spans.size())});
  }
}

void store_layer(TraceReplay& replay, int layer, std::vector<LayerResult> results) {
  const auto put = [layer](const std::vector<float>& numbers, Table& table) {
    std::ranges::copy(numbers, table.numbers.begin() + layer * static_cast<std::ptrdiff_t>(numbers.size()));
  };
  for (std::size_t i = 0; i < results.size(); ++i) {
    ReplayResult& result = replay.results[i];
    put(results[i].head_error, result.head_error);
    put(results[i].layer_error, result.layer_error);
    put(results[i].attention_recall, result.attention_recall);
    put(results[i].cosine, result.cosine);
    put(results[i].span_recall, result.span_recall);
    std::ranges::move(results[i].kept, std::back_inserter(result.kept.sets));
  }
}

void settle_capacities(TraceReplay& replay) {
  for (ReplayResult& result : replay.results) {
    // A pattern with a capacity of its own is compared with those that were asked for as many positions.
    const double kept = result.kept.mean_size();
    if (result.capacity_request != kAllPositions || kept == replay.eviction_position) continue;
    result.capacity = static_cast<int>(std::lround(kept));
    result.capacity_request = fmt::format("{}", result.capacity);
  }
}

}  // namespace kvreplay
