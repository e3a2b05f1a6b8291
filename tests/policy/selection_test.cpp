#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

TEST(SelectTop, KeepsProtectedPositionsAndTheBest) {
  const std::vector<float> scores = {0, 5, 1, 9, 3, 0, 0};
  EXPECT_EQ(select_top(scores, {.sinks = 1, .window = 2}, 5), (std::vector<int>{0, 1, 3, 5, 6}));
}

TEST(SelectTop, AmongEqualScoresTheEarlierPositionWins) {
  const std::vector<float> scores(10, 1.0f);
  EXPECT_EQ(select_top(scores, {.window = 2}, 5), (std::vector<int>{0, 1, 2, 8, 9}));
}

TEST(SelectTop, InfinitiesAreOrdered) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores = {-infinity, 1, infinity, 0};
  EXPECT_EQ(select_top(scores, {}, 2), (std::vector<int>{1, 2}));
}

TEST(SelectTop, NotANumberIsNamed) {
  std::vector<float> scores(6, 1.0f);
  scores[3] = std::numeric_limits<float>::quiet_NaN();
  try {
    select_top(scores, {}, 2);
    FAIL() << "NaN was taken for a score";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("position 3"), std::string::npos);
  }
  EXPECT_EQ(select_top(scores, {.window = 3}, 4).size(), 4u) << "a protected position is not ranked";
}

TEST(SelectTop, HoldsExactlyTheCapacityAscendingAndTheBest) {
  std::mt19937 generator(2);
  for (int round = 0; round < 300; ++round) {
    std::vector<float> scores(1 + generator() % 60);
    for (float& score : scores) score = static_cast<float>(generator() % 8);  // many ties
    const Protection protection{static_cast<int>(generator() % 4), static_cast<int>(generator() % 5)};
    const int capacity = std::max(protection.count(), 1) + static_cast<int>(generator() % 40);
    const std::vector<int> kept = select_top(scores, protection, capacity);
    const int size = static_cast<int>(scores.size());
    ASSERT_EQ(kept.size(), std::min<std::size_t>(static_cast<std::size_t>(capacity), scores.size()));
    ASSERT_TRUE(std::ranges::is_sorted(kept, std::less_equal<>()));
    const auto is_kept = [&kept](int position) { return std::ranges::binary_search(kept, position); };
    for (int i = 0; i < std::min(size, protection.sinks); ++i) ASSERT_TRUE(is_kept(i));
    for (int i = std::max(0, size - protection.window); i < size; ++i) ASSERT_TRUE(is_kept(i));
    for (int a = protection.sinks; a < size - protection.window; ++a) {
      for (int b = protection.sinks; b < size - protection.window; ++b) {
        const float score_a = scores[static_cast<std::size_t>(a)];
        const float score_b = scores[static_cast<std::size_t>(b)];
        if (is_kept(a) && !is_kept(b)) {
          ASSERT_TRUE(score_a > score_b || (score_a == score_b && a < b));
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvreplay
