// Rank correlation of two lists of numbers, exact also where numbers are equal.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// How far two lists put the same things into the same order: 1 the same, −1 the reverse. 0 where one of them puts
/// them into none: fewer than 2 things, or all numbers equal.
struct RankCorrelation {
  double spearman = 0;  ///< Pearson's correlation of the ranks, equal numbers sharing their mean rank
  double kendall = 0;   ///< τ_b: agreeing less disagreeing pairs, over the geometric mean of those not tied in either
};

/// Numbers that others are compared with: put in order once for all comparisons.
class RankedValues {
 public:
  /// NaN is not allowed.
  explicit RankedValues(std::span<const float> values);

  /// With `others`, as many, over the places first … end − 1. NaN is not allowed there. Counts in whole numbers, so
  /// that equal orders give exactly 1. O(n log n).
  RankCorrelation correlation(std::span<const float> others, Index first, Index end) const;

  /// Bytes that `count` values take, and that correlation() takes beside them.
  static Index memory(Index count);
  static Index working_memory(Index count);

 private:
  std::vector<std::uint32_t> order_;  // places by ascending value
  std::vector<std::uint32_t> level_;  // of the values in that order: equal ones have the same
};

}  // namespace kvreplay
