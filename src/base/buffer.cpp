#include "base/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "base/memory.h"

namespace kvreplay {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = std::size_t{4} << 10;

// A block that is taken from the pool may have room for this share of what the pool may hold beside what was asked for.
constexpr std::size_t kShareUnused = 16;

struct Block {
  void* memory;
  std::size_t bytes;
};

// What was given up and is kept, the latest at the end.
struct Pool {
  std::mutex lock;
  std::vector<Block> blocks;
  std::size_t bytes = 0;
  std::size_t limit = static_cast<std::size_t>(kBuffersKept);

  // With the lock held.
  Block take(std::vector<Block>::iterator block) {
    const Block taken = *block;
    bytes -= taken.bytes;
    blocks.erase(block);
    return taken;
  }
  void shrink_to(std::size_t most) {
    while (bytes > most) std::free(take(blocks.begin()).memory);
  }
};

Pool& pool() {
  // Never destroyed: buffers of static duration may be given up after everything else.
  static auto* const instance = new Pool;
  return *instance;
}

}  // namespace

Buffer::Buffer(Index size) : size_(size) {
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  if (bytes == 0) return;
  {
    Pool& kept = pool();
    const std::lock_guard guard(kept.lock);
    // The smallest that fits and is not more than half empty.
    auto best = kept.blocks.end();
    for (auto block = kept.blocks.begin(); block != kept.blocks.end(); ++block) {
      const bool fits =
          block->bytes >= bytes && block->bytes / 2 <= bytes && block->bytes - bytes <= kept.limit / kShareUnused;
      if (fits && (best == kept.blocks.end() || block->bytes < best->bytes)) best = block;
    }
    if (best != kept.blocks.end()) {
      const Block taken = kept.take(best);
      data_ = static_cast<float*>(taken.memory);
      capacity_ = taken.bytes;
      return;
    }
  }
  const bool large = bytes >= kHugePage;
  const std::size_t unit = large ? kPage : kAlignment;
  capacity_ = (bytes + unit - 1) / unit * unit;
  void* memory = nullptr;
  if (::posix_memalign(&memory, large ? kHugePage : kAlignment, capacity_) != 0) throw std::bad_alloc();
  if (large) ::madvise(memory, capacity_, MADV_HUGEPAGE);
  data_ = static_cast<float*>(memory);
}

void Buffer::release() {
  if (data_ == nullptr) return;
  Pool& kept = pool();
  const std::lock_guard guard(kept.lock);
  kept.blocks.push_back({std::exchange(data_, nullptr), capacity_});
  kept.bytes += capacity_;
  kept.shrink_to(kept.limit);
}

void Buffer::keep_at_most(Index bytes) {
  Pool& kept = pool();
  const std::lock_guard guard(kept.lock);
  kept.limit = static_cast<std::size_t>(bytes);
  kept.shrink_to(kept.limit);
}

void Buffer::give_back() {
  Pool& kept = pool();
  const std::lock_guard guard(kept.lock);
  kept.shrink_to(0);
}

}  // namespace kvreplay
