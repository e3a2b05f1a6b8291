// The inner loops of inference beside its products: vectors times weights, softmax and activations. Like those of
// replay (kernels.h) they are single-threaded and compiled for several instruction sets, of which the processor's best
// is chosen when the program runs. Results depend on the instruction set but never on how the work was divided.
#pragma once

#include <cstddef>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay::kernels {

/// y[i] = data[i, :]·x for `rows` rows of `depth` elements that follow each other.
void multiply_vector(DType type, const std::byte* data, Index rows, Index depth, const float* x, float* y);

/// maxima[q] = max(maxima[q], logits[j, q]) over `count` rows of `columns` logits, a multiple of kLanes.
void raise_maxima(Index count, Index columns, const float* logits, float* maxima);

/// Replaces `count` rows of `columns` logits by exp(logit − maxima[q]) and adds their sums to sums[q]. What is
/// exponentiated may be any number.
void exponentiate_and_sum(Index count, Index columns, const float* maxima, float* logits, double* sums);

/// mass[j] += Σ_q weights[j, q] · factors[q] over `count` rows of `columns` weights.
void add_mass(Index count, Index columns, const float* weights, const float* factors, double* mass);

/// Turns `count` logits into their softmax.
void softmax(Index count, float* logits);

/// Bends `count` logits to cap·tanh(logit / cap).
void soft_cap(Index count, float cap, float* logits);

/// gate[i] = silu(gate[i]) · up[i].
void silu_multiply(Index count, float* gate, const float* up);

/// gate[i] = gelu(gate[i]) · up[i], in the approximation by tanh that models are trained with.
void gelu_tanh_multiply(Index count, float* gate, const float* up);

/// gate[i] = gelu(gate[i]) · up[i], without that approximation. Too rare for vector code.
void gelu_multiply(Index count, float* gate, const float* up);

}  // namespace kvreplay::kernels
