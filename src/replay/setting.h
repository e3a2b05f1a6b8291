// What a replay is asked for, resolved for one trace: every policy at every capacity.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "policy/policy.h"
#include "replay/left_out.h"
#include "replay/replay.h"
#include "trace/reader.h"

namespace kvreplay {

/// A policy at a capacity: what one ReplayResult is about.
struct Setting {
  const Policy* policy = nullptr;  ///< lives in the request
  CapacityRequest asked;           ///< its text is kAllPositions where everything is asked for
  Granularity granularity = Granularity::kv;
  Share share = Share::mean;
  bool rank_agreement = false;     ///< whether its scores are compared with the oracle's importance
  bool nothing_to_choose = false;  ///< see ReplayResult

  /// Positions per kept set that are granted in a layer that holds `held` of them: at most all.
  int capacity(int held) const;

  /// Whether every position is kept in a layer that holds `held` of them, so that nothing needs to be ranked.
  bool keeps_all(int held) const;

  /// Whether scores decide what a layer of this shape keeps: not so of patterns, of what keeps everything or only what
  /// is protected and one more, and of oracles that exchange positions afterwards.
  bool goes_by_ranks(const HeadShape& shape) const;

  /// Whether a head's kept sets can be drawn without looking at the layer's other heads.
  bool is_local() const;

  /// What a budget is asked for in the layer of a head of this shape, without scores.
  BudgetRequest budget_request(const HeadShape& shape) const;

  /// How many sets the query heads of one KV head keep.
  int sets_per_kv_head(const ModelInfo& model) const {
    return granularity == Granularity::query ? model.group_size() : 1;
  }
};

/// What the rankings of settings will ask of every head, gathered once: grids hold thousands of settings, and work is
/// planned unit by unit.
struct RankingRequirements {
  /// In a layer that holds `held` positions.
  RankingRequirements(const std::vector<Setting>& settings, int held);

  /// The combinations that the setting `index` is the first of its policy to ask for, as indices among `combinations`.
  std::span<const std::size_t> first_asked_by(std::size_t index) const {
    return std::span(asked).subspan(begin[index], begin[index + 1] - begin[index]);
  }

  std::vector<WindowCombination> combinations;  ///< each once
  std::vector<std::size_t> asked;               ///< of all policies, one after the other
  std::vector<std::size_t> begin;               ///< [settings + 1]: where each setting's part of `asked` begins
  std::size_t most_combinations = 0;            ///< that one policy asks for
  std::size_t with_distance = 0;                ///< combinations whose distances are asked for
  bool projected_distance = false;              ///< through the output projection
  bool keys_or_values = false;                  ///< whether a ranking looks at them as a whole
  bool accumulated_attention = false;           ///< of all prompt queries
  bool output_projection = false;               ///< beside distances through it
  bool evaluation_attention = false;            ///< whether a ranking is an oracle's
  int window = 0;                               ///< queries before the eviction whose attention is asked for
};

/// Every policy at every capacity for an eviction at `eviction_position`, policies in the order given, capacities
/// within. The request must outlive them. What cannot be replayed is `left_out`: where a capacity is below what a
/// policy protects, a pattern or a budget cannot be drawn, heads cannot share as asked, or a policy needs what the
/// trace does not hold. `notes` receives what a reader of the numbers has to know, what is left out included.
std::vector<Setting> settings_for(const TraceReader& trace, const ReplayRequest& request, int eviction_position,
                                  std::vector<std::string>& notes, LeftOut& left_out);

}  // namespace kvreplay
