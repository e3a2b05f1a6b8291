// How long the positions of a head stay in its cache.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace kvreplay {

/// For every position of a head the last query that still sees it: a query at t sees what stands at or before t and
/// whose last query is t or later. One eviction is the special case in which there are two last queries: what it evicts
/// is seen by no later one, and what it keeps, like all that comes since, by every one. Where rows are masked instead
/// of dropped, a position may be hidden from some queries before its last one.
class Residency {
 public:
  /// The last query of what is never evicted.
  static constexpr int kNever = std::numeric_limits<int>::max();

  /// Queries before a position's last one that do not see it.
  struct Gap {
    int position = 0;
    int first = 0;  ///< of the queries
    int last = 0;

    auto operator<=>(const Gap&) const = default;
  };

  Residency() = default;

  /// One eviction that keeps `kept`, ascending.
  Residency(std::vector<int> kept) : positions_(std::move(kept)), num_kept_(positions_.size()) {}

  /// Several, the first of them at `eviction_position`: `positions`, ascending, are seen up to the query at `until`
  /// each. Positions before the eviction that are not listed are gone with it, and those since that are not listed are
  /// never evicted. With `from`, a position is listed once for every span of queries that see it, from the one at
  /// `from` on; from its own or an earlier one means since it came. Equal residencies are equal however they were
  /// written down. Throws Error where positions do not ascend, where one is evicted before it was seen, or before the
  /// eviction, and where its spans do not follow each other.
  Residency(const std::vector<int>& positions, const std::vector<int>& until, int eviction_position,
            const std::vector<int>& from = {});

  /// Whether there was one eviction.
  bool is_one_eviction() const { return until_.empty(); }

  /// The kept set: what stands before the eviction and is seen by queries after it, ascending.
  std::span<const int> kept() const { return std::span(positions_).first(num_kept_); }

  /// The kept set and, after it, what came since and was evicted later; with the last queries, none for one eviction.
  std::span<const int> positions() const { return positions_; }
  std::span<const int> until() const { return until_; }

  /// Ascending, none that touch each other; of positions that are not listed above too. Mostly there are none.
  std::span<const Gap> gaps() const { return gaps_; }

  /// What a query at `position` sees, ascending, of an eviction at `eviction_position`; not what is before
  /// `first_visible`.
  std::vector<int> cached_at(int position, int eviction_position, int first_visible = 0) const;

  /// How many that is.
  int count_at(int position, int eviction_position, int first_visible = 0) const;

  /// How many positions of first … end − 1 in the kept set the queries see, mean over them. `queries` ascend, and none
  /// is before the eviction.
  double mean_kept(int first, int end, std::span<const int> queries) const;

  /// How many positions of first … end − 1 in the kept set each of the queries, ascending, sees: [queries].
  std::vector<int> kept_at_each(int first, int end, std::span<const int> queries) const;

  /// A position, and the first and the last query after the eviction that see it: the first is its own where it came
  /// since.
  struct Stay {
    int position = 0;
    int from = 0;
    int until = 0;

    bool operator==(const Stay&) const = default;
  };

  /// What goes after an eviction at `eviction_position`: by the last queries, and of one query by positions.
  std::vector<Stay> evicted_later(int eviction_position) const;

  /// What at least one of the queries from `first` to `last` sees, ascending, of an eviction at `eviction_position`,
  /// which is not after them; once for every span in which it is seen.
  std::vector<Stay> seen_between(int first, int last, int eviction_position) const;

  auto operator<=>(const Residency&) const = default;

 private:
  std::vector<int> positions_;
  std::vector<int> until_;    // of positions_, or empty: never, and there are no gaps
  std::size_t num_kept_ = 0;  // how many of positions_ stand before the eviction
  std::vector<Gap> gaps_;
};

/// The residencies of a layer's heads, as in KeptSets.
using LayerResidencies = std::vector<Residency>;

/// Residencies one after the other, as files store them: set s is positions[offsets[s]:offsets[s+1]], and so is when
/// these are last seen, where some were evicted more than once. Where some were hidden for a while, a position stands
/// there once for every span in which it was seen, and beside it when that began.
struct FlatResidencies {
  FlatResidencies() = default;
  FlatResidencies(std::span<const Residency> sets, int eviction_position) { add(sets, eviction_position); }

  void add(std::span<const Residency> sets, int eviction_position);

  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> until;  ///< of each position, or empty: never evicted
  std::vector<std::int32_t> from;   ///< of each, its own where that is since it came; or empty: all of them are
  std::vector<std::int64_t> offsets = {0};

 private:
  void add_spans(const Residency& set, int eviction_position);
};

}  // namespace kvreplay
