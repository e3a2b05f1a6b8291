#include "tracer/kv_cache.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>

#include "base/error.h"

namespace kvreplay::tracer {

KvCache::KvCache(int num_layers, int num_key_value_heads, int head_dim, Index capacity)
    : num_heads_(num_key_value_heads),
      head_dim_(head_dim),
      sets_(num_key_value_heads),
      capacity_(capacity),
      positions_(static_cast<std::size_t>(num_layers) * static_cast<std::size_t>(num_key_value_heads)),
      keys_(static_cast<std::size_t>(num_layers)),
      values_(static_cast<std::size_t>(num_layers)) {}

KvCache::KvCache(const KvCache& whole, std::span<const std::vector<int>> kept, int sets_per_layer, Index capacity)
    : num_heads_(whole.num_heads_),
      head_dim_(whole.head_dim_),
      sets_(sets_per_layer),
      capacity_(capacity),
      next_position_(whole.next_position_),
      whole_(&whole),
      shared_(kept.size()),
      keys_(whole.keys_.size()),
      values_(whole.values_.size()) {
  positions_.reserve(kept.size());
  for (std::size_t set = 0; set < kept.size(); ++set) {
    positions_.emplace_back(kept[set].begin(), kept[set].end());
    const auto layer = static_cast<int>(set) / sets_;
    const std::span<const std::int32_t> held = whole.positions(layer, head_of(static_cast<int>(set) % sets_));
    Shared& shared = shared_[set];
    shared.count = static_cast<Index>(kept[set].size());
    auto row = held.begin();
    for (const std::int32_t position : positions_.back()) {
      row = std::lower_bound(row, held.end(), position);
      shared.rows.push_back(static_cast<std::int32_t>(row - held.begin()));
    }
    if (shared.count == 0) continue;
    shared.first = shared.rows.front();
    if (shared.rows.back() - shared.rows.front() + 1 == shared.count) shared.rows = {};
  }
}

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
  const int sets = sets_ / num_heads_;
  const std::size_t any = index(layer, head * sets);
  const Index shared = shared_.empty() ? 0 : shared_[any].count;
  const Index at = offset(head) + (static_cast<Index>(positions_[any].size()) - shared) * head_dim_;
  if (keys_[layer_of(layer)] == nullptr) {
    keys_[layer_of(layer)] = reserve();
    values_[layer_of(layer)] = reserve();
  }
  for (int set = head * sets; set < (head + 1) * sets; ++set) {
    std::vector<std::int32_t>& positions = positions_[index(layer, set)];
    for (Index row = 0; row < rows; ++row) positions.push_back(static_cast<std::int32_t>(first + row));
  }
  return {keys_[layer_of(layer)].get() + at, values_[layer_of(layer)].get() + at};
}

const float* KvCache::keys(int layer, int set, Index first, Index count, float* gathered) const {
  return rows_of(keys_, whole_ != nullptr ? &whole_->keys_ : nullptr, layer, set, first, count, gathered);
}

const float* KvCache::values(int layer, int set, Index first, Index count, float* gathered) const {
  return rows_of(values_, whole_ != nullptr ? &whole_->values_ : nullptr, layer, set, first, count, gathered);
}

const float* KvCache::rows_of(const std::vector<Pages>& own, const std::vector<Pages>* shared, int layer, int set,
                              Index first, Index count, float* gathered) const {
  const Index head = offset(head_of(set));
  if (shared_.empty()) return own[layer_of(layer)].get() + head + first * head_dim_;
  const Shared& of = shared_[index(layer, set)];
  const float* const own_rows = own[layer_of(layer)].get() + head;
  if (first >= of.count) return own_rows + (first - of.count) * head_dim_;
  const float* const whole_rows = (*shared)[layer_of(layer)].get() + whole_->offset(head_of(set));
  if (of.rows.empty() && first + count <= of.count) return whole_rows + (of.first + first) * head_dim_;
  for (Index row = first; row < first + count; ++row) {
    const float* from = own_rows + (row - of.count) * head_dim_;
    if (row < of.count) {
      from = whole_rows + (of.rows.empty() ? of.first + row : of.rows[static_cast<std::size_t>(row)]) * head_dim_;
    }
    std::copy_n(from, head_dim_, gathered + (row - first) * head_dim_);
  }
  return gathered;
}

Index KvCache::rows_before(int layer, int set, Index size) const {
  if (shared_.empty()) return 0;
  const Shared& of = shared_[index(layer, set)];
  return of.rows.empty() ? of.first % size : 0;
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
  for (int set = 0; set < sets_; ++set) positions_[index(layer, set)].clear();
  keys_[layer_of(layer)].reset();
  values_[layer_of(layer)].reset();
}

}  // namespace kvreplay::tracer
