#include "replay/replay.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <span>
#include <utility>

namespace kvreplay {

namespace {

// Adds up what the layers of one replay change in the residual stream, in their order.
class ChangeSums {
 public:
  explicit ChangeSums(const TraceReplay& replay) : sums_(replay.results.size()) {}

  void add(std::vector<LayerResult>& layer) {
    for (std::size_t i = 0; i < layer.size(); ++i) {
      if (sums_[i].empty()) {
        sums_[i] = std::move(layer[i].change);
        continue;
      }
      for (std::size_t n = 0; n < layer[i].change.size(); ++n) sums_[i][n] += layer[i].change[n];
      layer[i].change = {};
    }
  }

  // Fills the measures of the whole stream, once all layers were added.
  void measure(const CapturedRun& run, TraceReplay& replay) const {
    const auto queries = static_cast<std::size_t>(replay.extent().queries);
    const auto channels = static_cast<std::size_t>(replay.model.hidden_size);
    const auto first = static_cast<std::size_t>(evaluation_queries(run.info(), replay.eviction()).first);
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      if (!replay.results[i].residual_sum) continue;
      for (std::size_t query = 0; query < queries; ++query) {
        double squares = 0;
        for (const float change : std::span(sums_[i]).subspan(query * channels, channels)) {
          squares += static_cast<double>(change) * static_cast<double>(change);
        }
        const StreamOutcome outcome{
            .change = std::sqrt(squares),
            .residual = static_cast<double>(run.info().layers.back().residual_norm[first + query])};
        for (const auto& [measure, calculate] : formulas<StreamOutcome>()) {
          replay.results[i].measures[measure].numbers[query] = static_cast<float>(calculate(outcome));
        }
      }
    }
  }

 private:
  std::vector<std::vector<float>> sums_;  // [setting]: [E, C]
};

}  // namespace

std::vector<TraceReplay> replay(const ReplayEngine& engine, const std::function<void(double)>& progress) {
  std::vector<TraceReplay> replays = engine.outlines();
  for (TraceReplay& replay : replays) allocate_tables(replay);
  std::vector<ChangeSums> changes(replays.begin(), replays.end());
  std::vector<std::vector<double>> output_errors(replays.size());
  const std::vector<ReplayUnit> units = engine.units();
  std::size_t finished = 0;
  engine.run(units, [&](const ReplayUnit& unit, std::vector<LayerResult> results) {
    output_errors[static_cast<std::size_t>(unit.replay)].push_back(static_cast<double>(results.front().output_error));
    changes[static_cast<std::size_t>(unit.replay)].add(results);
    store_layer(replays[static_cast<std::size_t>(unit.replay)], unit.layer, std::move(results));
    if (progress) progress(static_cast<double>(++finished) / static_cast<double>(units.size()));
  });
  for (std::size_t r = 0; r < replays.size(); ++r) {
    changes[r].measure(engine.run_of(static_cast<int>(r)), replays[r]);
    note_outputs(replays[r], output_errors[r]);
    settle_capacities(replays[r]);
    note_frozen_caches(replays[r]);
  }
  return replays;
}

std::vector<TraceReplay> decide(const ReplayEngine& engine, const std::function<void(double)>& progress) {
  std::vector<TraceReplay> replays = engine.outlines();
  for (TraceReplay& replay : replays) {
    for (ReplayResult& result : replay.results) result.replayed = false;
  }
  const std::vector<ReplayUnit> units = engine.units();
  std::size_t finished = 0;
  engine.decide(units, [&](const ReplayUnit& unit, std::vector<LayerResidencies> sets) {
    std::vector<ReplayResult>& results = replays[static_cast<std::size_t>(unit.replay)].results;
    for (std::size_t i = 0; i < sets.size(); ++i) std::ranges::move(sets[i], std::back_inserter(results[i].kept.sets));
    if (progress) progress(static_cast<double>(++finished) / static_cast<double>(units.size()));
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
