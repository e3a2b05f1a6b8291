#include "tracer/kv_cache.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>

#include "base/error.h"

namespace kvreplay::tracer {

KvCache::KvCache(int num_layers, int num_key_value_heads, int head_dim, Index capacity)
    : num_heads_(num_key_value_heads),
      head_dim_(head_dim),
      capacity_(capacity),
      positions_(static_cast<std::size_t>(num_layers) * static_cast<std::size_t>(num_key_value_heads)),
      keys_(static_cast<std::size_t>(num_layers)),
      values_(static_cast<std::size_t>(num_layers)) {}

KvCache::Pages KvCache::reserve() const {
  const std::size_t bytes = static_cast<std::size_t>(num_heads_ * capacity_ * head_dim_ + kReadAhead) * sizeof(float);
  // Addresses alone, without swap set aside: a run says how long it may become, and may end long before.
  void* const pages =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    throw Error(fmt::format(
        "there is no room in memory for the keys and values of {} tokens; generate fewer, or take a shorter prompt",
        capacity_));
  }
  return {static_cast<float*>(pages), {bytes}};
}

void KvCache::Unmap::operator()(float* pages) const { ::munmap(pages, bytes); }

KvCache::Rows KvCache::append(int layer, int head, Index first, Index rows) {
  std::vector<std::int32_t>& positions = positions_[index(layer, head)];
  const Index at = offset(head) + static_cast<Index>(positions.size()) * head_dim_;
  if (keys_[layer_of(layer)] == nullptr) {
    keys_[layer_of(layer)] = reserve();
    values_[layer_of(layer)] = reserve();
  }
  for (Index row = 0; row < rows; ++row) positions.push_back(static_cast<std::int32_t>(first + row));
  return {keys_[layer_of(layer)].get() + at, values_[layer_of(layer)].get() + at};
}

void KvCache::keep(int layer, int head, std::span<const Index> rows) {
  float* keys = keys_[layer_of(layer)].get() + offset(head);
  float* values = values_[layer_of(layer)].get() + offset(head);
  std::vector<std::int32_t>& positions = positions_[index(layer, head)];
  Index kept = 0;
  for (const Index row : rows) {
    if (row != kept) {
      std::copy_n(keys + row * head_dim_, head_dim_, keys + kept * head_dim_);
      std::copy_n(values + row * head_dim_, head_dim_, values + kept * head_dim_);
      positions[static_cast<std::size_t>(kept)] = positions[static_cast<std::size_t>(row)];
    }
    ++kept;
  }
  positions.resize(static_cast<std::size_t>(kept));
}

void KvCache::release(int layer) {
  for (int head = 0; head < num_heads_; ++head) positions_[index(layer, head)].clear();
  keys_[layer_of(layer)].reset();
  values_[layer_of(layer)].reset();
}

}  // namespace kvreplay::tracer
