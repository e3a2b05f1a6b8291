// Causal softmax attention of new tokens over the cache.
#pragma once

#include <span>

#include "base/attention_rule.h"
#include "tracer/kv_cache.h"
#include "tracer/linear.h"

namespace kvreplay::tracer {

/// The heads of a layer as attention sees them.
struct AttentionShape {
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  AttentionRule rule;  ///< without sinks
};

/// The last tokens of a sequence, whose keys and values its cache holds already.
struct NewTokens {
  const KvCache* cache = nullptr;  ///< null: they were attended already
  Index count = 0;
};

/// Attends the new tokens of sequences, each to everything in a layer of its cache up to itself, or to what of it is
/// less than a sliding window away from its position. All sequences together are divided over threads.
/// `queries` and `outputs` are [new tokens, H·D], one sequence after the other. `mass`, unless empty, is of a single
/// sequence, [H, N] for the N tokens that went through the model so far, new ones included: the attention that each key
/// received from the new queries, summed in double. It needs a cache from which nothing was taken. Where every sequence
/// has a single new token, and there is no mass, they are attended faster, and in another order of summation, unless
/// `single_queries` is false. Otherwise the order is the same whatever other sequences there are.
/// Memory beside the arguments: 64 floats per thread and key that a block of 64 queries sees.
void attend(const Execution& execution, const AttentionShape& shape, std::span<const NewTokens> sequences, int layer,
            std::span<const float> queries, std::span<float> outputs, std::span<double> mass,
            bool single_queries = true);

}  // namespace kvreplay::tracer
