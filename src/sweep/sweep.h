// The units of a sweep: how much there is, who does which, and doing them.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "replay/engine.h"
#include "sweep/unit_store.h"

namespace kvreplay {

/// What all of `units` take together.
Work cost_of(const ReplayEngine& engine, std::span<const ReplayUnit> units);

/// How fast something works.
struct Speed {
  double bytes_per_second = 0;
  double operations_per_second = 0;

  /// Seconds that `work` takes: reading and calculating one after the other.
  double seconds(const Work& work) const;
};

/// What this machine does with OpenMP's threads, from products of matrices of a replay's shape that take a tenth of a
/// second. A guess until the first units tell.
Speed guess_speed();

/// Memory that a unit's results take while they are stored, beside themselves, in bytes: of the unit that has most.
Index memory_of_storing(const std::vector<TraceReplay>& outlines);

/// Divides units among processes: the largest first, each to the process that has least to do. Depends on nothing but
/// the units' cost. Within a process the largest come first, but units of one layer that follow each other, and so may
/// share work, stay together.
std::vector<std::vector<ReplayUnit>> divide_units(const ReplayEngine& engine, std::span<const ReplayUnit> units,
                                                  int processes);

/// Finds out what budgets that divide positions over all layers have to know of the layers of `units`, and stores it:
/// process `rank` of `ranks` does its share of what is not there yet. Throws Error.
void survey_layers(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store, int rank,
                   int ranks);

/// Once all processes did: gives the engine what is stored for `units`. Throws Error.
void give_surveys(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store);

/// Replays `units` and stores each as soon as it is done; then calls `stored`, which says whether to go on. Throws
/// Error; what was stored stays.
void run_units(const ReplayEngine& engine, std::span<const ReplayUnit> units, const UnitStore& store,
               const std::function<bool(const ReplayUnit&)>& stored);

}  // namespace kvreplay
