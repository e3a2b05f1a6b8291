// How sure a mean is. Numbers called from elsewhere are those that reference_values.py prints.
#include "analysis/bootstrap.h"

#include <gmock/gmock.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <random>

#include "analysis/student_t.h"

namespace kvreplay {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;
using testing::IsNan;
using testing::Pointwise;

// The series of reference_values.py.
std::vector<double> autoregressive(int size, double correlation, std::uint64_t state) {
  std::vector<double> series;
  double x = 0;
  for (int i = 0; i < size; ++i) {
    state = (1103515245 * state + 12345) % (1ULL << 31U);
    x = correlation * x + static_cast<double>(state) / static_cast<double>(1ULL << 31U) - 0.5;
    series.push_back(x);
  }
  return series;
}

// Where each trace is one series.
MeanEstimate estimate(const std::vector<std::vector<double>>& traces, const BootstrapOptions& options = {}) {
  std::vector<Series> series;
  for (const std::vector<double>& trace : traces) series.push_back({trace, 1, static_cast<int>(series.size())});
  return bootstrap_mean(std::span<const Series>(series), options);
}

TEST(StudentT, TailsAreThoseOfSciPy) {
  const struct {
    double t, degrees, tails;
  } expected[] = {{0, 3, 1},
                  {0.5, 1, 7.048327646991335e-01},
                  {1, 4.5, 3.680050838801885e-01},
                  {2.5, 7, 4.099221858575289e-02},
                  {3, 30.25, 5.363943442202213e-03},
                  {12, 5, 7.089492517161522e-05},
                  {40, 9, 1.898299844933982e-11},
                  {1.96, 1e6, 4.999606758526985e-02}};
  for (const auto& [t, degrees, tails] : expected) {
    EXPECT_NEAR(student_t_tails(t, degrees) / tails, 1, 1e-12) << t << " with " << degrees;
  }
}

TEST(StudentT, TailsOfOneAndTwoDegreesAreThoseInClosedForm) {
  for (const double t : {0.01, 0.3, 1., 2.5, 17.}) {
    EXPECT_NEAR(student_t_tails(t, 1), 1 - 2 * std::atan(t) / std::numbers::pi, 1e-14) << t;
    EXPECT_NEAR(student_t_tails(t, 2), 1 - t / std::sqrt(2 + t * t), 1e-14) << t;
  }
}

TEST(StudentT, IsTheNormalDistributionOfInfiniteDegreesAndNaNWhereItIsUndefined) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NEAR(student_t_tails(2, kInfinity) / std::erfc(std::numbers::sqrt2), 1, 1e-12);
  EXPECT_EQ(student_t_tails(kInfinity, 4), 0);
  EXPECT_TRUE(std::isnan(student_t_tails(kNaN, 4)));
  EXPECT_TRUE(std::isnan(student_t_tails(1, kNaN)));
  EXPECT_TRUE(std::isnan(student_t_bound(0.95, kNaN)));
}

TEST(StudentT, BoundsAreThoseOfSciPy) {
  const struct {
    double share, degrees, bound;
  } expected[] = {
      {0.95, 1, 1.270620473617469e+01},  {0.95, 2.5, 3.574654842003682e+00},
      {0.9, 10, 1.812461122811676e+00},  {0.99, 30, 2.749995653567225e+00},
      {0.999, 4, 8.610301581379522e+00}, {0.95, std::numeric_limits<double>::infinity(), 1.959963984540054e+00}};
  for (const auto& [share, degrees, bound] : expected) {
    EXPECT_NEAR(student_t_bound(share, degrees) / bound, 1, 1e-12) << share << " with " << degrees;
  }
}

TEST(BlockLength, IsThatOfAnotherImplementation) {
  // optimal_block_length of the package arch, of circular blocks, rounded up.
  EXPECT_EQ(block_length(autoregressive(31, 0, 1)), 2);
  EXPECT_EQ(block_length(autoregressive(64, 0.3, 2)), 5);
  EXPECT_EQ(block_length(autoregressive(64, 0.8, 3)), 6);
  EXPECT_EQ(block_length(autoregressive(200, 0.5, 4)), 6);
  EXPECT_EQ(block_length(autoregressive(200, 0.9, 5)), 23);
  EXPECT_EQ(block_length(autoregressive(1000, 0.7, 6)), 28);
  EXPECT_EQ(block_length(autoregressive(1000, -0.5, 7)), 11);
  EXPECT_EQ(block_length(autoregressive(128, 0.95, 8)), 16);
}

TEST(BlockLength, OfWhatDoesNotVaryAndOfVeryLittleIsOne) {
  EXPECT_EQ(block_length(std::vector<double>(50, 0.25)), 1);
  EXPECT_EQ(block_length(std::vector<double>{1, 2, 3}), 1);
  EXPECT_EQ(block_length(std::vector<double>{1}), 1);
}

