// Policies that differ in their seeds alone are draws of one.
#include "analysis/draws.h"

#include <gmock/gmock.h>

#include <cmath>

#include "analysis/made_results.h"
#include "analysis/step_effects.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using testing::IsEmpty;
using testing::SizeIs;

TEST(Draws, AreToldByWhatTheirSeedsLeaveOut) {
  EXPECT_EQ(without_draw("vase(seed=3)"), "vase");
  EXPECT_EQ(without_draw("vase(recent=32,seed=3)+every(interval=8)"), "vase(recent=32)+every(interval=8)");
  EXPECT_EQ(without_draw("restkv(alpha=0.5)"), "restkv(alpha=0.5)");
  EXPECT_EQ(without_draw("no spec ("), "no spec (");
  EXPECT_EQ(without_draw("unknown(seed=3)"), "unknown(seed=3)") << "nobody says what the seed of others is";
}

TEST(Draws, AreSummarisedAtEveryCapacity) {
  TraceReplay replay = test::MadeReplay{.queries = 20}.replay();
  const auto add = [&replay](const std::string& policy, int capacity, double error) {
    test::add_result(replay, policy, capacity, [error](int, int, int) { return error; });
  };
  add("random", 16, 0.5);
  add("random(seed=1)", 16, 0.7);
  add("random(seed=2)", 16, 0.3);
  add("random(seed=1)", 32, 0.2);
  add("random(seed=2)", 32, 0.1);
  add("knorm", 16, 0.4);
  add("vase(seed=4)", 16, 0.4);
  const test::TemporaryFolder folder;
  test::write_made(folder / "x.h5", {replay});
  const std::vector<std::filesystem::path> files = {folder / "x.h5"};
  const ResultSet results = ResultSet::open(files);
  const std::vector<DrawSummary> found = draw_summaries(compare(results, {.bootstrap = {.resamples = 0}}));
  ASSERT_THAT(found, SizeIs(2));
  EXPECT_EQ(found[0].policy, "random");
  EXPECT_EQ(found[0].capacity_request, "16");
  EXPECT_EQ(found[0].draws, 3);
  EXPECT_NEAR(found[0].mean, 0.5, 1e-6);
  EXPECT_NEAR(found[0].deviation, 0.2, 1e-6);
  EXPECT_NEAR(found[0].smallest, 0.3, 1e-6);
  EXPECT_NEAR(found[0].largest, 0.7, 1e-6);
  EXPECT_EQ(found[1].capacity_request, "32");
  EXPECT_EQ(found[1].draws, 2);
  EXPECT_NEAR(found[1].deviation, std::sqrt(0.005), 1e-6);
  EXPECT_THAT(step_effects(results, Measure::layer_error, {.resamples = 50}), IsEmpty()) << "chance is no step";
}

}  // namespace
}  // namespace kvreplay
