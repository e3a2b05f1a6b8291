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
///
/// A cache may begin with rows of another one, which it shares: then it holds sets of rows, one per KV head or one per
/// query head, of which each is some rows of the other cache and all of its own. A set of a cache that shares nothing
/// is that of a KV head.
class KvCache {
 public:
  /// Room for `capacity` rows in each head. What of it is never filled takes addresses and no memory.
  KvCache(int num_layers, int num_key_value_heads, int head_dim, Index capacity);

  /// Begins with what `whole` holds at the ascending positions `kept` [layers · sets_per_layer], layer-major; sets are
  /// those of KV heads or, being a multiple of these, of query heads. Room for `capacity` rows of its own in each head.
  /// `whole` shares nothing itself, must outlive it and keep its rows. Precondition: it holds the positions.
  KvCache(const KvCache& whole, std::span<const std::vector<int>> kept, int sets_per_layer, Index capacity);

  Index capacity() const { return capacity_; }
  int num_layers() const { return static_cast<int>(keys_.size()); }
  int sets_per_layer() const { return sets_; }

  /// Tokens that went through the model: the position of the next one.
  Index next_position() const { return next_position_; }
  void advance(Index tokens) { next_position_ += tokens; }

  /// Rows that a set holds.
  Index length(int layer, int set) const { return static_cast<Index>(positions_[index(layer, set)].size()); }

  /// Leaves only these rows of a head, which are ascending. What came after them is appended behind them. Precondition:
  /// the cache shares nothing.
  void keep(int layer, int head, std::span<const Index> rows);

  /// The ascending positions of a set's rows, [length].
  std::span<const std::int32_t> positions(int layer, int set) const { return positions_[index(layer, set)]; }

  /// Forgets a layer and gives its memory back.
  void release(int layer);

  /// The rows of a KV head that are not shared: [.., D].
  const float* keys(int layer, int head) const { return keys_[layer_of(layer)].get() + offset(head); }
  const float* values(int layer, int head) const { return values_[layer_of(layer)].get() + offset(head); }

  /// Rows first … first + count − 1 of a set, [count, D], where they lie or, where they do not lie together, copied to
  /// `gathered`, which has room for them and for kReadAhead floats more.
  const float* keys(int layer, int set, Index first, Index count, float* gathered) const;
  const float* values(int layer, int set, Index first, Index count, float* gathered) const;

  /// Where the cache that a set shares its first rows with cuts its rows into blocks of `size`, seen from the set's
  /// row 0: how many rows the block that row 0 lies in has before it. So that a set that keeps everything from some row
  /// on is summed in the same order as the whole.
  Index rows_before(int layer, int set, Index size) const;

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

  // The rows of the whole cache that a set begins with.
  struct Shared {
    Index first = 0;  // row of the whole
    Index count = 0;
    std::vector<std::int32_t> rows = {};  // of the whole; empty: the `count` neighbours from `first` on
  };

  Pages reserve() const;
  const float* rows_of(const std::vector<Pages>& own, const std::vector<Pages>* shared, int layer, int set, Index first,
                       Index count, float* gathered) const;
  int head_of(int set) const { return set / (sets_ / num_heads_); }
  std::size_t layer_of(int layer) const { return static_cast<std::size_t>(layer); }
  std::size_t index(int layer, int set) const {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(sets_) + static_cast<std::size_t>(set);
  }
  Index offset(int head) const { return head * capacity_ * head_dim_; }

  int num_heads_;
  int head_dim_;
  int sets_;
  Index capacity_;
  Index next_position_ = 0;
  std::vector<std::vector<std::int32_t>> positions_;  // [layer][set]
  const KvCache* whole_ = nullptr;
  std::vector<Shared> shared_;  // [layer][set], or none
  std::vector<Pages> keys_;     // of each layer: [head][capacity][D]
  std::vector<Pages> values_;
};

}  // namespace kvreplay::tracer
