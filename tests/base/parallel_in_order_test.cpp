#include "base/parallel_in_order.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <future>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace kvreplay {
namespace {

TEST(ParallelInOrder, HandsOutInOrderOnTheCallingThread) {
  for (const int threads : {1, 2, 5}) {
    std::vector<int> handed;
    const std::thread::id caller = std::this_thread::get_id();
    parallel_in_order(
        40, [](int i) { return std::string(static_cast<std::size_t>(i), 'x'); },
        [&](int i, const std::string& result) {
          EXPECT_EQ(std::this_thread::get_id(), caller);
          EXPECT_EQ(result.size(), static_cast<std::size_t>(i));
          handed.push_back(i);
        },
        threads);
    std::vector<int> all(40);
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(handed, all);
  }
  parallel_in_order(
      0, [](int) { return 0; }, [](int, int) { FAIL(); }, 2);
}

TEST(ParallelInOrder, WorksOnPiecesAtTheSameTime) {
  // Each piece ends once the other has begun.
  std::array<std::promise<void>, 2> begun;
  parallel_in_order(
      2,
      [&](int i) {
        begun[static_cast<std::size_t>(i)].set_value();
        const auto other = begun[static_cast<std::size_t>(1 - i)].get_future();
        return other.wait_for(std::chrono::seconds(60)) == std::future_status::ready;
      },
      [](int, bool met) { EXPECT_TRUE(met); }, 2);
}

TEST(ParallelInOrder, BeginsNoMoreThanItPromises) {
  std::atomic<int> begun = 0;
  int handed = 0;
  parallel_in_order(
      30, [&](int) { return ++begun - 1; },
      [&](int, int) {
        EXPECT_LE(begun, handed + 2 * 3 - 1);
        ++handed;
      },
      3);
  EXPECT_EQ(handed, 30);
}

TEST(ParallelInOrder, HandsOutWhatStandsBeforeAFailure) {
  for (const int threads : {1, 2, 5}) {
    std::vector<int> handed;
    const auto work = [](int i) {
      if (i == 3 || i == 4) throw std::runtime_error(std::to_string(i));
      return i;
    };
    try {
      parallel_in_order(
          20, work, [&](int i, int) { handed.push_back(i); }, threads);
      ADD_FAILURE() << "threw nothing";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "3");
    }
    EXPECT_EQ(handed, (std::vector<int>{0, 1, 2}));
  }
}

TEST(ParallelInOrder, StopsWhereHandingOutFails) {
  for (const int threads : {1, 2, 5}) {
    std::atomic<int> begun = 0;
    std::vector<int> handed;
    const auto done = [&](int i, int) {
      handed.push_back(i);
      if (i == 2) throw std::runtime_error("full");
    };
    EXPECT_THROW(parallel_in_order(
                     1000, [&](int) { return ++begun; }, done, threads),
                 std::runtime_error);
    EXPECT_EQ(handed, (std::vector<int>{0, 1, 2}));
    EXPECT_LE(begun, 3 + 2 * threads);
  }
}

}  // namespace
}  // namespace kvreplay
