// Exact softmax attention over the full cache: what eviction and stored outputs are compared with.
#pragma once

#include <cstdint>
#include <span>

#include "base/attention_rule.h"
#include "base/matrix.h"

namespace kvreplay {

/// Outputs [n, D] of the `queries` [n, D] of one query head at `positions` [n] over `keys` and `values` [N, D], whose
/// rows are the positions from 0 on. Products are float32; weights and weighted values are summed in double, the latter
/// over blocks of 4096 keys. The result depends on nothing but the arguments. Memory: n·N floats. Throws Error where a
/// position has no key.
Matrix attention_outputs(const Eigen::Ref<const Matrix>& queries, std::span<const std::int32_t> positions,
                         const Eigen::Ref<const Matrix>& keys, const Eigen::Ref<const Matrix>& values,
                         const AttentionRule& rule, int query_head);

}  // namespace kvreplay
