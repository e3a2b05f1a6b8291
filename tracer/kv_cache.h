// The keys and values that attention reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/matrix.h"

namespace kvreplay::tracer {

/// Keys and values of every layer and KV head, a row per cached token, in float32 as they are attended to (keys after
/// rotary embedding). Every head counts its own rows and knows their positions, so that heads may hold different
/// tokens.
class KvCache {
 public:
  /// Room for `capacity` rows in each head. What of it is never filled takes addresses and no memory.
  KvCache(int num_layers, int num_key_value_heads, int head_dim, Index capacity);

  Index capacity() const { return capacity_; }

  /// Tokens that went through the model: the position of the next one.
  Index next_position() const { return next_position_; }
  void advance(Index tokens) { next_position_ += tokens; }

  /// Rows that a head holds.
  Index length(int layer, int head) const { return static_cast<Index>(positions_[index(layer, head)].size()); }

  /// Leaves only these rows of a head, which are ascending. What came after them is appended behind them.
  void keep(int layer, int head, std::span<const Index> rows);

  /// The ascending positions of a head's rows, [length].
  std::span<const std::int32_t> positions(int layer, int head) const { return positions_[index(layer, head)]; }

  /// Forgets a layer and gives its memory back.
  void release(int layer);

  /// [length, D].
  const float* keys(int layer, int head) const { return keys_[layer_of(layer)].get() + offset(head); }
  const float* values(int layer, int head) const { return values_[layer_of(layer)].get() + offset(head); }

  /// Floats behind the last row that may be read, though they mean nothing.
  static constexpr Index kReadAhead = 64;

  /// Makes room for `rows` more rows at the end of a head, of tokens from position `first` on, and gives the place of
  /// the first of them. Precondition: they fit the capacity. Throws Error where the system has no room for it.
  struct Rows {
    float* keys;
    float* values;
  };
  Rows append(int layer, int head, Index first, Index rows);

 private:
  // Pages that are zero, and the system's until they are written to.
  struct Unmap {
    std::size_t bytes = 0;
    void operator()(float* pages) const;
  };
  using Pages = std::unique_ptr<float[], Unmap>;

  Pages reserve() const;
  std::size_t layer_of(int layer) const { return static_cast<std::size_t>(layer); }
  std::size_t index(int layer, int head) const {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(num_heads_) + static_cast<std::size_t>(head);
  }
  Index offset(int head) const { return head * capacity_ * head_dim_; }

  int num_heads_;
  int head_dim_;
  Index capacity_;
  Index next_position_ = 0;
  std::vector<std::vector<std::int32_t>> positions_;
  std::vector<Pages> keys_;  // of each layer: [head][capacity][D]
  std::vector<Pages> values_;
};

}  // namespace kvreplay::tracer
