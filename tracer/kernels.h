// The inner loops of inference: matrix products, softmax and activations, compiled for several instruction sets of
// which the processor's best is chosen when the program runs. Single-threaded; results depend on the instruction set
// but never on how the work was divided.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay::tracer {

/// One instruction set's kernels. Matrix operands are walked in panels, so that the same product serves packed
/// weights, packed keys and values as they lie in the cache.
struct Kernels {
  std::string_view name;

  /// Rows of a panel of the left operand.
  Index tile_rows;

  /// Columns of a panel of the right operand. Divides kQueryBlock.
  Index tile_columns;

  /// c[m, n] = a·b, or c += a·b where `accumulate`: float32, each element summed over k in ascending order.
  /// Left element (i, k) lies at a[(i / tile_rows) * a_panel + k * a_step + i % tile_rows], right element (k, j) at
  /// b[(j / tile_columns) * b_panel + k * b_step + j % tile_columns]. Whole tile_columns of b are read, up to the last.
  void (*multiply)(Index m, Index n, Index depth, const float* a, Index a_panel, Index a_step, const float* b,
                   Index b_panel, Index b_step, float* c, Index c_row, bool accumulate);

  /// Puts `rows` rows of `depth` elements, `row` elements apart, into panels of `width` rows, [panel][depth][width] in
  /// float32, filled up with zeros.
  void (*pack)(DType type, const std::byte* data, Index row, Index rows, Index depth, Index width, float* packed);

  /// y[i] = data[i, :]·x for `rows` rows of `depth` elements that follow each other.
  void (*multiply_vector)(DType type, const std::byte* data, Index rows, Index depth, const float* x, float* y);

  /// maxima[q] = max(maxima[q], logits[j, q]) over `keys` rows of kQueryBlock logits.
  void (*update_maxima)(Index keys, const float* logits, float* maxima);

  /// Replaces `keys` rows of kQueryBlock logits by exp(logit - maxima[q]) and adds their sums to sums[q].
  void (*exponentiate)(Index keys, float* logits, const float* maxima, double* sums);

  /// mass[j] += Σ_q weights[j, q] * factors[q] over `keys` rows of kQueryBlock weights.
  void (*accumulate_mass)(Index keys, const float* weights, const float* factors, double* mass);

  /// Turns n logits into their softmax.
  void (*softmax)(Index n, float* logits);

  /// Bends n logits to cap·tanh(logit / cap).
  void (*soft_cap)(Index n, float cap, float* logits);

  /// gate[i] = silu(gate[i]) * up[i].
  void (*silu_multiply)(Index n, float* gate, const float* up);

  /// gate[i] = gelu(gate[i]) * up[i], in the approximation by tanh that models are trained with.
  void (*gelu_tanh_multiply)(Index n, float* gate, const float* up);
};

/// gate[i] = gelu(gate[i]) * up[i], without that approximation. Too rare for kernels of its own.
void gelu_multiply(Index n, float* gate, const float* up);

/// Queries that are attended together: the width of the softmax kernels' rows.
inline constexpr Index kQueryBlock = 64;

/// The kernels that this processor can run, best last; the first runs everywhere.
const std::vector<Kernels>& available_kernels();

/// The best of them.
const Kernels& best_kernels();

}  // namespace kvreplay::tracer
