// The forward pass of a decoder-only transformer, layer by layer over all new tokens, so that weights are read once
// however long the prompt is.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "tracer/attention.h"
#include "tracer/kv_cache.h"
#include "tracer/linear.h"
#include "tracer/model.h"

namespace kvreplay::tracer {

/// What a layer's attention saw and produced for the tokens of one forward pass; their keys and values are the last
/// `count` rows of the cache.
struct LayerAttention {
  int layer = 0;
  Index first_position = 0;
  Index count = 0;
  std::span<const float> queries;          ///< [count, H·D], after rotary embedding, not scaled
  std::span<const float> outputs;          ///< [count, H·D], before the output projection
  std::span<const double> attention_mass;  ///< [H, first_position + count], or empty unless asked for
};

/// Follows a forward pass. Called on the thread that runs it.
class ForwardObserver {
 public:
  virtual ~ForwardObserver() = default;

  /// Whether attention_mass is wanted in the pass that begins.
  virtual bool wants_attention_mass() const { return false; }

  /// After each layer's attention. The cache is the one that the pass runs on: rows of this layer that are dropped here
  /// are gone for later passes.
  virtual void on_attention(const LayerAttention& attention, KvCache& cache) = 0;

  /// After each block of tokens of each layer; `fraction` of the pass is done.
  virtual void on_progress(double fraction) { static_cast<void>(fraction); }
};

class Transformer {
 public:
  struct Options {
    int threads = 1;
    /// Tokens that go through a layer's matrices together: more of them need more memory, fewer more often convert the
    /// weights.
    Index block_tokens = 1024;
  };

  /// `model` must outlive this object.
  Transformer(const Model& model, const Options& options);

  /// Runs tokens that follow those in the cache, and appends them to it: a prompt, or a generated token.
  /// Returns the logits [vocabulary] of what comes after the last of them. `ids` is not empty and in the vocabulary,
  /// and fits the cache. Throws Error, naming layer, head and position, if keys, values, queries or outputs are NaN or
  /// infinite.
  std::vector<float> forward(std::span<const std::int32_t> ids, KvCache& cache, ForwardObserver* observer = nullptr);

 private:
  // Cosines and sines of the angles that rotary embedding turns the tokens of a pass by, [count, D/2] each.
  struct Rotation {
    Buffer cosines;
    Buffer sines;
  };

  Index next_block(Index left) const;
  Rotation rotation_of(Index first_position, Index count, const std::vector<float>& frequencies) const;
  void project(const LayerWeights& layer, std::span<const float> hidden, Index count, Index first,
               const Rotation& rotation, KvCache& cache, int layer_number, std::span<float> queries);
  void feed_forward(const LayerWeights& layer, std::span<const float> attended, Index count, std::span<float> hidden);
  void normalize(std::span<const float> hidden, std::span<const float> weight, std::span<float> out) const;
  void rotate(std::span<float> heads, Index count, Index width, Index first, const Rotation& rotation) const;

  const Model& model_;
  Execution execution_;
  Index block_tokens_;
  std::vector<float> inverse_frequencies_;
  std::vector<float> local_inverse_frequencies_;  // of layers with a sliding window
};

/// The index of the largest logit, the lowest of equal ones.
std::int32_t most_likely(std::span<const float> logits);

}  // namespace kvreplay::tracer
