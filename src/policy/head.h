// What a policy can see: one KV head at the moment of eviction, with the query heads that read it.
#pragma once

#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <typeindex>
#include <utility>
#include <vector>

#include "base/attention_rule.h"
#include "base/buffer.h"
#include "base/matrix.h"
#include "base/rotary.h"

namespace kvreplay {

/// The positions of a cache's entries, in its order: neighbours, as long as nothing was evicted; any that ascend; or,
/// in codes that leave survivors by score, in another order, the newest last. Cheap to copy.
class CachePositions {
 public:
  CachePositions() = default;

  /// `count` neighbours from `first` on.
  CachePositions(int first, int count) : first_(first), count_(count) {}

  /// Any, none of them twice.
  explicit CachePositions(std::vector<int> positions);

  int size() const { return count_; }
  int operator[](int entry) const { return any_ ? (*any_)[static_cast<std::size_t>(entry)] : first_ + entry; }

  /// How many of them are below `position`; they are the first. Throws Error where others stand among these.
  int count_before(int position) const;

  /// How many of the first entries are below `position`: where entries ascend, the same.
  int leading_before(int position) const;

  bool ascend() const { return !any_ || ascend_; }

  bool operator==(const CachePositions& other) const;

 private:
  int first_ = 0;
  int count_ = 0;
  std::shared_ptr<const std::vector<int>> any_;  // null: neighbours
  bool ascend_ = true;
};

/// Where a head stands and how it attends.
struct HeadShape {
  int layer = 0;
  int num_layers = 1;
  int layer_among_alike = 0;  ///< how many of the layers before this one hold as many rows as it does
  int layers_alike = 1;       ///< layers that do, this one included: all where no sliding window is at work
  int kv_head = 0;
  int num_kv_heads = 1;
  int kv_head_offset = 0;    ///< to the layer's own number, where heads of several layers decide together
  int group_size = 1;        ///< query heads that read this KV head
  int head_dim = 0;          ///< D
  int prompt_length = 0;     ///< P, tokens of the prompt
  int next_position = 0;     ///< N, of the next query: the policy decides when everything before it was in the cache
  CachePositions positions;  ///< of the rows that the policy decides about, all below N
  std::shared_ptr<const RotaryTable> rotary = nullptr;  ///< how positions turned keys and queries; null: not known
  AttentionRule rule = {};                              ///< of the layer

  /// R: the rows of the cache that the policy decides about.
  int rows() const { return positions.size(); }

  /// How many of the first `count` positions of all are still held. They are the first rows.
  int held_of_first(int count) const { return positions.leading_before(count); }

  /// The model's number of the group's query head `member`.
  int query_head(int member) const { return (kv_head + kv_head_offset) * group_size + member; }
};

/// The first position that a layer still holds when everything before `eviction_position` is in the cache: the first
/// that the next query sees. A sliding window of w lets it see itself and the w − 1 positions before it.
int first_held_position(int eviction_position, const AttentionRule& rule);

class Head;

/// One token of the decode phase: its key and value have joined the cache, and its queries have attended.
struct CacheStep {
  int position = 0;  ///< of the token, whose row is the last
  /// [group, R] what the query of each query head paid to the rows, its own included; null where nobody asked for it.
  const Matrix* attention = nullptr;
};

/// What a ranking remembers of one KV head while tokens join its cache and rows leave it: state of its own, of which a
/// ranking itself has none.
class RankingMemory {
 public:
  virtual ~RankingMemory() = default;

  /// The prompt has come, all at once: what its queries did is to be remembered of the rows of `head`. Throws Error
  /// where the head lacks what that takes.
  virtual void begin(const Head& /*head*/) {}

  /// Whether observe() looks at what the queries pay.
  virtual bool observes_attention() const { return true; }

  /// A token has come.
  virtual void observe(const CacheStep& step) = 0;

  /// `rows` are left of the cache, in its order.
  virtual void keep(std::span<const int> rows) = 0;

