#include "base/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

namespace kvreplay {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct Block {
  void* memory;
  std::size_t bytes;
};

// What a thread keeps, the one given up last at the end.
struct Kept {
  std::vector<Block> blocks;
  ~Kept() {
    for (const Block& block : blocks) std::free(block.memory);
  }
};
thread_local Kept kept;

}  // namespace

Buffer::Buffer(Index size) : size_(size) {
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  if (bytes == 0) return;
  // The smallest that fits and is not more than half empty.
  auto best = kept.blocks.end();
  for (auto block = kept.blocks.begin(); block != kept.blocks.end(); ++block) {
    const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
    if (fits && (best == kept.blocks.end() || block->bytes < best->bytes)) best = block;
  }
  if (best != kept.blocks.end()) {
    data_ = static_cast<float*>(best->memory);
    capacity_ = best->bytes;
    kept.blocks.erase(best);
    return;
  }
  const bool large = bytes >= kHugePage;
  const std::size_t unit = large ? kHugePage : kAlignment;
  capacity_ = (bytes + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, capacity_);
  if (memory == nullptr) throw std::bad_alloc();
  if (large) ::madvise(memory, capacity_, MADV_HUGEPAGE);
  data_ = static_cast<float*>(memory);
}

void Buffer::release() {
  if (data_ == nullptr) return;
  if (kept.blocks.size() == kKept) {
    std::free(kept.blocks.front().memory);
    kept.blocks.erase(kept.blocks.begin());
  }
  kept.blocks.push_back({data_, capacity_});
  data_ = nullptr;
}

void Buffer::trim() {
  for (const Block& block : kept.blocks) std::free(block.memory);
  kept.blocks.clear();
}

}  // namespace kvreplay
