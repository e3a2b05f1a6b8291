// The one matrix layout of the project: row-major float32, a row per position (or query).
#pragma once

#include <Eigen/Core>
#include <cstdint>

// Eigen frees what it aligned itself in another way than what malloc aligned: all binaries have to agree on which.
static_assert(EIGEN_DEFAULT_ALIGN_BYTES == 64,
              "compile with -DEIGEN_MAX_ALIGN_BYTES=64, as CMake's find_package(kvreplay) does");

namespace kvreplay {

using Index = std::int64_t;

/// Row-major float32 matrix that owns its memory.
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Row-major float32 matrix that lives elsewhere.
using MatrixView = Eigen::Map<const Matrix>;

}  // namespace kvreplay
