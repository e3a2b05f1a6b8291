// One rule says how means weigh, and all that is told of the same results goes by it.
#include "analysis/weighing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "analysis/comparison.h"
#include "analysis/made_results.h"
#include "analysis/summary.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::ElementsAre;

TEST(Mean, CountsNothingThatIsNoNumber) {
  Mean mean;
  EXPECT_TRUE(std::isnan(mean.value()));
  mean.add(std::numeric_limits<double>::quiet_NaN(), 5);
  EXPECT_EQ(mean.count(), 0);
  EXPECT_TRUE(std::isnan(mean.value()));
  mean.add(1, 3);
  mean.add(5);
  EXPECT_EQ(mean.count(), 2);
  EXPECT_EQ(mean.weight(), 4);
  EXPECT_EQ(mean.value(), 2);
}

TEST(Weights, AreTheSameForTracesThenForTheirEvictionsThenForWhatThereIs) {
  const std::vector<EvictionKey> members = {{"a", 10}, {"b", 10}, {"a", 20}, {"a", 20}};
  EXPECT_THAT(weights_of(members), ElementsAre(0.25, 0.5, 0.125, 0.125));
}

// Three evictions of one trace against a single one of another.
TEST(Weights, AreThoseOfTheTableOfAReplayAndOfAnAnalysis) {
  std::vector<TraceReplay> replays;
  for (const int eviction : {60, 80, 100}) {
    replays.push_back(MadeReplay{.eviction_position = eviction, .evaluate_from = 100}.replay());
    add_result(replays.back(), "snapkv", 16, [eviction](int, int, int) { return 0.001 * eviction; });
  }
  replays.push_back(MadeReplay{.trace = "b.h5"}.replay());
  add_result(replays.back(), "snapkv", 16, [](int, int, int) { return 0.5; });
  const test::TemporaryFolder folder;
  test::write_made(folder / "x.h5", replays);
  const std::vector<std::filesystem::path> files = {folder / "x.h5"};
  const std::vector<ComparisonRow> rows = compare(ResultSet::open(files, {}), {});
  ASSERT_EQ(rows.size(), 1u);
  const std::vector<PolicyRow> table = rank_policies(replays);
  ASSERT_EQ(table.size(), 1u);
  EXPECT_NEAR(table[0].layer_error, (0.08 + 0.5) / 2, 1e-6);
  EXPECT_NEAR(table[0].layer_error, rows[0].distribution.mean, 1e-6);
  EXPECT_NEAR(table[0].kept_share, rows[0].kept_share, 1e-6);
}

}  // namespace
}  // namespace kvreplay
