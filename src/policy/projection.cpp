#include "policy/projection.h"

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>

#include "base/work.h"
#include "kernels/kernels.h"

namespace kvreplay {
namespace {

// Cholesky's decomposition of a matrix that has directions of length 0, or of less than rounding.
Eigen::MatrixXd semidefinite_factor(const Eigen::MatrixXd& gram) {
  const Index size = gram.rows();
  const double negligible = 1e-9 * std::max(gram.diagonal().maxCoeff(), 0.0);
  Eigen::MatrixXd factor = Eigen::MatrixXd::Zero(size, size);
  for (Index j = 0; j < size; ++j) {
    const double pivot = gram(j, j) - factor.col(j).head(j).squaredNorm();
    if (pivot <= negligible) continue;
    factor(j, j) = std::sqrt(pivot);
    for (Index i = j + 1; i < size; ++i) {
      factor(j, i) = (gram(j, i) - factor.col(j).head(j).dot(factor.col(i).head(j))) / factor(j, j);
    }
  }
  return factor;
}

}  // namespace

Index factor_width(Index head_dim) { return kernels::rounded_up(head_dim, kernels::kLanes); }

void add_projection_gram(const float* rows, Index row, Index count, Index head_dim, float* gram) {
  kernels::add_gram(rows, row, count, head_dim, gram);
  count_operations(count * head_dim * (head_dim + 1));
}

Matrix projection_factor_from(const Eigen::MatrixXd& gram) {
  const Index size = gram.rows();
  const Eigen::LLT<Eigen::MatrixXd, Eigen::Upper> decomposition(gram);
  Matrix factor = Matrix::Zero(size, factor_width(size));
  if (decomposition.info() == Eigen::Success) {
    factor.leftCols(size) = Eigen::MatrixXd(decomposition.matrixU()).cast<float>();
  } else {
    factor.leftCols(size) = semidefinite_factor(gram).cast<float>();
  }
  return factor;
}

Matrix projection_factor_of(const Matrix& weight) {
  const Index size = weight.cols();
  const Index width = factor_width(size);
  Eigen::MatrixXd gram = Eigen::MatrixXd::Zero(size, size);
  for (Index first = 0; first < weight.rows(); first += kProjectionSlice) {
    const Index count = std::min(kProjectionSlice, weight.rows() - first);
    Matrix rows = Matrix::Zero(count, width);
    rows.leftCols(size) = weight.middleRows(first, count);
    Matrix part = Matrix::Zero(size, width);
    add_projection_gram(rows.data(), width, count, size, part.data());
    gram += part.leftCols(size).cast<double>();
  }
  return projection_factor_from(gram);
}

}  // namespace kvreplay
