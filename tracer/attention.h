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

/// Attends the last `count` tokens of a layer's cache to everything up to themselves, or to what of it is less than a
/// sliding window away from their positions. The cache holds the new tokens' keys and values already.
/// `queries` and `outputs` are [count, H·D]. `mass`, unless empty, is [H, N] for the N tokens that went through the
/// model so far, new ones included: the attention that each key received from the new queries, summed in double. It
/// needs a cache from which nothing was taken. A single query without mass is attended faster, and in another order of
/// summation, unless `single_query` is false.
/// Memory beside the arguments: 64 floats per thread and key that a block of 64 queries sees.
void attend(const Execution& execution, const AttentionShape& shape, const KvCache& cache, int layer,
            std::span<const float> queries, Index count, std::span<float> outputs, std::span<double> mass,
            bool single_query = true);

}  // namespace kvreplay::tracer
