// When a schedule evicts.
#include <gtest/gtest.h>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

// Positions after which a schedule evicts, of a cache that begins with `rows` rows, the last of them at `last`, and
// that an eviction leaves with capacity − coming rows.
std::vector<int> evictions(const Schedule& schedule, int capacity, int rows, int last, int steps) {
  std::vector<int> positions;
  for (int position = last + 1, since = last; position <= last + steps; ++position) {
    ++rows;
    if (!schedule.is_due(position, since, rows)) continue;
    if (!schedule.is_full(rows, capacity)) continue;
    positions.push_back(position);
    since = position;
    rows = std::min(rows, capacity - schedule.coming());
  }
  return positions;
}

TEST(Schedule, EvictsAfterEveryTokenByDefault) {
  const Policy policy = make_policy("snapkv+every");
  ASSERT_TRUE(policy.schedule.has_value());
  EXPECT_EQ(evictions(*policy.schedule, 10, 10, 19, 3), (std::vector<int>{20, 21, 22}));
  EXPECT_EQ(policy.canonical, "snapkv+every");
}

TEST(Schedule, CountsStepsSinceTheLastEvictionOrAllTokens) {
  const Policy since = make_policy("snapkv+every(4)");
  EXPECT_EQ(since.canonical, "snapkv+every(interval=4)");
  EXPECT_EQ(evictions(*since.schedule, 10, 10, 20, 12), (std::vector<int>{24, 28, 32}));
  const Policy position = make_policy("snapkv+every(interval=4,phase=position)");
  EXPECT_EQ(evictions(*position.schedule, 10, 10, 20, 12), (std::vector<int>{23, 27, 31}));
}

TEST(Schedule, WaitsForRowsAboveTheCapacity) {
  EXPECT_EQ(evictions(*make_policy("snapkv+every(slack=3)").schedule, 10, 10, 20, 9), (std::vector<int>{23, 26, 29}));
  EXPECT_EQ(evictions(*make_policy("snapkv+every(slack=1)").schedule, 10, 10, 20, 2),
            evictions(*make_policy("snapkv+every").schedule, 10, 10, 20, 2));
}

TEST(Schedule, MakesRoomBeforeTokensCome) {
  const Policy policy = make_policy("snapkv+every(interval=4,attend=before)");
  EXPECT_EQ(policy.schedule->coming(), 4);
  EXPECT_TRUE(policy.schedule->is_full(7, 10));
  EXPECT_FALSE(policy.schedule->is_full(6, 10));
  EXPECT_EQ(evictions(*policy.schedule, 10, 6, 20, 12), (std::vector<int>{24, 28, 32}));
}

TEST(Schedule, TakesAPlaceInTheSpec) {
  EXPECT_EQ(make_policy("rkv(interval=16)+every(8)").schedule->interval, 8) << "in place of the code's own";
  EXPECT_EQ(make_policy("h2o@h2o").schedule->interval, 1);
  EXPECT_EQ(make_policy("snapkv+every(8)+pin(prompt)").canonical, "snapkv+every(interval=8)+pin");
  EXPECT_EQ(make_policy("rkv+order(position)").order, RowOrder::position);
  EXPECT_EQ(make_policy("streamingllm+positions(reindexed)").schedule->interval, Schedule::kOnce);
}

TEST(Schedule, RefusesWhatMakesNoSense) {
  EXPECT_THROW(make_policy("snapkv+every(0)"), UsageError);
  EXPECT_THROW(make_policy("snapkv+every(4)+every(8)"), UsageError);
  EXPECT_THROW(make_policy("snapkv+every(slack=2,attend=before)"), UsageError);
  EXPECT_THROW(make_policy("snapkv+pin(prompt)"), UsageError) << "without a schedule";
  EXPECT_THROW(make_policy("snapkv+order(score)"), UsageError);
  EXPECT_THROW(make_policy("full+every(4)"), UsageError) << "no capacity";
  EXPECT_THROW(make_policy("oracle-reconstruction+every(4)"), UsageError);
  EXPECT_THROW(make_policy("snapkv(32)"), UsageError) << "no unnamed parameter";
  EXPECT_THROW(make_policy("snapkv+every(4,8)"), UsageError);
}

}  // namespace
}  // namespace kvreplay
