#include "analysis/capacity_curve.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "analysis/comparison.h"
#include "base/parallel.h"

namespace kvreplay {
namespace {

using Place = std::pair<std::string, int>;  // trace, eviction position

Place place_of(const StoredResult& result) { return {result.trace, result.eviction_position}; }

// A policy's results at each capacity, of the traces and eviction positions that have all of its capacities.
struct Comparable {
  std::vector<std::pair<std::string, std::vector<std::size_t>>> of_capacity;
  bool partial = false;  // others are left out
};

Comparable comparable(const ResultSet& results, const std::string& policy) {
  Comparable answer;
  auto& of_capacity = answer.of_capacity;
  std::set<Place> common;
  for (const std::string& capacity : results.capacities()) {
    const std::vector<std::size_t>& found = results.of_setting({policy, capacity});
    if (found.empty() || capacity == kAllPositions) continue;
    std::set<Place> places;
    for (const std::size_t i : found) places.insert(place_of(results.results()[i]));
    if (of_capacity.empty()) common = places;
    std::erase_if(common, [&places](const Place& place) { return !places.contains(place); });
    of_capacity.emplace_back(capacity, found);
  }
  for (auto& [capacity, found] : of_capacity) {
    const std::size_t left_out =
        std::erase_if(found, [&](std::size_t i) { return !common.contains(place_of(results.results()[i])); });
    answer.partial = answer.partial || left_out > 0;
  }
  return answer;
}

CapacityCurve curve_of(const ResultSet& results, const std::string& policy, Measure measure,
                       const BootstrapOptions& bootstrap) {
  CapacityCurve curve;
  curve.policy = policy;
  const Comparable which_of = comparable(results, policy);
  curve.partial = which_of.partial;
  for (const auto& [capacity, which] : which_of.of_capacity) {
    const std::optional<Aggregate> found = aggregate(results, which, measure, bootstrap);
    if (!found) continue;
    curve.oracle = results.results()[which.front()].oracle;
    curve.sets_per_kv_head = found->stored / found->kept;
    curve.points.push_back({capacity, found->kept, found->kept_share, found->estimate.mean, found->estimate.interval,
                            found->nothing_to_choose});
  }
  std::ranges::stable_sort(curve.points, {}, &CapacityPoint::kept);
  return curve;
}

// The points that count.
std::vector<CapacityPoint> telling(const CapacityCurve& curve) {
  std::vector<CapacityPoint> points = curve.points;
  std::erase_if(points, [](const CapacityPoint& point) { return point.nothing_to_choose; });
  return points;
}

std::vector<std::pair<double, double>> along_log_kept(const std::vector<CapacityPoint>& points) {
  std::vector<std::pair<double, double>> line;
  for (const CapacityPoint& point : points) line.emplace_back(std::log2(point.kept), point.mean);
  return line;
}

void find_goal_of(CapacityCurve& curve, double goal, bool lower_is_better) {
  const auto reaches = [&](double mean) { return lower_is_better ? mean <= goal : mean >= goal; };
  const std::vector<CapacityPoint> points = telling(curve);
  for (std::size_t i = 0; i < points.size(); ++i) {
    const CapacityPoint& point = points[i];
    if (!reaches(point.mean)) continue;
    curve.reached_at_smallest = i == 0;
    curve.kept_for_goal = point.kept;
    if (i == 0) return;
    const CapacityPoint& before = points[i - 1];
    const double part = (goal - before.mean) / (point.mean - before.mean);
    curve.kept_for_goal = std::exp2((1 - part) * std::log2(before.kept) + part * std::log2(point.kept));
    return;
  }
}

}  // namespace

std::vector<CapacityCurve> capacity_curves(const ResultSet& results, Measure measure,
                                           const BootstrapOptions& bootstrap) {
  const std::vector<std::string> policies = results.policies();
  std::vector<CapacityCurve> curves(policies.size());
  parallel_for(static_cast<int>(policies.size()), [&](int i) {
    const auto at = static_cast<std::size_t>(i);
    curves[at] = curve_of(results, policies[at], measure, bootstrap);
  });
  std::erase_if(curves, [](const CapacityCurve& curve) { return curve.points.empty(); });
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  for (const CapacityCurve& curve : curves) {
    if (curve.points.size() < 2) continue;
    low = std::max(low, std::log2(curve.points.front().kept));
    high = std::min(high, std::log2(curve.points.back().kept));
  }
  const bool lower_is_better = traits_of(measure).lower_is_better;
  for (CapacityCurve& curve : curves) {
    const std::vector<std::pair<double, double>> line = along_log_kept(telling(curve));
    const bool reaches_over = line.size() >= 2 && line.front().first <= low && high <= line.back().first;
    if (low < high && reaches_over) curve.area = mean_height(line, low, high);
  }
  const auto before = [&](const CapacityCurve& a, const CapacityCurve& b) {
    if (a.area.has_value() != b.area.has_value()) return a.area.has_value();
    if (!a.area || *a.area == *b.area) return a.policy < b.policy;
    return lower_is_better ? *a.area < *b.area : *a.area > *b.area;
  };
  std::ranges::sort(curves, before);
  return curves;
}

void find_goal(std::vector<CapacityCurve>& curves, Measure measure, double goal) {
  for (CapacityCurve& curve : curves) find_goal_of(curve, goal, traits_of(measure).lower_is_better);
}

double mean_height(const std::vector<std::pair<double, double>>& points, double low, double high) {
  double area = 0;
  for (std::size_t i = 1; i < points.size(); ++i) {
    const auto& [x0, y0] = points[i - 1];
    const auto& [x1, y1] = points[i];
    const double from = std::max(low, x0);
    const double to = std::min(high, x1);
    if (!(from < to)) continue;
    const auto height = [&, slope = (y1 - y0) / (x1 - x0), x = x0, y = y0](double at) { return y + slope * (at - x); };
    area += (height(from) + height(to)) / 2 * (to - from);
  }
  return area / (high - low);
}

}  // namespace kvreplay
