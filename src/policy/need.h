// What methods need of what they decide over, and what is said where it is not there.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "policy/head.h"

namespace kvreplay {

/// Something that a ranking asks a head for and that may not be there.
struct Need {
  enum class Kind {
    window_queries,         ///< the last `count` queries before the eviction, without a gap
    all_queries,            ///< all of them
    accumulated_attention,  ///< recorded attention mass, or all queries
    later_prompt,           ///< all queries of the prompt from the eviction on
    rotary,                 ///< how positions turned keys and queries
    output_projection,      ///< used where it is there; the method says what it does without
    evaluation_queries,     ///< what comes after the eviction: for oracles, and always at hand
    keys_or_values,         ///< Head::keys() or values() as a whole: always at hand, and counted in the memory
  };

  Kind kind;
  int count = 0;

  static Need window(int queries) { return {Kind::window_queries, queries}; }
};

/// What a ranking needs, checked before any work begins, and what it will ask a head for.
struct Requirements {
  std::vector<Need> needs = {};

  /// Combinations of the window's attention that score() will ask for: told here, those of all policies of a run are
  /// computed in one pass. One that is not told is computed when it is asked for.
  std::vector<WindowCombination> combinations = {};

  bool includes(Need::Kind kind) const;

  /// The most that is needed of a kind that is counted; 0 where it is not.
  int count(Need::Kind kind) const;
};

/// What there is to decide over.
struct Holdings {
  int next_position = 0;                ///< N, where the eviction is
  int window_queries = 0;               ///< the last queries before it, without a gap
  int later_prompt = 0;                 ///< positions of the prompt from the eviction on
  int later_queries = 0;                ///< captured queries there
  bool attention_mass = false;          ///< recorded for this eviction
  bool rotary = false;                  ///< known of all layers
  std::string missing_projection = {};  ///< "the trace has no output projection"; empty: no layer lacks one
};

/// Why something cannot be decided.
struct Obstacle {
  std::string reason;       ///< "capacity 16 is below the 32 positions that snapkv always keeps"
  std::string cure = {};    ///< "ask for a larger capacity or protect fewer"; or empty
  std::string shared = {};  ///< the reason in words that are true of all that it keeps from being replayed; or empty
  int amount = 0;           ///< of several with the same `shared`, the cure of the largest helps all
};

/// Why `policy` cannot have the first of `needs` that is not there; nothing where all are, or can be done without.
std::optional<Obstacle> missing_need(const std::vector<Need>& needs, const std::string& policy,
                                     const Holdings& holdings);

}  // namespace kvreplay
