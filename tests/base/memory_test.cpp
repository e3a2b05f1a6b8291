#include "base/memory.h"

#include <gtest/gtest.h>

#include <vector>

namespace kvreplay {
namespace {

constexpr Index kMiB = Index{1} << 20;

TEST(Memory, IsWhatTheSystemSays) {
  const Index before = resident_memory();
  if (before == 0) GTEST_SKIP() << "this system does not say";
  EXPECT_GT(before, kMiB);
  const std::vector<char> block(static_cast<std::size_t>(64 * kMiB), 'x');
  EXPECT_GE(resident_memory(), before + 60 * kMiB);
  EXPECT_LE(resident_memory(), before + 70 * kMiB);
  EXPECT_GE(peak_resident_memory(), before + 60 * kMiB);
}

TEST(Memory, GoesBackToTheSystem) {
  if (resident_memory() == 0) GTEST_SKIP() << "this system does not say";
  give_memory_back();
  // A large block that is freed must not teach the C library to keep smaller ones.
  { const std::vector<char> large(static_cast<std::size_t>(16 * kMiB), 'x'); }
  const Index before = resident_memory();
  std::vector<std::vector<char>> stay;
  {
    std::vector<std::vector<char>> blocks;
    for (int i = 0; i < 4000; ++i) {
      blocks.emplace_back(i % 2 == 0 ? 20000 : 100000, 'x');
      if (i % 40 == 0) stay.emplace_back(100, 'x');
    }
    EXPECT_GE(resident_memory(), before + 200 * kMiB);
  }
  trim_memory();
  EXPECT_LE(resident_memory(), before + 8 * kMiB);
  EXPECT_EQ(stay.size(), 100u);
}

}  // namespace
}  // namespace kvreplay
