// Linear layers over weights of any dtype, divided over threads.
#pragma once

#include <initializer_list>
#include <span>

#include "tracer/execution.h"
#include "tracer/model.h"

namespace kvreplay::tracer {

/// The input of one or several linear layers: rows of activations, one per token.
class LinearInput {
 public:
  /// How a single row is multiplied.
  enum class SingleRow {
    fast,     ///< on its own, reading the weights as they lie
    as_many,  ///< as among others, so that sums are made in the same order
  };

  /// `rows` is [count, width].
  LinearInput(const Execution& execution, std::span<const float> rows, Index count,
              SingleRow single_row = SingleRow::fast);

  /// A layer and what becomes of the input: out[count, weights.rows()] = rows·Wᵀ + b, summed in float32.
  struct Product {
    const LinearWeights& linear;
    std::span<float> out;
  };

  /// Several layers, divided over threads together.
  void multiply(std::initializer_list<Product> products) const;
  void multiply(const LinearWeights& linear, std::span<float> out) const { multiply({{linear, out}}); }

 private:
  void multiply_vector(std::span<const Product> products) const;
  void multiply_matrix(const LinearWeights& linear, std::span<float> out) const;

  const Execution& execution_;
  std::span<const float> rows_;
  Index count_;
  Index width_;
  SingleRow single_row_;
};

}  // namespace kvreplay::tracer
