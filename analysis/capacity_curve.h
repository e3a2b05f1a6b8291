// A measure against capacity: the curve, the area under it, and the capacity that a goal takes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "analysis/bootstrap.h"
#include "analysis/result_set.h"

namespace kvreplay {

struct CapacityPoint {
  std::string capacity_request;
  double kept = 0;        ///< mean positions in a kept set
  double kept_share = 0;  ///< of the positions that the layers held
  double mean = 0;
  Interval interval;
  bool nothing_to_choose = false;  ///< at this capacity, so that the point says nothing of the policy: see ReplayResult
};

/// A policy's curve over the traces and eviction positions that have all of its capacities. Points where it had nothing
/// to choose are shown, and count neither for the area nor for the goal.
struct CapacityCurve {
  std::string policy;
  bool oracle = false;
  bool partial = false;         ///< a capacity has other traces or eviction positions than the rest, which are left out
  double sets_per_kv_head = 1;  ///< that have to be stored: the group where each query head keeps its own
  std::vector<CapacityPoint> points;  ///< ascending in what was kept
  /// Mean along log2(kept) over the range that all curves share (trapezoids); none where a curve has one point only, or
  /// where those that count do not reach over that range.
  std::optional<double> area;
  /// Smallest number of kept positions at which the goal is reached, on the line between the points (log2 kept); none
  /// where it is not reached. `reached_at_smallest`: already the smallest capacity does, and less may do.
  std::optional<double> kept_for_goal;
  bool reached_at_smallest = false;
};

/// Curves of all policies with a capacity, best area first (those without after them, by policy). No goal is looked
/// for.
std::vector<CapacityCurve> capacity_curves(const ResultSet& results, Measure measure,
                                           const BootstrapOptions& bootstrap);

/// Where each curve reaches `goal`, a value of the measure.
void find_goal(std::vector<CapacityCurve>& curves, Measure measure, double goal);

/// The area under points (x ascending) by trapezoids, from `low` to `high` within them, over high − low.
double mean_height(const std::vector<std::pair<double, double>>& points, double low, double high);

}  // namespace kvreplay
