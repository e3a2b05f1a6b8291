#include "replay/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "replay/engine.h"

namespace kvreplay {

ReplayRequest make_request(const std::vector<std::string>& specs, const std::vector<std::string>& capacities,
                           std::optional<Granularity> granularity) {
  ReplayRequest request;
  for (const std::string& spec : specs) request.policies.push_back(make_policy(spec));
  for (const std::string& capacity : capacities) request.capacities.push_back(CapacityRequest::parse(capacity));
  request.granularity = granularity;
  return request;
}

Table Table::of_shape(std::vector<Index> shape) {
  const Index size = std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
  return {std::move(shape), std::vector<float>(static_cast<std::size_t>(size), 0.0f)};
}

const std::vector<int>& KeptSets::of_query_head(int layer, int query_head, int group_size) const {
  const int set = granularity == Granularity::query ? query_head : query_head / group_size;
  return sets[static_cast<std::size_t>(layer * sets_per_layer + set)];
}

double KeptSets::mean_size() const {
  double positions = 0;
  for (const std::vector<int>& set : sets) positions += static_cast<double>(set.size());
  return positions / static_cast<double>(sets.size());
}

double KeptSets::mean_size(int layer) const {
  double positions = 0;
  for (int set = layer * sets_per_layer; set < (layer + 1) * sets_per_layer; ++set) {
    positions += static_cast<double>(sets[static_cast<std::size_t>(set)].size());
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

double bytes_per_token(const TraceReplay& replay, const ReplayResult& result) {
  double positions = 0;
  for (const std::vector<int>& set : result.kept.sets) positions += static_cast<double>(set.size());
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

std::vector<TraceReplay> replay(const ReplayEngine& engine, const std::function<void(double)>& progress) {
  std::vector<TraceReplay> replays = engine.outlines();
  for (TraceReplay& replay : replays) allocate_tables(replay);
  std::vector<std::vector<double>> output_errors(replays.size());
  const std::vector<ReplayUnit> units = engine.units();
  std::size_t finished = 0;
  engine.run(units, [&](const ReplayUnit& unit, std::vector<LayerResult> results) {
    output_errors[static_cast<std::size_t>(unit.replay)].push_back(
        static_cast<double>(results.front().output_error.front()));
    store_layer(replays[static_cast<std::size_t>(unit.replay)], unit.layer, std::move(results));
    if (progress) progress(static_cast<double>(++finished) / static_cast<double>(units.size()));
  });
  for (std::size_t r = 0; r < replays.size(); ++r) {
    note_outputs(replays[r], output_errors[r]);
    settle_capacities(replays[r]);
  }
  return replays;
}

std::vector<TraceReplay> replay(std::span<const TraceReader> traces, const ReplayRequest& request,
                                const std::function<void(double)>& progress) {
  return replay(ReplayEngine(traces, request), progress);
}

std::vector<TraceReplay> replay(const TraceReader& trace, const ReplayRequest& request) {
  return replay(std::span(&trace, 1), request);
}

}  // namespace kvreplay
