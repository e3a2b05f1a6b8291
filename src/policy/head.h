// What a policy can see: one KV head at the moment of eviction, with the query heads that read it.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// Where a head stands and how it attends.
struct HeadShape {
  int layer = 0;
  int num_layers = 1;
  int kv_head = 0;
  int num_kv_heads = 1;
  int group_size = 1;     ///< query heads that read this KV head
  int head_dim = 0;       ///< D
  int prompt_length = 0;  ///< P, the positions in the cache when the policy decides
  double softmax_scale = 1;
  int sliding_window = 0;  ///< keys that a query sees, its own included; 0: all before it
  double attn_logit_softcapping = 0;

  /// The model's number of the group's query head `member`.
  int query_head(int member) const { return kv_head * group_size + member; }
};

/// Delivers the tensors of one head. A trace stands behind it in replay, a running model can in its place.
/// `member` is a query head of the group, 0 to group_size − 1. Functions may throw Error.
class HeadSource {
 public:
  virtual ~HeadSource() = default;

  virtual const HeadShape& shape() const = 0;
  virtual Matrix keys() const = 0;    ///< [P, D]
  virtual Matrix values() const = 0;  ///< [P, D]

  /// Ascending positions, all below P, of the prompt queries that are at hand.
  virtual std::span<const int> query_positions() const = 0;

  /// Queries first … first + count − 1 of those at query_positions(): [count, D].
  virtual Matrix queries(int member, Index first, Index count) const = 0;

  virtual bool has_output_projection() const = 0;
  virtual Matrix output_projection(int member) const = 0;  ///< [C, D], the columns of W_O that this head goes through

  /// The attention that each of the P positions received from all causal prompt queries, where that was recorded.
  virtual std::optional<std::vector<float>> attention_mass(int member) const = 0;

  /// What comes after the eviction, for oracles alone: ascending positions of the evaluation queries, none where the
  /// source cannot look ahead, ...
  virtual std::span<const int> evaluation_positions() const { return {}; }
  /// ... those queries, [E, D], ...
  virtual Matrix evaluation_queries(int member) const;
  /// ... and all keys that they can see: [last evaluation position + 1, D].
  virtual Matrix evaluation_keys() const;
};

/// How many of the prompt's queries are at hand without a gap, counted back from the last one before the eviction.
int contiguous_window(std::span<const int> query_positions, int prompt_length);

/// A head as policies see it. Quantities that several policies need are computed on first use and kept, so that a run
/// of many policies, capacities and parameters pays for each of them once. Not for use by several threads at once.
class Head {
 public:
  explicit Head(const HeadSource& source);
  ~Head();
  Head(const Head&) = delete;
  Head& operator=(const Head&) = delete;

  const HeadShape& shape() const { return shape_; }
  int prompt_length() const { return shape_.prompt_length; }

  const Matrix& keys() const;    ///< [P, D]
  const Matrix& values() const;  ///< [P, D]

  /// Softmax attention of the prompt query at position P − 1 − age over all positions: [P], zero where it cannot look.
  /// Throws Error if that query was not captured.
  std::span<const float> attention(int member, int age) const;

  /// Σ_i weights[i] · attention of the window's i-th query, oldest first, over positions 0 … out.size() − 1; the window
  /// is the last weights.size() prompt queries. Throws Error if one of them was not captured.
  void combine_attention(int member, std::span<const float> weights, std::span<float> out) const;

  /// What the query at position P − 1 − age gets from the full cache: [D].
  std::span<const float> attention_output(int member, int age) const;

  /// Σ over all prompt queries of causal attention, per position: [P]. Taken from the recorded attention mass, or
  /// computed where all prompt queries are at hand. Throws Error where neither is.
  const std::vector<float>& accumulated_attention(int member) const;

  /// The same as KVCache-Factory's H2O computes it: only the last `window` queries are masked causally among the last
  /// `window` keys; every earlier query looks at all P keys, the later ones too. Throws Error unless all prompt queries
  /// are at hand.
  std::vector<float> unmasked_accumulated_attention(int member, int window) const;

  /// Σ over the evaluation queries of full attention, per prompt position: [P]. No policy can know it: for oracles.
  /// Throws Error where the source cannot look ahead.
  std::vector<float> evaluation_attention(int member) const;

  bool has_output_projection() const { return has_output_projection_; }

  /// The columns of the output projection that this query head goes through: [C, D]. Read anew at every call.
  Matrix output_projection(int member) const { return source_.output_projection(member); }

  /// R, upper triangular of at most D rows, with ‖R x‖ = ‖W x‖ for every x of D elements, W being the columns of the
  /// output projection that this query head goes through. Lengths after the projection thus cost D² instead of C·D.
  const Matrix& projection_factor(int member) const;

  /// values · Rᵀ: [P, rows of R]. Distances between its rows are distances after the output projection.
  const Matrix& projected_values(int member) const;

 private:
  struct Shared;
  Matrix logits(const Matrix& queries) const;

  const HeadSource& source_;
  HeadShape shape_;
  bool has_output_projection_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace kvreplay
