// Numbers with a shape.
#pragma once

#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// Numbers of a layer-major table, the last index running fastest.
struct Table {
  std::vector<Index> shape;
  std::vector<float> numbers;

  /// Filled with zeros.
  static Table of_shape(std::vector<Index> shape) {
    const Index size = std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
    return {std::move(shape), std::vector<float>(static_cast<std::size_t>(size), 0.0f)};
  }
};

}  // namespace kvreplay
