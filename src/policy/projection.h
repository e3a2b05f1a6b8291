// The output projection as lengths see it: ‖W x‖ = ‖R x‖ with R of D rows instead of the hidden size.
#pragma once

#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// Rows of an output projection that are summed in float32 before the sum is added in double.
inline constexpr Index kProjectionSlice = 512;

/// Floats from row to row in a factor of this head dimension, and in the rows that projection_gram() takes.
Index factor_width(Index head_dim);

/// Adds WᵀW of `count` rows of one head's part of an output projection to `gram` [D, factor_width(D)], in float32. The
/// rows are `row` floats apart, and factor_width(D) floats of each are read.
void add_projection_gram(const float* rows, Index row, Index count, Index head_dim, float* gram);

/// R, upper triangular [D, factor_width(D)] and 0 beyond column D, with RᵀR = WᵀW and so ‖R x‖ = ‖W x‖ for every x.
/// `gram` is the sum of what add_projection_gram() gave for slices of kProjectionSlice rows. Where W maps directions to
/// nothing, as many rows are zeros or of the size of rounding.
Matrix projection_factor_from(const Eigen::MatrixXd& gram);

/// The same from W [C, D] itself.
Matrix projection_factor_of(const Matrix& weight);

}  // namespace kvreplay
