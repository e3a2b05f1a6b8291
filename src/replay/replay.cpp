#include "replay/replay.h"

namespace kvreplay {

std::vector<TraceReplay> replay(const ReplayEngine& engine, const std::function<void(double)>& progress) {
  std::vector<TraceReplay> replays = engine.outlines();
  for (TraceReplay& replay : replays) allocate_tables(replay);
  std::vector<std::vector<double>> output_errors(replays.size());
  const std::vector<ReplayUnit> units = engine.units();
  std::size_t finished = 0;
  engine.run(units, [&](const ReplayUnit& unit, std::vector<LayerResult> results) {
    output_errors[static_cast<std::size_t>(unit.replay)].push_back(static_cast<double>(results.front().output_error));
    store_layer(replays[static_cast<std::size_t>(unit.replay)], unit.layer, std::move(results));
    if (progress) progress(static_cast<double>(++finished) / static_cast<double>(units.size()));
  });
  for (std::size_t r = 0; r < replays.size(); ++r) {
    note_outputs(replays[r], output_errors[r]);
    settle_capacities(replays[r]);
  }
  return replays;
}

std::vector<TraceReplay> decide(const ReplayEngine& engine) {
  std::vector<TraceReplay> replays = engine.outlines();
  for (TraceReplay& replay : replays) {
    for (ReplayResult& result : replay.results) result.replayed = false;
  }
  engine.decide(engine.units(), [&replays](const ReplayUnit& unit, std::vector<LayerSets> sets) {
    std::vector<ReplayResult>& results = replays[static_cast<std::size_t>(unit.replay)].results;
    for (std::size_t i = 0; i < sets.size(); ++i) {
      for (std::vector<int>& kept : sets[i]) results[i].kept.sets.emplace_back(std::move(kept));
    }
  });
  for (TraceReplay& replay : replays) settle_capacities(replay);
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
