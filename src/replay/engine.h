// The replay of many settings over many traces, layer by layer.
#pragma once

#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/work.h"
#include "policy/decision.h"
#include "policy/decoding.h"
#include "replay/request.h"
#include "replay/resolution.h"
#include "replay/result.h"
#include "trace/captured_run.h"
#include "trace/reader.h"

namespace kvreplay {

class LayerProjection;

/// One layer of one trace at one eviction position: what is done, stored and resumed as a whole.
struct ReplayUnit {
  int replay = 0;  ///< index among the engine's outlines
  int layer = 0;

  auto operator<=>(const ReplayUnit&) const = default;
};

/// What is said of a trace.
struct TraceNote {
  std::string trace;
  std::string note;
};

/// Replays a request over traces. Heads of a unit, and units, are spread over OpenMP's threads, whole units where kept
/// sets are refined; results are the same bits for any number of them, for any order and division of the
/// units, and whatever other policies are replayed with a policy (but for those that are refined, which may start
/// from them).
class ReplayEngine {
 public:
  /// Looks at everything that can be wrong before any work. What cannot be replayed is left out, which the notes of an
  /// outline tell, or left_out() where there is no outline to tell it: a capacity below what a policy protects, a need
  /// that a trace does not hold, an eviction that has nothing to be evaluated on. Throws Error where nothing is left,
  /// and for strict requests where anything would be left out. The runs must outlive the engine.
  ReplayEngine(std::vector<const CapturedRun*> runs, ReplayRequest request);

  /// The same for traces in files.
  ReplayEngine(std::span<const TraceReader> traces, ReplayRequest request);
  ReplayEngine(const ReplayEngine&) = delete;
  ReplayEngine& operator=(const ReplayEngine&) = delete;

  /// What will be replayed, traces in the order given, eviction positions within: everything of a TraceReplay but kept
  /// sets and numbers.
  const std::vector<TraceReplay>& outlines() const { return outlines_; }

  /// The settings of an outline's results, in their order, for as long as the engine lives.
  std::span<const Setting> settings(int replay) const { return settings_[static_cast<std::size_t>(replay)]; }

  /// What was asked of traces and is in no outline.
  const std::vector<TraceNote>& left_out() const { return left_out_; }

  /// Every layer of every outline, in order; of outlines that share what is calculated of their output projections,
  /// layer by layer of all of them, since units that follow each other share it.
  std::vector<ReplayUnit> units() const;

  /// The run that an outline is of.
  const CapturedRun& run_of(int replay) const { return *traces_[trace_of_outline_[static_cast<std::size_t>(replay)]]; }

  /// What a unit takes that shares nothing: bytes of the trace that are read, floating-point operations.
  Work cost(const ReplayUnit& unit) const;

  /// Whether budgets divide positions over all layers of an outline, by what they find out about each first.
  bool surveys(int replay) const;

  /// What they find out about a layer: of every setting, and nothing for those whose budget does not survey. Throws
  /// Error as run() does.
  std::vector<LayerSurvey> survey(const ReplayUnit& unit) const;

  /// Takes what survey() gave for every layer of an outline, [L][setting]. What is not given run() and decide() find
  /// out themselves.
  void give_surveys(int replay, const std::vector<std::vector<LayerSurvey>>& layers) const;

  /// The most memory that run() takes at once with OpenMP's present number of threads, in bytes: beside what the
  /// process holds before it, and without results that were handed out.
  Index memory() const;

  /// The smallest limit that limit_memory() takes.
  Index least_memory() const;

  /// Works in smaller pieces, or on fewer heads at once, where `bytes` would be exceeded. Throws Error, naming what it
  /// takes at least, where that cannot be done.
  void limit_memory(Index bytes);

  /// Does `units`, and calls `done` on the calling thread for each, in their order, with a result per setting of the
  /// outline. Throws Error on damage and on NaN; what was done before stays done.
  void run(std::span<const ReplayUnit> units,
           const std::function<void(const ReplayUnit&, std::vector<LayerResult>)>& done) const;

  /// Draws kept sets alone, without measuring what they do; `done` receives them, LayerResidencies per setting.
  void decide(std::span<const ReplayUnit> units,
              const std::function<void(const ReplayUnit&, std::vector<LayerResidencies>)>& done) const;

