#include "base/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace kvreplay {
namespace {

TEST(AttentionRule, SeesWhatNeitherWindowNorChunkHides) {
  for (const int window : {0, 1, 2, 7, 40}) {
    for (const int chunk : {0, 1, 3, 16, 40}) {
      const AttentionRule rule{.sliding_window = window, .attention_chunk_size = chunk};
      for (int query = 0; query < 40; ++query) {
        int first = query;
        while (first > 0 && (window == 0 || query - (first - 1) < window) &&
               (chunk == 0 || (first - 1) / chunk == query / chunk)) {
          --first;
        }
        EXPECT_EQ(rule.first_visible(query), first) << window << " " << chunk << " " << query;
      }
    }
  }
}

TEST(AttentionRule, GivesNoHeadASinkThatHasNone) {
  EXPECT_EQ(std::exp(AttentionRule{}.sink(3)), 0);
  const AttentionRule rule{.sinks = {0.5F, -2}};
  EXPECT_EQ(rule.sink(0), 0.5F);
  EXPECT_EQ(rule.sink(1), -2);
}

TEST(ScaleLogits, ScalesAndBendsToTheCap) {
  for (const double cap : {0.0, 3.0}) {
    Matrix logits(2, 70);
    for (Index i = 0; i < logits.size(); ++i) logits.data()[i] = static_cast<float>(i % 71) - 35;
    const Matrix products = logits;
    scale_logits(logits, {.softmax_scale = 0.5, .attn_logit_softcapping = cap});
    for (Index i = 0; i < logits.size(); ++i) {
      const double scaled = 0.5 * static_cast<double>(products.data()[i]);
      EXPECT_NEAR(logits.data()[i], cap > 0 ? cap * std::tanh(scaled / cap) : scaled, 1e-5);
    }
  }
}

TEST(Softmax, IsThatOfTheDefinitionAndNothingElsewhere) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 3);
  for (const double sink : {-std::numeric_limits<double>::infinity(), -1.0, 2.0, 500.0}) {
    Eigen::RowVectorXd row(90);
    for (double& logit : row) logit = normal(random);
    const Eigen::RowVectorXd logits = row;
    softmax(row, 13, 77, sink);
    double sum = std::exp(sink - 500);
    for (Index n = 13; n < 77; ++n) sum += std::exp(logits(n) - 500);
    for (Index n = 0; n < row.size(); ++n) {
      const double expected = n < 13 || n >= 77 ? 0 : std::exp(logits(n) - 500) / sum;
      EXPECT_NEAR(row(n), expected, 1e-12 * (expected + 1e-200)) << sink << " " << n;
    }
  }
}

TEST(Softmax, IsNothingWhereNothingIsSeen) {
  Eigen::RowVectorXf row(4);
  row << 1, 2, 3, 4;
  softmax(row, 2, 2);
  EXPECT_EQ(row, Eigen::RowVectorXf::Zero(4));
  row << 1, 2, 3, 4;
  EXPECT_EQ(exponentiate(row, 3, 1, 0.5F), 1);
  EXPECT_EQ(row, Eigen::RowVectorXf::Zero(4));
}

TEST(Softmax, SurvivesLogitsAndSinksOfAnySize) {
  Eigen::RowVectorXf row(3);
  row << 10000, 9999, -10000;
  softmax(row, 0, 3);
  EXPECT_NEAR(row(0), 1 / (1 + std::exp(-1.0)), 1e-6);
  EXPECT_EQ(row(2), 0);
  row << 1, 2, 3;
  softmax(row, 0, 3, 20000.0F);
  EXPECT_EQ(row.sum(), 0);
}

}  // namespace
}  // namespace kvreplay