  /// Of policies that mask: the queries that come see `rows`, ascending, and all others stay.
  virtual void mask(std::span<const int> /*rows*/) {}
};

/// The same of a pattern that draws anew what it drew before: state of its own, of which a pattern itself has none.
class PatternMemory {
 public:
  virtual ~PatternMemory() = default;
};

/// Delivers the tensors of one head. A trace stands behind it in replay, a running model can in its place, and the head
/// may have been evicted before. `member` is a query head of the group, 0 to group_size − 1. Functions may throw Error.
class HeadSource {
 public:
  virtual ~HeadSource() = default;

  virtual const HeadShape& shape() const = 0;

  /// The entries that the queries at hand paid their attention to: last of all the R rows, before them those that are
  /// gone since, in ascending order if a sliding window has dropped them, or the newest first if a policy has. E of
  /// them.
  virtual const CachePositions& entries() const = 0;

  /// Entries first … first + count − 1 as `count` rows of D floats that follow each other.
  virtual void read_keys(Index first, Index count, float* rows) const = 0;
  virtual void read_values(Index first, Index count, float* rows) const = 0;

  /// Ascending positions, all below N, of the queries that are at hand.
  virtual std::span<const int> query_positions() const = 0;

  /// Queries first … first + count − 1 of those at query_positions(): [count, D].
  virtual Matrix queries(int member, Index first, Index count) const = 0;

  /// [R] what the newest query paid to the rows, where the source has it at hand; otherwise empty.
  virtual std::span<const float> newest_attention(int member) const;

  virtual bool has_output_projection() const = 0;
  virtual Matrix output_projection(int member) const = 0;  ///< [C, D], the columns of W_O that this head goes through

  /// projection_factor_of(output_projection(member)), where the source has it at hand or can have it cheaper: [D, D].
  virtual Matrix projection_factor(int member) const;

  /// The attention that each of the E entries received from all causal queries before N, where that was recorded.
  virtual std::optional<std::vector<float>> attention_mass(int member) const = 0;

  /// The prompt from N on, where a capture reads on: ascending positions of its queries at hand, ...
  virtual std::span<const int> later_positions() const { return {}; }
  /// ... those queries, [.., D], ...
  virtual Matrix later_queries(int member) const;
  /// ... and all keys of positions N … P − 1: [P − N, D].
  virtual Matrix later_keys() const;

  /// What comes from N on, for oracles alone: ascending positions of the evaluation queries, none where the
  /// source cannot look ahead, ...
  virtual std::span<const int> evaluation_positions() const { return {}; }
  /// ... those queries, [E, D], ...
  virtual Matrix evaluation_queries(int member) const;
  /// ... and all keys of the full cache that they can see: [last evaluation position + 1, D].
  virtual Matrix evaluation_keys() const;
  /// ... and their values.
  virtual Matrix evaluation_values() const;

  /// What the ranking that will be asked remembers of this head; null where there is nothing to remember.
  virtual const RankingMemory* memory() const { return nullptr; }

  /// What the pattern that will be drawn remembers of this head, and changes as it is drawn; or null.
  virtual PatternMemory* pattern_memory() const { return nullptr; }
};

/// A head whose cache keeps only some of the rows of another one: what a policy sees that decides once more. The
/// queries at hand paid their attention to these rows alone, as they would in the evicted cache.
class EvictedHead : public HeadSource {
 public:
  /// `rows` of `whole`, ascending; `whole` must outlive it.
  EvictedHead(const HeadSource& whole, std::vector<int> rows);

  const HeadShape& shape() const override { return shape_; }
  const CachePositions& entries() const override { return shape_.positions; }
  void read_keys(Index first, Index count, float* rows) const override;
  void read_values(Index first, Index count, float* rows) const override;
  std::span<const int> query_positions() const override { return whole_.query_positions(); }
  Matrix queries(int member, Index first, Index count) const override { return whole_.queries(member, first, count); }
  bool has_output_projection() const override { return whole_.has_output_projection(); }
  Matrix output_projection(int member) const override { return whole_.output_projection(member); }
  Matrix projection_factor(int member) const override { return whole_.projection_factor(member); }
  /// What was recorded is of the whole cache.
  std::optional<std::vector<float>> attention_mass(int /*member*/) const override { return std::nullopt; }
  std::span<const int> later_positions() const override { return whole_.later_positions(); }
  Matrix later_queries(int member) const override { return whole_.later_queries(member); }
  Matrix later_keys() const override { return whole_.later_keys(); }
  std::span<const int> evaluation_positions() const override { return whole_.evaluation_positions(); }
  Matrix evaluation_queries(int member) const override { return whole_.evaluation_queries(member); }
  Matrix evaluation_keys() const override { return whole_.evaluation_keys(); }
  Matrix evaluation_values() const override { return whole_.evaluation_values(); }

