#include "tracer/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kHeads = 2;
constexpr int kDim = 4;

// Rows whose elements are their positions, from `first` on, in both heads.
void append(KvCache& cache, Index first, Index rows) {
  for (int head = 0; head < kHeads; ++head) {
    const KvCache::Rows place = cache.append(0, head, first, rows);
    for (Index row = 0; row < rows; ++row) {
      std::fill_n(place.keys + row * kDim, kDim, static_cast<float>(first + row));
      std::fill_n(place.values + row * kDim, kDim, -static_cast<float>(first + row));
    }
  }
}

std::vector<float> first_elements(const float* rows, Index count) {
  std::vector<float> elements;
  for (Index row = 0; row < count; ++row) elements.push_back(rows[row * kDim]);
  return elements;
}

Index resident_bytes() {
  std::ifstream file("/proc/self/statm");
  Index pages = 0;
  file >> pages >> pages;
  return pages * ::sysconf(_SC_PAGESIZE);
}

TEST(KvCache, HeadsMayHoldDifferentTokens) {
  KvCache cache(1, kHeads, kDim, 6);
  append(cache, 0, 5);
  cache.keep(0, 1, std::vector<Index>{0, 3});
  append(cache, 5, 1);
  EXPECT_THAT(cache.positions(0, 0), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(cache.positions(0, 1), ElementsAre(0, 3, 5));
  EXPECT_THAT(first_elements(cache.keys(0, 0), 6), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(first_elements(cache.keys(0, 1), 3), ElementsAre(0, 3, 5));
  EXPECT_THAT(first_elements(cache.values(0, 1), 3), ElementsAre(0, -3, -5));
}

TEST(KvCache, AReleasedLayerBeginsAnew) {
  KvCache cache(1, kHeads, kDim, 6);
  append(cache, 0, 5);
  cache.release(0);
  EXPECT_EQ(cache.length(0, 0), 0);
  append(cache, 2, 1);
  EXPECT_THAT(first_elements(cache.keys(0, 1), 1), ElementsAre(2));
}

TEST(KvCache, WhatIsNotFilledTakesNoMemory) {
  const Index before = resident_bytes();
  KvCache cache(1, kHeads, kDim, 100'000'000);  // 6.4 GB
  append(cache, 0, 5);
  EXPECT_LT(resident_bytes() - before, Index{64} << 20);
}

TEST(KvCache, SaysThatThereIsNoRoom) {
  KvCache cache(1, kHeads, kDim, Index{1} << 50);
  EXPECT_THAT(message_of<Error>([&] { cache.append(0, 0, 0, 1); }),
              HasSubstr("no room in memory for the keys and values of 1125899906842624 tokens; generate fewer"));
}

}  // namespace
}  // namespace kvreplay::tracer