 private:
  // How work is divided so that it fits into memory.
  struct Plan {
    int heads_at_once = 1;        // by as many threads
    int rounds = 1;               // of them that the layers of a group make at least
    Index combination_bytes = 0;  // per head that is ranked
    Index settings_at_once = 1;   // that are measured together
    int layers_apart = 1;         // layers that are refined at once, by as many threads
    Index memory = 0;
    bool fits = true;
  };

  // What the settings of an outline add up to in layers that hold as many positions, counted once: costs and plans are
  // asked for again and again.
  struct Sums {
    RankingRequirements asked;
    double capacities = 0;         // of all settings
    double compared = 0;           // settings with rank agreement
    bool looks_ahead = false;      // oracles: at what the evaluation queries attend to
    double refining = 0;           // operations of refinements, in a layer
    Index refining_bytes = 0;      // of one, while it works
    Index layer_bytes = 0;         // of a layer's results while they are made
    Index head_bytes = 0;          // of a head that is ranked, combinations excepted
    Index setting_bytes = 0;       // of a setting whose heads are put together
    Index decoding_bytes = 0;      // of what is decoded at a time, a head or a layer
    Index least_combinations = 0;  // bytes
    Index all_combinations = 0;    // bytes
  };

  // By what layers hold, of every setting: the surveys of the layers that hold as much.
  using AlikeSurveys = std::map<int, std::vector<std::vector<LayerSurvey>>>;

  std::vector<std::span<const LayerSurvey>> surveys_of(const ReplayUnit& unit) const;
  void complete_surveys(std::span<const ReplayUnit> units) const;
  void complete_decodings(std::span<const ReplayUnit> units, const Plan& plan) const;
  // Factors of output projections by projection_key(): those of the last group of units, which the next may share.
  using Projections = std::map<std::string, std::shared_ptr<LayerProjection>>;

  Plan plan_for(Index limit) const;
  Plan plan_of(int heads_at_once, int rounds, Index limit) const;
  std::vector<std::vector<LayerResult>> decide_group(std::span<const ReplayUnit> group, const Plan& plan,
                                                     Projections& known, LayerDecoding::Outputs outputs) const;
  std::vector<std::shared_ptr<LayerProjection>> projections_of(std::span<const ReplayUnit> group, const Plan& plan,
                                                               Projections& known) const;
  void decode_group(std::span<const ReplayUnit> group, const Plan& plan,
                    const std::vector<std::shared_ptr<LayerProjection>>& projections, LayerDecoding::Outputs outputs,
                    std::vector<std::vector<LayerResult>>& results) const;
  void measure_group(std::span<const ReplayUnit> group, const Plan& plan,
                     std::vector<std::vector<LayerResult>>& results) const;
  template <class Work, class Done>
  void for_each_group(std::span<const ReplayUnit> units, const Work& work, const Done& done) const;
  template <class Pieces, class Work>
  static void for_each_piece(std::size_t count, const Plan& plan, const Pieces& pieces_of, const Work& work);
  const CapturedRun& trace_of(const ReplayUnit& unit) const;
  static Sums sum_up(const CapturedRun& trace, const TraceReplay& outline, const std::vector<Setting>& settings,
                     int held);
  const Sums& sums_of(const ReplayUnit& unit) const;
  bool needs_projection(const ReplayUnit& unit) const;
  bool may_share_projections(std::size_t replay, std::size_t other) const;
  bool share_projections(std::size_t replay, std::size_t other) const;
  std::string projection_key(const ReplayUnit& unit) const;
  bool refines(const ReplayUnit& unit) const { return sums_of(unit).refining > 0; }
  std::size_t units_at_once(std::span<const ReplayUnit> units, const Plan& plan) const;

  std::vector<const CapturedRun*> traces_;
  ReplayRequest request_;
  std::vector<TraceReplay> outlines_;
  std::vector<TraceNote> left_out_;
  std::vector<std::size_t> trace_of_outline_;
  std::vector<std::vector<Setting>> settings_;   // per outline
  std::vector<std::map<int, Sums>> sums_;        // the same: by what a layer holds
  mutable std::map<int, AlikeSurveys> surveys_;  // of outlines
  // Of outlines, by setting: what every KV head keeps where it is the same in all layers.
  mutable std::map<int, std::map<std::size_t, std::vector<CacheHistory>>> across_layers_;
  mutable std::map<std::pair<std::size_t, int>, std::string> projection_digests_;  // of layers of traces, as asked for
  Index memory_limit_ = 0;                                                         // 0: none was given
};

}  // namespace kvreplay
