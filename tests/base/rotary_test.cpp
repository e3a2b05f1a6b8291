#include "base/rotary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace kvreplay {
namespace {

// What a model does: pair i of the vector at `position` turns by inverse_frequencies[i] · position.
Matrix rotated(const RotaryTable& table, std::span<const int> positions, const Matrix& rows) {
  Matrix turned = rows;
  const auto pairs = static_cast<Index>(table.inverse_frequencies.size());
  for (Index n = 0; n < rows.rows(); ++n) {
    for (Index i = 0; i < pairs; ++i) {
      const bool interleaved = table.layout == RotaryTable::Layout::interleaved;
      const Index a = interleaved ? 2 * i : i;
      const Index b = interleaved ? 2 * i + 1 : i + pairs;
      const double angle = static_cast<double>(table.inverse_frequencies[static_cast<std::size_t>(i)] *
                                               static_cast<float>(positions[static_cast<std::size_t>(n)]));
      const double c = std::cos(angle) * table.attention_scaling;
      const double s = std::sin(angle) * table.attention_scaling;
      turned(n, a) = static_cast<float>(rows(n, a) * c - rows(n, b) * s);
      turned(n, b) = static_cast<float>(rows(n, b) * c + rows(n, a) * s);
    }
  }
  return turned;
}

TEST(Rotary, TakesOffWhatAModelPutOn) {
  std::mt19937 generator(1);
  std::normal_distribution<float> draw;
  const std::vector<int> positions = {0, 1, 17, 900, 131071};
  const Matrix rows = Matrix::NullaryExpr(5, 12, [&](Index) { return draw(generator); });
  for (const auto layout : {RotaryTable::Layout::half, RotaryTable::Layout::interleaved}) {
    for (const int turned : {12, 8}) {  // all dimensions, or some of them
      RotaryTable table = RotaryTable::plain(10000, turned);
      table.layout = layout;
      table.attention_scaling = 1.25;
      Matrix back = rotated(table, positions, rows);
      unrotate(table, positions, back);
      EXPECT_LT((back - rows).cwiseAbs().maxCoeff(), 2e-6f);
    }
  }
}

TEST(Rotary, MeanOfOnePositionIsItsRotation) {
  const RotaryTable table = RotaryTable::plain(10000, 8);
  const Matrix row = Matrix::Constant(1, 8, 0.5f);
  const std::vector<int> position = {37};
  const Eigen::VectorXd turned = mean_rotation(table, 37, 1, 8) * row.row(0).cast<double>().transpose();
  EXPECT_LT((turned.transpose().cast<float>() - rotated(table, position, row).row(0)).cwiseAbs().maxCoeff(), 1e-6f);
  // Over many, the fast pairs cancel out.
  EXPECT_LT(std::abs(mean_rotation(table, 0, 100000, 8)(0, 0)), 1e-3);
}

}  // namespace
}  // namespace kvreplay
