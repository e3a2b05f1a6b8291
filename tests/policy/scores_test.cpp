// Scores of single heads that are written down here.
#include <gtest/gtest.h>

#include "policy/matrix_head.h"
#include "policy/smoothing.h"

namespace kvreplay::test {
namespace {

// Its value is the output, and the distance between them 0: such a position must not lose to all others.
TEST(Scores, APositionWithAllTheAttentionComesFirst) {
  MatrixHead head(100 * Matrix::Identity(12, 12), Matrix::Ones(12, 12));
  head.member_queries = {Matrix::Zero(12, 12)};
  head.member_queries[0].col(3).tail(2).setOnes();
  for (const std::string spec : {"restkv(window=2)", "restkv(window=2,metric=before)", "caote(window=2)"}) {
    const std::vector<float> scores = scores_of(spec, head);
    EXPECT_GE(scores[3], kIrreplaceable / 10) << spec;
    EXPECT_LT(scores[9], 1) << spec;
  }
}

TEST(Scores, LagKVOnAShortPromptRanksByPosition) {
  const MatrixHead head(Matrix::Random(12, 4), Matrix::Random(12, 4));
  const std::vector<float> scores = scores_of("lagkv(sinks=4,lag=8)", head);
  for (std::size_t n = 0; n < 4; ++n) EXPECT_GT(scores[n], 1);
  for (std::size_t n = 4; n < 12; ++n) EXPECT_FLOAT_EQ(scores[n], static_cast<float>(n - 4) / 8);
  // Two chunks, of which the second judges the first.
  const std::vector<float> judged = scores_of("lagkv(sinks=4,lag=4)", head);
  for (std::size_t n = 4; n < 8; ++n) EXPECT_LT(judged[n], 1);
  for (std::size_t n = 8; n < 12; ++n) EXPECT_GE(judged[n], 1);
}

}  // namespace
}  // namespace kvreplay::test
