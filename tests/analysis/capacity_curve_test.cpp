// Curves against capacity, in closed form.
#include "analysis/capacity_curve.h"

#include <gmock/gmock.h>

#include <cmath>

#include "analysis/made_results.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::ElementsAre;
using testing::SizeIs;

constexpr double kExact = 1e-6;

TEST(MeanHeight, IsTheAreaOfTrapezoidsOverTheirWidth) {
  const std::vector<std::pair<double, double>> line = {{0, 1}, {2, 3}, {3, 0}};
  EXPECT_DOUBLE_EQ(mean_height(line, 0, 2), 2);
  EXPECT_DOUBLE_EQ(mean_height(line, 0, 3), (4 + 1.5) / 3);
  EXPECT_DOUBLE_EQ(mean_height(line, 1, 2.5), (2.5 + (3 + 1.5) / 4) / 1.5) << "ends lie on the lines between points";
  EXPECT_DOUBLE_EQ(mean_height({{4, 0.5}, {6, 0.5}}, 4.25, 5), 0.5);
}

class CapacityCurves : public testing::Test {
 protected:
  // Adds a result at each capacity.
  static void add(TraceReplay& replay, const std::string& policy, const std::vector<std::pair<int, double>>& errors) {
    for (const auto& [capacity, error] : errors) {
      add_result(replay, policy, capacity, [error = error](int, int, int) { return error; });
    }
  }
  std::vector<CapacityCurve> curves(const std::vector<TraceReplay>& replays, std::optional<double> goal = {}) const {
    test::write_made(folder_ / "x.h5", replays);
    const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
    std::vector<CapacityCurve> found =
        capacity_curves(ResultSet::open(files), Measure::layer_error, {.resamples = 100});
    if (goal) find_goal(found, Measure::layer_error, *goal);
    return found;
  }
  static std::vector<std::string> policies_of(const std::vector<CapacityCurve>& found) {
    std::vector<std::string> policies;
    for (const CapacityCurve& curve : found) policies.push_back(curve.policy);
    return policies;
  }

  test::TemporaryFolder folder_;
};

TEST_F(CapacityCurves, AreComparedWhereAllOfThemAre) {
  TraceReplay a = MadeReplay{}.replay();
  add(a, "full", {{0, 0}});
  add(a, "snapkv", {{8, 0.8}, {16, 0.6}, {64, 0.2}});
  add(a, "tova", {{16, 0.5}, {32, 0.4}});
  add(a, "recent", {{16, 0.9}});
  const auto found = curves({a});
  // Both have kept 16 to 32, where snapkv falls from 0.6 to 0.4 and tova from 0.5 to 0.4.
  EXPECT_THAT(policies_of(found), ElementsAre("tova", "snapkv", "recent"));
  EXPECT_NEAR(*found[0].area, 0.45, kExact);
  EXPECT_NEAR(*found[1].area, 0.5, kExact);
  EXPECT_FALSE(found[2].area) << "a point is no curve";
  ASSERT_THAT(found[1].points, SizeIs(3));
  EXPECT_EQ(found[1].points[2].capacity_request, "64");
  EXPECT_NEAR(found[1].points[2].kept, 64, kExact);
  EXPECT_NEAR(found[1].points[2].kept_share, 0.64, kExact);
}

TEST_F(CapacityCurves, CurvesThatShareNoCapacityHaveNoArea) {
  TraceReplay a = MadeReplay{}.replay();
  add(a, "snapkv", {{8, 0.8}, {16, 0.6}});
  add(a, "tova", {{32, 0.5}, {64, 0.4}});
  const auto found = curves({a});
  EXPECT_THAT(policies_of(found), ElementsAre("snapkv", "tova"));
  EXPECT_FALSE(found[0].area);
}

TEST_F(CapacityCurves, FindTheCapacityThatAGoalTakes) {
  TraceReplay a = MadeReplay{}.replay();
  add(a, "snapkv", {{64, 0.2}, {16, 0.6}, {8, 0.8}});  // in any order
  add(a, "tova", {{8, 0.3}, {64, 0.1}});
  add(a, "recent", {{8, 0.9}, {64, 0.5}});
  const auto found = curves({a}, 0.4);
  ASSERT_THAT(policies_of(found), ElementsAre("tova", "snapkv", "recent"));
  EXPECT_NEAR(*found[0].kept_for_goal, 8, kExact);
  EXPECT_TRUE(found[0].reached_at_smallest);
  EXPECT_NEAR(*found[1].kept_for_goal, 32, 1e-4) << "half way from 16 to 64 in their logarithms";
  EXPECT_FALSE(found[1].reached_at_smallest);
  EXPECT_FALSE(found[2].kept_for_goal);
}

TEST_F(CapacityCurves, AreOfTracesThatHaveAllCapacities) {
  TraceReplay a = MadeReplay{}.replay();
  add(a, "snapkv", {{8, 0.4}, {16, 0.2}});
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add(b, "snapkv", {{16, 1}});
  const auto found = curves({a, b});
  EXPECT_NEAR(found[0].points[1].mean, 0.2, kExact) << "else another trace would make the curve rise";
  EXPECT_TRUE(found[0].partial);
  EXPECT_FALSE(curves({a})[0].partial);
}

}  // namespace
}  // namespace kvreplay
