#include "analysis/made_results.h"

#include <numeric>

#include "replay/results_file.h"

namespace kvreplay::test {

TraceReplay MadeReplay::replay() const {
  TraceReplay replay;
  replay.trace = trace;
  replay.trace_digest = digest.empty() ? "digest of " + trace : digest;
  replay.model.name = "made";
  replay.model.num_layers = layers;
  replay.model.num_attention_heads = query_heads;
  replay.model.num_key_value_heads = kv_heads;
  replay.prompt_length = eviction_position;
  replay.eviction_position = eviction_position;
  replay.held.assign(static_cast<std::size_t>(layers), eviction_position);
  replay.evaluation_positions.resize(static_cast<std::size_t>(queries));
  replay.evaluate_from = evaluate_from < 0 ? eviction_position : evaluate_from;
  std::iota(replay.evaluation_positions.begin(), replay.evaluation_positions.end(), replay.evaluate_from);
  replay.spans = spans;
  replay.notes = notes;
  return replay;
}

ReplayResult& add_result(TraceReplay& replay, const std::string& policy, int capacity, const MadeNumbers& layer_error,
                         const MadeNumbers& head_error) {
  ReplayResult& result = replay.results.emplace_back();
  const int layers = replay.model.num_layers;
  const int heads = replay.model.num_attention_heads;
  const auto queries = static_cast<int>(replay.evaluation_positions.size());
  result.trace = replay.trace;
  result.policy = policy;
  result.capacity = capacity > 0 ? capacity : replay.eviction_position;
  result.capacity_request = capacity > 0 ? std::to_string(capacity) : std::string(kAllPositions);
  result.eviction_position = replay.eviction_position;
  result.oracle = policy.starts_with("oracle");
  result.kept.sets_per_layer = replay.model.num_key_value_heads;
  std::vector<int> kept(static_cast<std::size_t>(result.capacity));
  std::iota(kept.begin(), kept.end(), 0);
  result.kept.sets.assign(static_cast<std::size_t>(layers * result.kept.sets_per_layer), Residency(kept));
  result.measures[Measure::layer_error].shape = {layers, queries};
  for (int layer = 0; layer < layers; ++layer) {
    for (int query = 0; query < queries; ++query) {
      result.measures[Measure::layer_error].numbers.push_back(static_cast<float>(layer_error(layer, -1, query)));
    }
  }
  if (!head_error) return result;
  result.measures[Measure::head_error].shape = {layers, heads, queries};
  for (int layer = 0; layer < layers; ++layer) {
    for (int head = 0; head < heads; ++head) {
      for (int query = 0; query < queries; ++query) {
        result.measures[Measure::head_error].numbers.push_back(static_cast<float>(head_error(layer, head, query)));
      }
    }
  }
  return result;
}

void add_loss(ReplayResult& result, const std::function<double(int query)>& divergence) {
  Table& table = result.measures[Measure::kl];
  const Index queries = result.measures[Measure::layer_error].shape.at(1);
  table.shape = {queries};
  for (int query = 0; query < queries; ++query) table.numbers.push_back(static_cast<float>(divergence(query)));
  result.live = true;
}

void remove_layers(ReplayResult& result) {
  for (const MeasureTraits& measure : measures()) {
    if (measure.is_of_layers()) result.measures[measure.measure] = {};
  }
  result.replayed = false;
}

void write_made(const std::filesystem::path& path, const std::vector<TraceReplay>& replays) {
  write_results(path, replays, {});
}

}  // namespace kvreplay::test