 private:
  template <class Read>
  void gather(Index first, Index count, float* rows, const Read& read) const;

  const HeadSource& whole_;
  std::vector<int> entries_;  // of the whole head's, which the rows are
  HeadShape shape_;
};

/// How many queries before `next_position` are at hand without a gap, counted back from the last one.
int contiguous_window(std::span<const int> query_positions, int next_position);

/// A weighted sum of the attention of the observation window's queries, and what is asked about it. Every temporal
/// smoothing is such a sum.
struct WindowCombination {
  /// Which distances are asked for.
  enum class Distance {
    none,
    values,     ///< ‖o − v_n‖
    projected,  ///< ‖W (o − v_n)‖, W being the part of the output projection that the query head goes through
  };

  std::vector<float> weights = {};  ///< a weight per query of the window, oldest first
  Distance distance = Distance::none;
  bool whole_cache = false;  ///< o = Σ a_n v_n runs over all entries; else over those before the window's positions

  auto operator<=>(const WindowCombination&) const = default;
};

/// The answer for one query head.
struct CombinedAttention {
  std::span<const float>
      attention;  ///< [R] a_n = Σ_i weights[i] · A[i, n], A the softmax attention of the window's queries
  std::span<const float> distance;     ///< for the rows that o runs over; empty where it was not asked for
  float output_length = 0;             ///< ‖o‖ or ‖W o‖
  std::shared_ptr<const void> memory;  ///< what the spans lie in lives as long as this
};

/// A head as policies see it. Quantities that several policies need are computed on first use and kept, so that a run
/// of many policies, capacities and parameters pays for each of them once. Not for use by several threads at once.
///
/// All it tells is of the R rows of the cache, row n holding position positions()[n]. Where a sliding window has
/// dropped earlier ones, attention is nevertheless what the queries paid when they still saw them, of which the held
/// columns are left: they need not sum to 1, and are 0 for a query that saw none of them. So is o = Σ a_n v_n the
/// output that these queries had.
///
/// Arithmetic is float32. Logits are summed over the head dimension in its order; exponentials are taken and summed in
/// blocks of 512 entries against the block's maximum, and blocks are put together in double. Outputs are summed in
/// float32 over a block and in double over blocks. Squared distances are ‖W o‖² − 2 (WᵀW o)·v + ‖W v‖²; where that
/// loses more than six bits, W (o − v) itself is taken.
class Head {
 public:
  /// `kept_bytes`: how much memory combinations may keep; what exceeds it is computed again when asked for again.
  explicit Head(const HeadSource& source, Index kept_bytes = Index{1} << 28);
  ~Head();
  Head(const Head&) = delete;
  Head& operator=(const Head&) = delete;

  const HeadShape& shape() const { return shape_; }
  int rows() const { return shape_.rows(); }
  const CachePositions& positions() const { return shape_.positions; }  ///< [R]

  /// What Ranking::memory() gave for this head and has observed since; null where there is none.
  const RankingMemory* memory() const { return memory_; }

  const Matrix& keys() const;    ///< [R, D]
  const Matrix& values() const;  ///< [R, D]

  /// All entries that queries paid attention to, [E], and their keys, [E, D]: more than the rows where a sliding window
  /// has dropped some. Read anew at every call.
  const CachePositions& entries() const { return source_.entries(); }
  Matrix entry_keys() const;

  /// The last `count` queries before shape().next_position of query head `member`: [count, D], oldest first. Throws
  /// Error if one of them was not captured.
  Matrix queries(int member, int count) const;

  /// Computes, in one pass for all of them, combinations that will be asked for. Rankings tell theirs in
  /// requirements(). Throws Error if a query of a window was not captured.
  void prepare(std::span<const WindowCombination> combinations) const;

  /// The window's attention, combined. Without an output projection, Distance::projected is Distance::values. Throws
  /// Error if a query of the window was not captured.
  CombinedAttention combined_attention(int member, const WindowCombination& asked) const;

