// The forward pass of a decoder-only transformer, layer by layer over all new tokens, so that weights are read once
// however long the prompt is.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string_view>
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

  /// Whether on_residual() is to be called.
  virtual bool wants_residual_norms() const { return false; }

  /// After each layer's attention was added to the residual stream: the lengths [count] of what it then is for the
  /// tokens from `first_position` on.
  virtual void on_residual(int layer, Index first_position, std::span<const float> norms) {
    static_cast<void>(layer), static_cast<void>(first_position), static_cast<void>(norms);
  }

  /// After each block of tokens of each layer; `fraction` of the pass is done.
  virtual void on_progress(double fraction) { static_cast<void>(fraction); }
};

/// Attends to a sequence whose keys and values it holds itself, token by token.
class TokenAttention {
 public:
  virtual ~TokenAttention() = default;

  /// The position of the next token, which advance() moves on once it went through all layers.
  virtual Index next_position() const = 0;
  virtual void advance() = 0;

  /// What the token's queries [H, D] get in a layer, `keys` and `values` [K, D] being its own: [H, D] into `outputs`.
  /// Objects are called by several threads, each of them by one at a time. May throw Error.
  virtual void attend(int layer, const float* keys, const float* values, const float* queries, float* outputs) = 0;
};

/// Tokens that follow those in a cache, or one that follows those of `attention`.
struct Sequence {
  std::span<const std::int32_t> ids;  ///< not empty, in the vocabulary, and they fit the cache
  KvCache* cache = nullptr;
  TokenAttention* attention = nullptr;  ///< in the place of a cache; then there is a single token

  Index next_position() const { return attention != nullptr ? attention->next_position() : cache->next_position(); }
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

  /// Runs several sequences through the model together, so that weights are read once for all of them, and appends
  /// each to its cache. Returns the last layer's states after the final norm, [tokens, C], one sequence after the
  /// other, in the same bits whatever else is run together and however the tokens before were divided into passes.
  /// `observer` is for a single sequence. Throws Error as forward() does.
  Buffer run(std::span<const Sequence> sequences, ForwardObserver* observer = nullptr);

  /// The same for sequences of one token each, whose attention is computed faster and in another order: not in the bits
  /// of a longer pass over the same tokens.
  Buffer step(std::span<const Sequence> sequences);

  /// The logits [count, vocabulary] of what comes after tokens whose states [count, C] run() returned. Throws Error if
  /// one is NaN or infinite.
  void logits(std::span<const float> states, Index count, std::span<float> out) const;

  /// The threads that it runs on.
  const Execution& execution() const { return execution_; }

 private:
  // Cosines and sines of the angles that rotary embedding turns the tokens of a pass by, [count, D/2] each.
  struct Rotation {
    Buffer cosines;
    Buffer sines;
  };

  // A pass over tokens of some sequences.
  struct Pass {
    std::span<const Sequence> sequences;
    LinearInput::SingleRow single_row;
    bool all_states;               // of every token and not of the last alone
    bool single_queries;           // whether a sequence of one token attends faster, in an order of its own
    std::vector<Index> starts;     // [sequences] the number of each one's first token among all
    std::vector<Index> positions;  // [tokens]
    Buffer hidden;                 // [tokens, C]

    Index count() const { return static_cast<Index>(positions.size()); }
  };

  Pass begin(std::span<const Sequence> sequences, LinearInput::SingleRow single_row, bool all_states,
             bool single_queries) const;
  void run_layers(Pass& pass, ForwardObserver* observer);
  Buffer states_of(Pass pass, ForwardObserver* observer);
  Index next_block(Index left) const;
  Rotation rotation_of(std::span<const Index> positions, const std::vector<float>& frequencies) const;
  void project(const Pass& pass, int layer_number, Index first, Index count, const Rotation& rotation,
               std::span<float> queries, std::span<float> outputs);
  void add_attention(const LayerWeights& layer, std::span<const float> attended, Index count,
                     LinearInput::SingleRow single_row, std::span<float> hidden) const;
  void feed_forward(const LayerWeights& layer, Index count, LinearInput::SingleRow single_row,
                    std::span<float> hidden) const;
  void normalize(std::span<const float> hidden, std::span<const float> weight, std::span<float> out) const;
  void add(std::span<const float> rows, std::span<float> hidden) const;
  bool are_finite(std::span<const float> values) const;
  void check_rows(std::span<const float> rows, std::string_view what, int layer, std::string_view head_kind,
                  Index width, std::span<const Index> positions) const;
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
