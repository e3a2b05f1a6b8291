// Linear layers over weights of any dtype, divided over threads.
#pragma once

#include <span>
#include <vector>

#include "tracer/kernels.h"
#include "tracer/model.h"

namespace kvreplay::tracer {

/// How work is done: by which kernels, on how many threads. The number of threads never changes a result.
struct Execution {
  const Kernels* kernels = &best_kernels();
  int threads = 1;
};

/// The input of one or several linear layers: rows of activations, one per token, arranged for the kernels.
class LinearInput {
 public:
  /// `rows` is [count, width].
  LinearInput(const Execution& execution, std::span<const float> rows, Index count);

  /// out[count, weights.rows()] = rows·Wᵀ + b, summed in float32.
  void multiply(const LinearWeights& linear, std::span<float> out) const;

 private:
  const Execution& execution_;
  std::span<const float> rows_;
  Index count_;
  Index width_;
  std::vector<float> packed_;
};

}  // namespace kvreplay::tracer
