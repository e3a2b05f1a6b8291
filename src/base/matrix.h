// The one matrix layout of the project: row-major float32, a row per position (or query).
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace kvreplay {

using Index = std::int64_t;

/// Row-major float32 matrix that owns its memory.
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Row-major float32 matrix that lives elsewhere.
using MatrixView = Eigen::Map<const Matrix>;

}  // namespace kvreplay
