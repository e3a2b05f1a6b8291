#include "policy/projection.h"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <algorithm>
#include <cmath>

#include "base/work.h"
#include "kernels/kernels.h"

namespace kvreplay {
namespace {

// For a matrix that has directions of length 0, or of less than rounding, where Cholesky's decomposition would divide
// by what is nothing but rounding.
Eigen::MatrixXd semidefinite_factor(const Eigen::MatrixXd& gram) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(Eigen::MatrixXd(gram.selfadjointView<Eigen::Upper>()));
  const Eigen::VectorXd& squares = solver.eigenvalues();  // ascending
  // None is negative but by rounding, which so tells how large it is.
  const double negligible = std::max(-4 * squares(0), 1e-9 * squares(squares.size() - 1));
  const Eigen::VectorXd lengths =
      squares.unaryExpr([negligible](double x) { return x > negligible ? std::sqrt(x) : 0; });
  const Eigen::HouseholderQR<Eigen::MatrixXd> triangle(lengths.asDiagonal() * solver.eigenvectors().transpose());
  Eigen::MatrixXd factor = triangle.matrixQR().triangularView<Eigen::Upper>();
  for (Index i = 0; i < factor.rows(); ++i) {
    if (factor.row(i).norm() <= 1e-9 * lengths(lengths.size() - 1)) factor.row(i).setZero();
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
