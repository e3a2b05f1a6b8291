// DropKV's score against its formula in double precision.
#include <gtest/gtest.h>

#include <cmath>

#include "policy/matrix_head.h"

namespace kvreplay {
namespace {

using test::normal;

TEST(DropKV, AddsUpWhatEachQueryOfTheWindowLoses) {
  constexpr Index kPrompt = 40;
  constexpr Index kWindow = 6;
  const Matrix keys = normal(kPrompt, 8, 1);
  const Matrix values = normal(kPrompt, 8, 2);
  test::MatrixHead source(keys, values);
  source.attend_with(0.5);
  source.member_queries = {normal(kPrompt, 8, 3)};
  std::vector<double> expected(static_cast<std::size_t>(kPrompt), 0.0);
  for (Index t = kPrompt - kWindow; t < kPrompt; ++t) {
    Eigen::VectorXd p =
        (keys.topRows(t + 1).cast<double>() * source.member_queries[0].row(t).cast<double>().transpose() * 0.5);
    p = (p.array() - p.maxCoeff()).exp();
    p /= p.sum();
    const Eigen::RowVectorXd o = p.transpose() * values.topRows(t + 1).cast<double>();
    for (Index j = 0; j <= t; ++j) {
      const double factor = p(j) / (1 - p(j));
      expected[static_cast<std::size_t>(j)] += factor * factor * (values.row(j).cast<double>() - o).squaredNorm();
    }
  }
  const std::vector<float> scores = test::scores_of("dropkv(window=6)", source);
  for (std::size_t j = 0; j < static_cast<std::size_t>(kPrompt - kWindow); ++j) {
    EXPECT_NEAR(scores[j], expected[j], 1e-5 * (1 + expected[j])) << j;
  }
  EXPECT_EQ(test::kept_by("dropkv(window=6)", source, 9).size(), 9u);
}

// A position with all of the attention is what the output is made of: removing it changes nothing that is left to
// compare with, and the score stays finite.
TEST(DropKV, StaysFiniteWhereAPositionHasAllAttention) {
  Matrix keys = Matrix::Zero(20, 4);
  keys(3, 0) = 1;
  Matrix queries = Matrix::Zero(20, 4);
  queries.col(0).setConstant(1000);
  test::MatrixHead source(keys, normal(20, 4, 5));
  source.member_queries = {queries};
  for (const float score : test::scores_of("dropkv(window=4)", source)) EXPECT_TRUE(std::isfinite(score));
}

}  // namespace
}  // namespace kvreplay
