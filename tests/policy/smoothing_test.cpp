#include "policy/smoothing.h"

#include <gtest/gtest.h>

#include <algorithm>

#include <cmath>
#include <numeric>
#include <random>

#include "policy/matrix_head.h"

namespace kvreplay {
namespace {

std::vector<float> random_scores(int size, unsigned seed) {
  std::mt19937 generator(seed);
  std::exponential_distribution<float> distribution(1);
  std::vector<float> scores(static_cast<std::size_t>(size));
  for (float& score : scores) score = distribution(generator);
  return scores;
}

TEST(TemporalWeights, EqualTheMovingAverageStepByStep) {
  for (const int window : {1, 2, 7, 32}) {
    for (const double alpha : {0.0, 0.3, 1.0}) {
      const std::vector<float> rows = random_scores(window, 3);
      double average = static_cast<double>(rows[0]);
      for (int i = 1; i < window; ++i) {
        average = alpha * static_cast<double>(rows[static_cast<std::size_t>(i)]) + (1 - alpha) * average;
      }
      const std::vector<float> weights = temporal_weights(Temporal::ema, alpha, window);
      EXPECT_NEAR(std::inner_product(rows.begin(), rows.end(), weights.begin(), 0.0), average, 1e-5);
      EXPECT_NEAR(std::accumulate(weights.begin(), weights.end(), 0.0), 1, 1e-6);
    }
  }
}

TEST(TemporalWeights, ReversedStartsAtTheNewest) {
  std::vector<float> weights = temporal_weights(Temporal::ema, 0.3, 8);
  std::reverse(weights.begin(), weights.end());
  EXPECT_EQ(temporal_weights(Temporal::reversed_ema, 0.3, 8), weights);
  EXPECT_EQ(temporal_weights(Temporal::last, 0.3, 3), (std::vector<float>{0, 0, 1}));
}

TEST(Pool, AverageCountsZerosBeyondTheEdges) {
  std::vector<float> scores = {3, 6, 9};
  pool(Spatial::average, 3, scores);
  EXPECT_EQ(scores, (std::vector<float>{3, 6, 5}));
}

TEST(Pool, MaximumIgnoresWhatLiesBeyondTheEdges) {
  std::vector<float> scores = {-3, -6, -9, -1};
  pool(Spatial::maximum, 3, scores);
  EXPECT_EQ(scores, (std::vector<float>{-3, -3, -1, -1}));
}

TEST(Pool, FollowsItsDefinitionForAnyWidth) {
  for (const int size : {1, 2, 31, 40, 500}) {
    // Large scores beside tiny ones, which must not drown in them.
    std::vector<float> raw = random_scores(size, 8);
    for (int i = 0; i < size; ++i) raw[static_cast<std::size_t>(i)] *= i / 50 % 2 == 0 ? 1e6f : 1e-6f;
    for (const int width : {1, 3, 15, 31, 33, 35, 64 + 1, 301}) {
      std::vector<float> average = raw;
      std::vector<float> maximum = raw;
      pool(Spatial::average, width, average);
      pool(Spatial::maximum, width, maximum);
      for (int i = 0; i < size; ++i) {
        double sum = 0;
        float most = -1;
        for (int j = std::max(0, i - width / 2); j <= std::min(size - 1, i + width / 2); ++j) {
          sum += static_cast<double>(raw[static_cast<std::size_t>(j)]);
          most = std::max(most, raw[static_cast<std::size_t>(j)]);
        }
        ASSERT_NEAR(average[static_cast<std::size_t>(i)], sum / width, 3e-6 * sum / width)
            << "position " << i << " of " << size << ", width " << width;
        ASSERT_EQ(maximum[static_cast<std::size_t>(i)], most);
      }
    }
  }
}

TEST(Pool, KernelsWiderThanTheScoresWork) {
  std::vector<float> scores = {1, 2};
  pool(Spatial::average, 21, scores);
  EXPECT_FLOAT_EQ(scores[0], 3.0f / 21);
  pool(Spatial::maximum, 21, {});
}

TEST(AdaptiveWindow, FollowsTheFormula) {
  const auto expect = [](double drift, int width, int shift) {
    const AdaptiveWindow window = AdaptiveWindow::from_drift(drift, 10, 3);
    EXPECT_EQ(window.width, width) << drift;
    EXPECT_EQ(window.shift, shift) << drift;
  };
  expect(0, 3, 1);  // floor(0) + 1: no drift still shifts by one, as the authors' code does
  expect(5, 3, 0);
  expect(-5, 3, 0);
  expect(10, 3, 1);
  expect(25, 5, 2);
  expect(-25, 5, -2);
  expect(-20, 5, -1);
}

// A head whose last queries attend above all to the positions given for them.
test::MatrixHead head_attending_to(const std::vector<int>& targets, int prompt_length) {
  test::MatrixHead head(Matrix::Identity(prompt_length, prompt_length), Matrix::Zero(prompt_length, prompt_length));
  Matrix queries = Matrix::Zero(prompt_length, prompt_length);
  const Index first = prompt_length - static_cast<Index>(targets.size());
  for (std::size_t i = 0; i < targets.size(); ++i) {
    queries(first + static_cast<Index>(i), targets[i]) = 20;
  }
  head.member_queries = {queries};
  return head;
}

TEST(AttentionDrift, IsExactWhereTheMeansOfTheHalvesAreNot) {
  // 61/6 - 25/6 is 6, but less by a rounding when the means are subtracted; a floor would then lose a step.
  const test::MatrixHead source = head_attending_to({10, 10, 10, 10, 10, 11, 4, 4, 4, 4, 4, 5}, 40);
  EXPECT_EQ(attention_drift(Head(source), 0, 12, 1), 6);
}

TEST(AttentionDrift, WeighsUnequalHalvesByTheirSizes) {
  const test::MatrixHead source = head_attending_to({9, 2, 4}, 20);
  EXPECT_EQ(attention_drift(Head(source), 0, 3, 1), 6);
  EXPECT_EQ(attention_drift(Head(source), 0, 1, 1), 0);
  EXPECT_EQ(attention_drift(Head(source), 0, 3, 0), 0);
}

TEST(AttentionDrift, AgreesWithSortingWhateverIsAsked) {
  const int prompt = 530;
  const int window = 9;
  std::mt19937 generator(34);
  std::normal_distribution<float> draw;
  test::MatrixHead source(Matrix::NullaryExpr(prompt, 4, [&](Index) { return draw(generator); }),
                          Matrix::Zero(prompt, 4), 2);
  // The second query head attends to all alike: the first positions win.
  source.member_queries = {Matrix::NullaryExpr(prompt, 4, [&](Index) { return draw(generator); }),
                           Matrix::Zero(prompt, 4)};
  const Head head(source);
  for (const int count : {1, 7, 64, 500, 530, 1000}) {
    for (int member = 0; member < 2; ++member) {
      double means[2] = {0, 0};  // of the window's halves
      for (int age = 0; age < window; ++age) {
        const std::span<const float> attention = head.attention(member, age);
        std::vector<int> order(attention.size());
        std::iota(order.begin(), order.end(), 0);
        std::ranges::stable_sort(order, [&](int a, int b) {
          return attention[static_cast<std::size_t>(a)] > attention[static_cast<std::size_t>(b)];
        });
        order.resize(std::min<std::size_t>(order.size(), static_cast<std::size_t>(count)));
        const double mean = std::accumulate(order.begin(), order.end(), 0.0) / static_cast<double>(order.size());
        const bool is_front = age >= window - window / 2;
        means[is_front ? 0 : 1] += mean / (is_front ? window / 2 : window - window / 2);
      }
      EXPECT_NEAR(attention_drift(head, member, window, count), means[0] - means[1], 1e-9)
          << "count " << count << ", member " << member;
    }
  }
}

TEST(RemovalError, IsLargestAndFiniteWhereAPositionHasAllAttention) {
  EXPECT_FLOAT_EQ(removal_error(0.75f, 2), 6);
  const float nearly_all = std::nextafter(1.0f, 0.0f);
  EXPECT_GT(removal_error(1, 0), removal_error(nearly_all, 1e6f));
  EXPECT_TRUE(std::isfinite(1000 * removal_error(1, 0)));
}

// Against the definition in PyTorch's terms: pad with edge values, then average without padding.
TEST(AdaptiveWindow, EqualsReplicatePaddingAndAveraging) {
  for (const AdaptiveWindow window : {AdaptiveWindow{5, 0}, {5, 2}, {9, -4}, {1, 1}, {31, 15}, {101, 50}, {101, -49}}) {
    std::vector<float> scores = random_scores(12, 5);
    std::vector<float> padded;
    const int left = window.width / 2 - window.shift;
    for (int i = -left; i < 12 + window.width / 2 + window.shift; ++i) {
      padded.push_back(scores[static_cast<std::size_t>(std::clamp(i, 0, 11))]);
    }
    pool_adaptive(window, scores);
    for (std::size_t i = 0; i < 12; ++i) {
      const auto first = padded.begin() + static_cast<std::ptrdiff_t>(i);
      EXPECT_NEAR(scores[i], std::accumulate(first, first + window.width, 0.0) / window.width, 1e-6);
    }
  }
}

}  // namespace
}  // namespace kvreplay
