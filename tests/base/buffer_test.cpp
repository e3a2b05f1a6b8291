#include "base/buffer.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace kvreplay {
namespace {

bool is_aligned(const Buffer& buffer) { return reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 == 0; }

void fill(Buffer& buffer, float value) {
  for (float& x : buffer.part(0, buffer.size())) x = value;
}

TEST(Buffer, HasItsSizeAndAlignment) {
  for (const Index size : {1, 15, 16, 17, 1000, 524287, 524288, 600000}) {
    Buffer buffer(size);
    EXPECT_EQ(buffer.size(), size);
    EXPECT_TRUE(is_aligned(buffer)) << size;
    fill(buffer, 1);
    EXPECT_EQ(buffer.part(size - 1, 1)[0], 1.0f);
  }
  const Buffer empty;
  EXPECT_EQ(empty.size(), 0);
  EXPECT_EQ(Buffer(0).size(), 0);
}

TEST(Buffer, OnesThatAreAliveShareNothing) {
  std::vector<Buffer> buffers;
  for (int round = 0; round < 3; ++round) {
    buffers.clear();
    for (Index size = 1; size < 3000; size += 97) {
      buffers.emplace_back(size);
      fill(buffers.back(), static_cast<float>(buffers.size()));
    }
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      for (const float x : buffers[i].part(0, buffers[i].size())) ASSERT_EQ(x, static_cast<float>(i + 1));
    }
  }
}

TEST(Buffer, MovingHandsTheMemoryOn) {
  Buffer a(100);
  fill(a, 3);
  const float* memory = a.data();
  Buffer b(std::move(a));
  EXPECT_EQ(b.data(), memory);
  Buffer c(7);
  c = std::move(b);
  EXPECT_EQ(c.data(), memory);
  EXPECT_EQ(c.size(), 100);
  EXPECT_EQ(c.part(99, 1)[0], 3.0f);
}

TEST(Buffer, WhatWasGivenUpIsUsedAgainByAnyThread) {
  Buffer::give_back();
  const float* memory = nullptr;
  {
    const Buffer buffer(1000000);
    memory = buffer.data();
  }
  std::thread([memory] {
    const Buffer buffer(900000);
    EXPECT_EQ(buffer.data(), memory);
    const Buffer other(900000);  // while the first is alive
    EXPECT_NE(other.data(), memory);
  }).join();
}

TEST(Buffer, SmallOnesLeaveLargeMemoryAlone) {
  Buffer::give_back();
  const float* memory = nullptr;
  {
    const Buffer large(1000000);
    memory = large.data();
  }
  const Buffer small(1000);
  EXPECT_NE(small.data(), memory);
  const Buffer large(1000000);
  EXPECT_EQ(large.data(), memory);
}

TEST(Buffer, ThreadsThatTakeAndGiveUpDoNotMeet) {
  Buffer::keep_at_most(100000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (Index i = 0; i < 300; ++i) {
        Buffer a(1 + (i * 37 + t) % 5000);
        Buffer b(1 + (i * 91 + t) % 20000);
        fill(a, static_cast<float>(t));
        fill(b, static_cast<float>(-t));
        for (const float x : a.part(0, a.size())) ASSERT_EQ(x, static_cast<float>(t));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Buffer::keep_at_most(Index{256} << 20);
}

}  // namespace
}  // namespace kvreplay
