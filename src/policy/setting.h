// A policy at a capacity.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "policy/capacity.h"
#include "policy/policy.h"

namespace kvreplay {

/// A policy at a capacity, shared as asked: what decides what a layer keeps.
struct Setting {
  const Policy* policy = nullptr;  ///< lives elsewhere
  CapacityRequest asked;           ///< its text is kAllPositions where everything is asked for
  Granularity granularity = Granularity::kv;
  Share share = Share::mean;

  /// Positions per kept set that are granted in a layer that holds `held` of them: at most all, unless tokens that come
  /// are evicted as well.
  int capacity(int held) const;

  /// The most positions that a kept set of such a layer can hold: a budget may give some more than the mean.
  int most_positions(int held) const;

  /// Whether every position is kept in a layer that holds `held` of them, so that nothing needs to be ranked. Never so
  /// under a schedule.
  bool keeps_all(int held) const;

  /// Whether scores decide what a layer of this shape keeps: not so of patterns, of what keeps everything or only what
  /// is protected and one more, and of what is refined afterwards.
  bool goes_by_ranks(const HeadShape& shape) const;

  /// Whether a head's kept sets can be drawn without looking at the layer's other heads.
  bool is_local() const;

  /// What a budget is asked for in the layer of a head of this shape, without scores.
  BudgetRequest budget_request(const HeadShape& shape) const;

  /// How many sets the query heads of one KV head keep.
  int sets_per_kv_head(int group_size) const { return granularity == Granularity::query ? group_size : 1; }
};

/// What the rankings of settings will ask of every head, gathered once: grids hold thousands of settings, and work is
/// planned unit by unit.
struct RankingRequirements {
  /// In a layer that holds `held` positions, of settings that evict once. `settings` are Settings or derived from it.
  RankingRequirements(std::span<const Setting> settings, int held);

  /// The combinations that the setting `index` is the first of its policy to ask for, as indices among `combinations`.
  std::span<const std::size_t> first_asked_by(std::size_t index) const {
    return std::span(asked).subspan(begin[index], begin[index + 1] - begin[index]);
  }

  /// Whether a ranking needs it.
  bool includes(Need::Kind kind) const;

  std::vector<Need::Kind> needs;                ///< each once
  std::vector<WindowCombination> combinations;  ///< each once
  std::vector<std::size_t> asked;               ///< of all policies, one after the other
  std::vector<std::size_t> begin;               ///< [settings + 1]: where each setting's part of `asked` begins
  std::size_t most_combinations = 0;            ///< that one policy asks for
  std::size_t with_distance = 0;                ///< combinations whose distances are asked for
  bool projected_distance = false;              ///< through the output projection
  int window = 0;                               ///< queries before the eviction whose attention is asked for
};

}  // namespace kvreplay
