// Work that is shared is done once, all of it, and its failures are heard.
#include "tracer/execution.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace kvreplay::tracer {
namespace {

constexpr Index kMuch = Index{1} << 40;

TEST(Execution, DoesEveryPieceOnce) {
  for (const int threads : {1, 2, 7}) {
    const Execution execution(threads);
    for (int round = 0; round < 500; ++round) {
      const Index pieces = round % 13;
      std::vector<int> done(static_cast<std::size_t>(pieces));
      execution.share(pieces, kMuch, [&](Index piece, int) { ++done[static_cast<std::size_t>(piece)]; });
      ASSERT_EQ(done, std::vector<int>(done.size(), 1));
    }
  }
}

TEST(Execution, TellsApartWhoWorksAtTheSameTime) {
  const Execution execution(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<bool> shared = false;
  for (int round = 0; round < 50; ++round) {
    execution.share(64, kMuch, [&](Index, int worker) {
      if (++busy.at(static_cast<std::size_t>(worker)) > 1) shared = true;
      --busy[static_cast<std::size_t>(worker)];
    });
  }
  EXPECT_FALSE(shared);
}

TEST(Execution, KeepsLittleWorkToItself) {
  const Execution execution(4);
  int sum = 0;
  execution.share(100, 1000, [&](Index, int worker) { sum += worker == 0 ? 1 : 1000; });
  EXPECT_EQ(sum, 100);
}

TEST(Execution, ThrowsWhatAPieceThrowsAndGoesOn) {
  const Execution execution(3);
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(execution.share(20, kMuch,
                                 [](Index piece, int) {
                                   if (piece == 11) throw std::runtime_error("eleven");
                                 }),
                 std::runtime_error);
    std::atomic<int> done = 0;
    execution.share(20, kMuch, [&](Index, int) { ++done; });
    EXPECT_EQ(done, 20);
  }
}

}  // namespace
}  // namespace kvreplay::tracer
