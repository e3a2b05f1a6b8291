#include "sweep/sweep.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "base/matrix.h"
#include "base/parallel.h"
#include "hdf5/cache.h"

namespace kvreplay {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Leaves the engine's loop; never seen outside this file.
struct Stopped {};

// Both parts of a unit's cost in one number: at this many operations in the time of a byte.
double weight_of(const Work& work) {
  constexpr double kOperationsPerByte = 10;
  return work.operations + kOperationsPerByte * work.bytes;
}

}  // namespace

Work cost_of(const ReplayEngine& engine, std::span<const ReplayUnit> units) {
  Work sum;
  for (const ReplayUnit& unit : units) {
    const Work work = engine.cost(unit);
    sum.bytes += work.bytes;
    sum.operations += work.operations;
  }
  return sum;
}

double Speed::seconds(const Work& work) const {
  return work.bytes / bytes_per_second + work.operations / operations_per_second;
}

Speed guess_speed() {
  constexpr double kDuration = 0.1;
  constexpr double kDiskBytesPerSecond = 5e8;
  // A replay does more than products: exponentials, gathering of rows, selection.
  constexpr double kShareOfProducts = 0.25;
  constexpr Index kQueries = 64;
  constexpr Index kHeadDim = 128;
  constexpr Index kTokens = 1024;
  const int threads = omp_get_max_threads();
  std::vector<double> operations(static_cast<std::size_t>(threads), 0);
  std::vector<float> sink(static_cast<std::size_t>(threads), 0);
  const double started = now();
  parallel_for(threads, [&](int thread) {
    const Matrix queries = Matrix::Constant(kQueries, kHeadDim, 0.5f);
    const Matrix keys = Matrix::Constant(kTokens, kHeadDim, 0.25f);
    Matrix logits(kQueries, kTokens);
    const auto t = static_cast<std::size_t>(thread);
    while (now() - started < kDuration) {
      logits.noalias() = queries * keys.transpose();
      sink[t] += logits(0, 0);
      operations[t] += 2.0 * kQueries * kHeadDim * kTokens;
    }
  });
  const double seconds = now() - started;
  const double done = std::accumulate(operations.begin(), operations.end(), 0.0);
  return {kDiskBytesPerSecond, std::max(1e9, kShareOfProducts * done / seconds)};
}

Index memory_of_storing(const std::vector<TraceReplay>& outlines) {
  Index most = 0;
  for (const TraceReplay& outline : outlines) {
    Index bytes = 0;
    for (const ReplayResult& result : outline.results) {
      const auto sets = static_cast<Index>(result.kept.sets_per_layer);
      bytes += sets *
               (result.most_kept * static_cast<Index>(sizeof(std::int32_t)) + static_cast<Index>(sizeof(std::int64_t)));
    }
    most = std::max(most, bytes);
  }
  return most + hdf5::kFileMemory;
}

std::vector<std::vector<ReplayUnit>> divide_units(const ReplayEngine& engine, std::span<const ReplayUnit> units,
                                                  int processes) {
  struct Weighed {
    double weight = 0;
    double of_layer = 0;  // the largest weight among the units before and after it that are of the same layer
    std::size_t place = 0;
  };
  std::vector<Weighed> weighed;
  for (std::size_t first = 0; first < units.size();) {
    const std::size_t begin = first;
    double most = 0;
    for (; first < units.size() && units[first].layer == units[begin].layer; ++first) {
      weighed.push_back({.weight = weight_of(engine.cost(units[first])), .place = first});
      most = std::max(most, weighed.back().weight);
    }
    for (std::size_t i = begin; i < first; ++i) weighed[i].of_layer = most;
  }
  std::ranges::stable_sort(weighed, std::greater<>(), &Weighed::weight);
  std::vector<std::vector<Weighed>> parts(static_cast<std::size_t>(processes));
  std::vector<double> loads(parts.size(), 0);
  for (const Weighed& each : weighed) {
    const auto least = static_cast<std::size_t>(std::ranges::min_element(loads) - loads.begin());
    parts[least].push_back(each);
    loads[least] += each.weight;
  }
  std::vector<std::vector<ReplayUnit>> divided;
  for (std::vector<Weighed>& part : parts) {
    std::ranges::sort(part, {}, [](const Weighed& each) { return std::pair(-each.of_layer, each.place); });
    std::vector<ReplayUnit>& of_process = divided.emplace_back();
    for (const Weighed& each : part) of_process.push_back(units[each.place]);
  }
  return divided;
}

namespace {

// Of the outlines of some units, those whose layers are surveyed.
std::set<int> surveyed(const ReplayEngine& engine, std::span<const ReplayUnit> units) {
  std::set<int> replays;
  for (const ReplayUnit& unit : units) {
    if (engine.surveys(unit.replay)) replays.insert(unit.replay);
  }
  return replays;
}

int layers_of(const ReplayEngine& engine, int replay) {
  return engine.outlines()[static_cast<std::size_t>(replay)].model.num_layers;
}

}  // namespace

void survey_layers(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store, int rank,
                   int ranks) {
  int place = 0;
  for (const int replay : surveyed(engine, units)) {
    for (int layer = 0; layer < layers_of(engine, replay); ++layer) {
      const ReplayUnit unit{replay, layer};
      if (place++ % ranks == rank && !store.read_survey(unit)) store.save_survey(unit, engine.survey(unit));
    }
  }
}

void give_surveys(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store) {
  for (const int replay : surveyed(engine, units)) {
    std::vector<std::vector<LayerSurvey>> layers;
    for (int layer = 0; layer < layers_of(engine, replay); ++layer) {
      auto stored = store.read_survey({replay, layer});
      // Where it was lost in between it is found out once more.
      layers.push_back(stored ? std::move(*stored) : engine.survey({replay, layer}));
    }
    engine.give_surveys(replay, layers);
  }
}

void run_units(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store,
               const std::function<bool(const ReplayUnit&)>& stored) {
  try {
    engine.run(units, [&](const ReplayUnit& unit, const std::vector<LayerResult>& results) {
      store.save(unit, results);
      if (!stored(unit)) throw Stopped();
    });
  } catch (const Stopped&) {
    // What is not done yet is not wanted any more.
  }
}

}  // namespace kvreplay
