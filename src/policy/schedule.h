// When a cache is evicted while tokens come, and how its rows stand between evictions.
#pragma once

#include <limits>

namespace kvreplay {

/// When a policy evicts. A step is one token: its key and value join the cache, its query attends, and then the policy
/// may evict. Published codes differ in all of this; what a spec cannot say belongs to their variants.
struct Schedule {
  /// What the interval counts.
  enum class Phase {
    since_last,  ///< steps since the last eviction, or since the prompt's end
    position,    ///< tokens of all: evicts where (t + 1) mod interval is `remainder`
    rows,        ///< rows: evicts where their number is a multiple of the interval
    turns,       ///< nothing: evicts before every turn of the conversation
  };

  /// What policies see of what queries pay.
  enum class Attention {
    live,  ///< over the rows that are left, as published codes see it
    full,  ///< over all tokens, as in the run without eviction: what it pays to rows that are left
  };

  /// Whether the tokens that come until the next eviction find room, or are above the capacity until then.
  enum class Attend {
    after,   ///< queries attend to up to interval more than the capacity, then the policy evicts
    before,  ///< the policy makes room for the next interval tokens first, so that no query sees more than the capacity
  };

  /// What happens to the prompt at its end.
  enum class Prompt {
    cut,   ///< it is evicted like everything since
    wait,  ///< it stays whole for the first interval
  };

  /// An interval that never ends: one eviction at the prompt's end.
  static constexpr int kOnce = std::numeric_limits<int>::max();

  int interval = 1;
  int slack = 0;  ///< rows above the capacity that are waited for: 0 and 1 are the same
  Phase phase = Phase::since_last;
  Attend attend = Attend::after;
  Prompt prompt = Prompt::cut;
  Attention attention = Attention::live;
  int remainder = 0;          ///< of Phase::position
  bool starts_over = false;   ///< of Phase::since_last: an interval that ends below the capacity is followed by another
  bool when_full = false;     ///< evicts at the capacity already: nothing goes, but its order may change
  bool counts_prompt = true;  ///< among the rows that fill the cache; or those since alone do
  double burst = 1;           ///< evicts from so many times the capacity on
  /// Of Attend::before, room for one token: it joins first and is counted, then room is made, then its query attends.
  bool joins_first = false;
  /// Of Attend::before: the prompt is cut to the capacity before room is made, as by one eviction: the ranking has no
  /// memory then.
  bool cuts_prompt_apart = false;

  /// Where it is not 0, the cache grows: an eviction leaves what the capacity holds beside the last rows that are
  /// protected once more than the one before it did, once so many times as many tokens have come.
  int compression = 0;

  /// How many rows every eviction of a cache that grows adds, where the capacity asked for and the last rows that are
  /// protected are these; 0 where none grows. The slack follows from it.
  int grow(int asked, int protected_last);

  /// Tokens that room is made for.
  int coming() const { return attend == Attend::before && interval != kOnce && !joins_first ? interval : 0; }

  /// Whether so many rows are enough to evict some, where the capacity is `capacity`.
  bool is_full(int rows, int capacity) const;

  /// Whether there is an eviction after the token at `position`, which leaves `rows` in the cache; `last` is where the
  /// last one was, or the prompt's last token. `ends_turn`: the next token begins another turn.
  bool is_due(int position, int last, int rows, bool ends_turn = false) const;

  bool operator==(const Schedule&) const = default;
};

/// How the rows of a cache stand after an eviction.
enum class RowOrder {
  position,         ///< as the tokens came
  score,            ///< protected first rows, then the best first, then the protected last ones
  protected_first,  ///< what is protected before all others, then the best first
};

/// Which positions queries and keys have once something was evicted.
enum class RowPositions {
  original,   ///< those of their tokens
  reindexed,  ///< their places in the cache
};

/// What is never evicted because it belongs to the prompt.
struct Pin {
  bool prompt = false;
  bool counted = true;  ///< in the capacity; or the capacity is for what comes after the prompt

  bool operator==(const Pin&) const = default;
};

}  // namespace kvreplay