TEST(Holm, IsThatOfStatsmodels) {
  EXPECT_THAT(holm({0.01, 0.04, 0.03, 0.005, 0.2, 0.005}),
              Pointwise(DoubleNear(1e-12), {0.04, 0.09, 0.09, 0.03, 0.2, 0.03}));
}

TEST(Holm, WhatCannotBeSaidDoesNotCount) {
  const std::vector<double> corrected = holm({0.02, std::nan(""), 0.7, 0.6});
  EXPECT_DOUBLE_EQ(corrected[0], 0.06);
  EXPECT_THAT(corrected[1], IsNan());
  EXPECT_DOUBLE_EQ(corrected[2], 1) << "no probability is above 1";
  EXPECT_DOUBLE_EQ(corrected[3], 1);
}

TEST(Holm, IsOfOneFamilyAtATime) {
  EXPECT_THAT(holm_within({0.01, 0.04, 0.03, 0.5}, {"64", "128", "64", "128"}),
              Pointwise(DoubleNear(1e-12), {0.02, 0.08, 0.03, 0.5}));
}

// With blocks of one query and no dependence, everything is known in closed form.
TEST(Bootstrap, OfSingleQueriesIsTheStandardErrorOfTheMean) {
  const std::vector<double> x = {1, 4, 2, 7, 3, 3, 9, 5};
  const double mean = 34.0 / 8;
  double squares = 0;
  for (const double number : x) squares += (number - mean) * (number - mean);
  const double error = std::sqrt(squares / 7 / 8);
  const MeanEstimate closed = estimate({x}, {.resamples = 0, .block = 1});
  EXPECT_DOUBLE_EQ(closed.mean, mean);
  EXPECT_NEAR(closed.standard_error, error, 1e-12);
  EXPECT_NEAR(closed.interval.low, mean - student_t_bound(0.95, 7) * error, 1e-9);
  EXPECT_NEAR(closed.interval.high, mean + student_t_bound(0.95, 7) * error, 1e-9);
  EXPECT_NEAR(closed.p_value, student_t_tails(mean / error, 7), 1e-12);
  EXPECT_EQ(closed.block, 1);
  // What is drawn comes near to that: t intervals are what percentiles are widened to.
  const MeanEstimate drawn = estimate({x}, {.resamples = 20000, .block = 1});
  EXPECT_NEAR(drawn.interval.low, closed.interval.low, 0.15 * error);
  EXPECT_NEAR(drawn.interval.high, closed.interval.high, 0.25 * error);
  EXPECT_EQ(drawn.standard_error, closed.standard_error);
}

TEST(Bootstrap, DrawsWhatTheClosedFormSays) {
  // Blocks of 7 in 31 queries: four whole ones and one of 3.
  const std::vector<double> x = autoregressive(31, 0.6, 11);
  const MeanEstimate closed = estimate({x}, {.resamples = 0, .block = 7});
  const MeanEstimate drawn = estimate({x}, {.resamples = 50000, .confidence = 0.68, .block = 7});
  const MeanEstimate closed_narrow = estimate({x}, {.resamples = 0, .confidence = 0.68, .block = 7});
  EXPECT_NEAR(drawn.interval.high - drawn.interval.low, closed_narrow.interval.high - closed_narrow.interval.low,
              0.05 * (closed_narrow.interval.high - closed_narrow.interval.low));
  // The variance of a mean of blocks, written out.
  const auto n = x.size();
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(n);
  const auto block_variance = [&](std::size_t length) {
    double square = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double sum = 0;
      for (std::size_t j = 0; j < length; ++j) sum += x[(i + j) % n] - mean;
      square += sum * sum;
    }
    return square / static_cast<double>(n);
  };
  const double independent = 31.0 * 31 / (4 * 49 + 9);
  const double variance = (4 * block_variance(7) + block_variance(3)) / (31.0 * 31) * independent / (independent - 1);
  EXPECT_NEAR(closed.standard_error, std::sqrt(variance), 1e-12);
}

TEST(Bootstrap, TracesWeighTheSameWhateverTheirNumberOfQueries) {
  const std::vector<double> many(60, 1.0);
  const std::vector<double> few = {3, 5};
  EXPECT_DOUBLE_EQ(estimate({many, few}).mean, 2.5);
  const std::vector<double> apart = autoregressive(40, 0, 3);
  const MeanEstimate one = estimate({apart}, {.resamples = 0, .block = 1});
  const MeanEstimate with_certain = estimate({apart, many}, {.resamples = 0, .block = 1});
  EXPECT_NEAR(with_certain.standard_error, one.standard_error / 2, 1e-12);
}

TEST(Bootstrap, SeriesOfATraceWeighAsTheySay) {
  const std::vector<Series> series = {{{1, 1}, 0.75, 0}, {{5, 5}, 0.25, 0}, {{4, 4, 4}, 1, 1}};
  EXPECT_DOUBLE_EQ(bootstrap_mean(std::span<const Series>(series), {}).mean, 3);
}

