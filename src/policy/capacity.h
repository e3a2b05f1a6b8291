// How many positions are asked for.
#pragma once

#include <string>
#include <string_view>

namespace kvreplay {

/// How many of `length` positions a share, in (0, 1], is, before fractions are cut off.
using ShareRule = double (*)(double share, int length);

/// A capacity as it was asked for: a count of positions, or a share of those that a layer holds.
struct CapacityRequest {
  std::string text;  ///< canonical: "128" or "25%"
  int count = 0;     ///< positions; 0 where a share is asked for
  double share = 0;  ///< in (0, 1]; 0 where a count is asked for

  /// Positions for a layer that holds so many: the count, or the share rounded down, at least 1. `rule`: how the
  /// policy counts a share, if it has a Policy::share_rule.
  int resolve(int held, ShareRule rule = nullptr) const;

  /// The same before a share is rounded down.
  double unrounded(int held, ShareRule rule = nullptr) const;

  /// Reads "128" or "25%". Throws UsageError for anything else, 0 and more than 100 % included.
  static CapacityRequest parse(std::string_view text);
};

/// The CapacityRequest::text of what keeps every position, whatever was asked for.
constexpr std::string_view kAllPositions = "all";

}  // namespace kvreplay