  /// The entries [first, end) that the query at `position` sees.
  std::pair<Index, Index> visible(int position) const;

  /// Softmax attention of `queries` [n, D] of query head `member` to `keys` [m, D], one query after the other: the
  /// query `i` sees the keys [first, end) that `seen` tells, and `take` receives its weights [m], 0 for all others.
  void attend(int member, const Matrix& queries, const Matrix& keys,
              const std::function<std::pair<Index, Index>(Index query)>& seen,
              const std::function<void(Index query, std::span<const float> weights)>& take) const;

  /// The prompt from N on, for methods that are told more than the cache's own past: the queries [P − N, D] of query
  /// head `member` and the keys [P − N, D]. Throws Error if the prompt ends at N or one of the queries was not
  /// captured.
  Matrix later_queries(int member) const;
  Matrix later_keys() const { return source_.later_keys(); }

  /// Softmax attention of the query at position N − 1 − age: [R], zero where it cannot look. Throws Error if that query
  /// was not captured. Kept, or written to `out` [R] alone.
  std::span<const float> attention(int member, int age) const;
  void copy_attention(int member, int age, std::span<float> out) const;

  /// Σ over all queries before N of causal attention, per row: [R]. Taken from the recorded attention mass, or computed
  /// where all queries are at hand. Throws Error where neither is.
  const std::vector<float>& accumulated_attention(int member) const;

  /// Σ over the evaluation queries of full attention, per row: [R]. No policy can know it: for oracles.
  /// Throws Error where the source cannot look ahead.
  const std::vector<float>& evaluation_attention(int member) const;

  /// What comes from N on, for oracles that decide again and again: positions of the evaluation queries, those queries
  /// [E, D], and all keys of the full cache that they can see [last position + 1, D]. Read anew at every call; nothing
  /// where the source cannot look ahead.
  std::span<const int> evaluation_positions() const { return source_.evaluation_positions(); }
  Matrix evaluation_queries(int member) const { return source_.evaluation_queries(member); }
  Matrix evaluation_keys() const { return source_.evaluation_keys(); }

  bool has_output_projection() const { return has_output_projection_; }

  /// The columns of the output projection that this query head goes through: [C, D]. Read anew at every call.
  Matrix output_projection(int member) const { return source_.output_projection(member); }

  /// What `compute()` gives for `key`, computed once for this head: for what settings of one method have in common. Key
  /// is a type of the method's own, which can be compared with <.
  template <class Key, class Compute>
  const auto& once(const Key& key, const Compute& compute) const {
    using Answers = std::map<Key, decltype(compute())>;
    std::shared_ptr<void>& answers = answers_[typeid(Answers)];
    if (!answers) answers = std::make_shared<Answers>();
    auto& known = *static_cast<Answers*>(answers.get());
    const auto found = known.find(key);
    return found != known.end() ? found->second : known.emplace(key, compute()).first->second;
  }

  /// The most bytes that a head takes for windows of up to `window` queries, and for `combinations` that are prepared
  /// together. keys(), values() and single rows of attention() come on top.
  static Index memory(const HeadShape& shape, int window);
  static Index combination_memory(const HeadShape& shape, int window, Index combinations);

  /// The most bytes that evaluation_attention() takes while it works, over `tokens` keys.
  static Index evaluation_memory(const HeadShape& shape, Index tokens);

 private:
  class WindowPass;
  struct Batch;
  struct Shared;
  const WindowPass& window_pass(int window) const;
  Index output_end(const WindowCombination& combination) const;
  const float* value_rows(Index first, Index count, Buffer& memory) const;
  void measure_distances(Batch& batch, Index distances, const Matrix& outputs) const;

  const HeadSource& source_;
  HeadShape shape_;
  Index kept_bytes_;
  const RankingMemory* memory_;
  bool has_output_projection_;
  Index entries_;      // E
  Index first_row_;    // the entry that row 0 is
  Index first_block_;  // the first entry of the block that it lies in: whole blocks are worked on
  std::unique_ptr<Shared> shared_;
  mutable std::map<std::type_index, std::shared_ptr<void>> answers_;  // of once(), by the type that holds them
};

}  // namespace kvreplay