TEST(Bootstrap, TracesDrawnAnewTellOfOtherTraces) {
  // Within the traces nothing varies, between them all: the standard error of a mean of three numbers.
  const std::vector<std::vector<double>> traces = {std::vector<double>(20, 1), std::vector<double>(30, 2),
                                                   std::vector<double>(10, 6)};
  const MeanEstimate these = estimate(traces);
  EXPECT_NEAR(these.interval.high - these.interval.low, 0, 1e-12);
  const MeanEstimate others = estimate(traces, {.resampling = Resampling::traces});
  EXPECT_NEAR(others.standard_error, std::sqrt((4 + 1 + 9) / 2.0 / 3), 1e-12);
  EXPECT_NEAR(others.p_value, student_t_tails(3 / others.standard_error, 2), 1e-12);
  EXPECT_LT(others.interval.low, 0);
  EXPECT_GT(others.interval.high, 6);
  EXPECT_THAT(estimate({traces[0]}, {.resampling = Resampling::traces}).interval.low, IsNan());
}

TEST(Bootstrap, OfASingleQueryNothingIsSaid) {
  const MeanEstimate one = estimate({{0.5}});
  EXPECT_EQ(one.mean, 0.5);
  EXPECT_THAT(one.interval.low, IsNan());
  EXPECT_THAT(one.interval.high, IsNan());
  EXPECT_THAT(one.p_value, IsNan());
}

TEST(Bootstrap, WhereNothingDiffersThereIsNoDifference) {
  const MeanEstimate zero = estimate({std::vector<double>(10, 0.0)});
  EXPECT_EQ(zero.p_value, 1);
  EXPECT_EQ(zero.interval.low, 0);
  EXPECT_EQ(zero.interval.high, 0);
}

TEST(Bootstrap, SameSeedSameBitsAndAnotherSeedOthers) {
  const std::vector<std::vector<double>> traces = {autoregressive(31, 0.5, 1), autoregressive(40, 0.5, 2)};
  const MeanEstimate first = estimate(traces, {.resamples = 999, .seed = 7});
  const MeanEstimate again = estimate(traces, {.resamples = 999, .seed = 7});
  const MeanEstimate other = estimate(traces, {.resamples = 999, .seed = 8});
  EXPECT_EQ(first.interval.low, again.interval.low);
  EXPECT_EQ(first.interval.high, again.interval.high);
  EXPECT_NE(first.interval.low, other.interval.low);
}

// Of intervals for many series whose mean is known, the share that holds it.
double coverage(int queries, double correlation, int traces) {
  constexpr int kSets = 600;
  std::mt19937_64 generator(5);
  std::normal_distribution<double> normal;
  int held = 0;
  for (int set = 0; set < kSets; ++set) {
    std::vector<std::vector<double>> series(static_cast<std::size_t>(traces));
    for (std::vector<double>& one : series) {
      double x = normal(generator) / std::sqrt(1 - correlation * correlation);
      for (int i = 0; i < queries; ++i) {
        one.push_back(1 + x);
        x = correlation * x + normal(generator);
      }
    }
    const MeanEstimate mean = estimate(series, {.resamples = 400, .seed = static_cast<std::uint64_t>(set)});
    if (mean.interval.low <= 1 && 1 <= mean.interval.high) ++held;
  }
  return static_cast<double>(held) / kSets;
}

// 95 % intervals; 600 sets tell a share to within 0.02.
TEST(Bootstrap, IntervalsHoldTheMeanAsOftenAsTheySay) {
  EXPECT_NEAR(coverage(31, 0, 1), 0.95, 0.025);
  EXPECT_NEAR(coverage(31, 0, 5), 0.95, 0.025);
  EXPECT_NEAR(coverage(256, 0.3, 1), 0.935, 0.025);
  EXPECT_NEAR(coverage(256, 0.6, 1), 0.93, 0.025);
  EXPECT_NEAR(coverage(64, 0.6, 5), 0.92, 0.03);
}

TEST(Bootstrap, SingleQueriesWouldBeFarTooSure) {
  // What blocks are for: as if independent, intervals of dependent queries hold the mean in two of three cases.
  std::mt19937_64 generator(5);
  std::normal_distribution<double> normal;
  int held = 0;
  constexpr int kSets = 300;
  for (int set = 0; set < kSets; ++set) {
    std::vector<double> series;
    double x = normal(generator) / 0.8;
    for (int i = 0; i < 256; ++i) {
      series.push_back(x);
      x = 0.6 * x + normal(generator);
    }
    const MeanEstimate mean = estimate({series}, {.resamples = 0, .block = 1});
    if (mean.interval.low <= 0 && 0 <= mean.interval.high) ++held;
  }
  EXPECT_NEAR(static_cast<double>(held) / kSets, 0.67, 0.07);
}

}  // namespace
}  // namespace kvreplay
