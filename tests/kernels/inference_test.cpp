// The inner loops of inference against arithmetic in double precision, on every instruction set of this processor.
#include "kernels/inference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

#include "kernels/kernels.h"
#include "support/every_processor.h"

namespace kvreplay::kernels {
namespace {

using test::EveryProcessor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_values(std::size_t count, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

TEST(Inference, MultipliesVectorsByWeightsOfEveryType) {
  EveryProcessor().for_each([] {
    for (const DType type : {DType::float32, DType::float16, DType::bfloat16}) {
      for (const Index rows : {1, 4, 7}) {
        for (const Index depth : {1, 7, 31, 32, 33, 200}) {
          auto weights = random_values(static_cast<std::size_t>(rows * depth), 3);
          const auto x = random_values(static_cast<std::size_t>(depth), 4);
          std::vector<std::byte> stored(weights.size() * size_of(type));
          from_float32(type, weights, stored.data());
          to_float32(type, stored.data(), weights);
          std::vector<float> y(static_cast<std::size_t>(rows));
          multiply_vector(type, stored.data(), rows, depth, x.data(), y.data());
          for (Index i = 0; i < rows; ++i) {
            double expected = 0;
            for (Index k = 0; k < depth; ++k) {
              expected += static_cast<double>(weights[static_cast<std::size_t>(i * depth + k)]) *
                          static_cast<double>(x[static_cast<std::size_t>(k)]);
            }
            ASSERT_NEAR(y[static_cast<std::size_t>(i)], expected, 1e-4) << name_of(type) << " " << rows << " " << depth;
          }
        }
      }
    }
  });
}

TEST(Inference, ExponentiatesColumnsOfLogits) {
  EveryProcessor().for_each([] {
    constexpr Index keys = 37;
    auto logits = random_values(static_cast<std::size_t>(keys * kPanel), 5, 20);
    for (Index q = 1; q < kPanel; q += 3) logits[static_cast<std::size_t>(q)] = -kInfinity;
    const auto original = logits;
    std::vector<float> maxima(kPanel, -kInfinity);
    std::vector<double> sums(kPanel, 0.5);
    std::vector<double> mass(keys, 0.25);
    const auto factors = random_values(kPanel, 6);
    raise_maxima(keys, kPanel, logits.data(), maxima.data());
    exponentiate_and_sum(keys, kPanel, maxima.data(), logits.data(), sums.data());
    add_mass(keys, kPanel, logits.data(), factors.data(), mass.data());

    std::vector<double> expected_mass(keys, 0.25);
    for (Index q = 0; q < kPanel; ++q) {
      float highest = -kInfinity;
      for (Index j = 0; j < keys; ++j) {
        highest = std::max(highest, original[static_cast<std::size_t>(j * kPanel + q)]);
      }
      ASSERT_EQ(maxima[static_cast<std::size_t>(q)], highest);
      double sum = 0.5;
      for (Index j = 0; j < keys; ++j) {
        const auto at = static_cast<std::size_t>(j * kPanel + q);
        const double expected = std::exp(static_cast<double>(original[at] - highest));
        ASSERT_NEAR(logits[at], expected, 3e-7 * expected + 1e-37);
        sum += expected;
        expected_mass[static_cast<std::size_t>(j)] +=
            expected * static_cast<double>(factors[static_cast<std::size_t>(q)]);
      }
      ASSERT_NEAR(sums[static_cast<std::size_t>(q)], sum, 1e-6 * sum);
    }
    for (std::size_t j = 0; j < keys; ++j) ASSERT_NEAR(mass[j], expected_mass[j], 1e-5);
    EXPECT_EQ(logits[1], 0) << "a masked key must have no weight at all";
  });
}

TEST(Inference, TurnsOneRowIntoItsSoftmax) {
  EveryProcessor().for_each([] {
    for (const std::size_t n : {1, 2, 15, 16, 17, 1000}) {
      auto row = random_values(n, 7, 5);
      const auto original = row;
      softmax(static_cast<Index>(n), row.data());
      double total = 0;
      for (const float value : original) total += std::exp(static_cast<double>(value));
      for (std::size_t i = 0; i < n; ++i) {
        const double expected = std::exp(static_cast<double>(original[i])) / total;
        // The difference to the largest logit is rounded to float32.
        ASSERT_NEAR(row[i], expected, 5e-6 * expected + 1e-30);
      }
    }
  });
}

TEST(Inference, GatesOverTheWholeRange) {
  EveryProcessor().for_each([] {
    std::vector<float> gate;
    for (float x = -200; x <= 200; x += 0.37f) gate.push_back(x);
    const auto up = random_values(gate.size(), 8);
    auto out = gate;
    silu_multiply(static_cast<Index>(out.size()), out.data(), up.data());
    for (std::size_t i = 0; i < gate.size(); ++i) {
      const double x = gate[i];
      const double expected = x / (1 + std::exp(-x)) * static_cast<double>(up[i]);
      ASSERT_NEAR(out[i], expected, 1e-6 * std::abs(expected) + 1e-30) << x;
    }
  });
}

TEST(Inference, GatesWithGeluByTanhOverTheWholeRange) {
  EveryProcessor().for_each([] {
    std::vector<float> gate;
    for (float x = -200; x <= 200; x += 0.37f) gate.push_back(x);
    for (float x = -2; x <= 2; x += 0.01f) gate.push_back(x);
    const auto up = random_values(gate.size(), 8);
    auto out = gate;
    gelu_tanh_multiply(static_cast<Index>(out.size()), out.data(), up.data());
    for (std::size_t i = 0; i < gate.size(); ++i) {
      const double x = gate[i];
      const double bent = 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
      const double expected = bent * static_cast<double>(up[i]);
      ASSERT_NEAR(out[i], expected, 4e-6 * std::abs(expected) + 1e-12) << x;
    }
  });
}

TEST(Gelu, IsExactOverTheWholeRange) {
  std::vector<float> gate;
  for (float x = -200; x <= 200; x += 0.37f) gate.push_back(x);
  for (float x = -2; x <= 2; x += 0.01f) gate.push_back(x);
  const auto up = random_values(gate.size(), 8);
  auto out = gate;
  gelu_multiply(static_cast<Index>(out.size()), out.data(), up.data());
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double x = gate[i];
    const double expected = 0.5 * x * std::erfc(-x / std::numbers::sqrt2) * static_cast<double>(up[i]);
    ASSERT_NEAR(out[i], expected, 2e-7 * std::abs(expected) + 1e-40) << x;
  }
  std::vector<float> odd = {0, std::nanf(""), 1};
  const std::vector<float> ones(3, 1);
  gelu_multiply(3, odd.data(), ones.data());
  EXPECT_EQ(odd[0], 0);
  EXPECT_TRUE(std::isnan(odd[1]));
  EXPECT_FLOAT_EQ(odd[2], 0.84134475f);
}

TEST(Inference, CapsLogitsOfAnySize) {
  EveryProcessor().for_each([] {
    for (const float cap : {0.5f, 30.0f}) {
      std::vector<float> logits = {0, 1e-30f, -1e-30f, 1e-6f, -1e6f, 1e6f, kInfinity, -kInfinity};
      for (float x = -300; x <= 300; x += 0.11f) logits.push_back(x);
      auto out = logits;
      soft_cap(static_cast<Index>(out.size()), cap, out.data());
      for (std::size_t i = 0; i < logits.size(); ++i) {
        const double expected = static_cast<double>(cap) * std::tanh(static_cast<double>(logits[i] / cap));
        ASSERT_NEAR(out[i], expected, 5e-7 * std::abs(expected)) << logits[i];
      }
    }
  });
}

TEST(Inference, PassesNotANumberOn) {
  EveryProcessor().for_each([] {
    std::vector<float> row = {1, std::nanf(""), 2};
    softmax(3, row.data());
    EXPECT_TRUE(std::isnan(row[0]));
    std::vector<float> many(20, std::nanf(""));
    soft_cap(20, 30, many.data());
    EXPECT_TRUE(std::isnan(many[0]) && std::isnan(many[19]));
    many.assign(20, std::nanf(""));
    const std::vector<float> ones(20, 1);
    gelu_tanh_multiply(20, many.data(), ones.data());
    EXPECT_TRUE(std::isnan(many[0]) && std::isnan(many[19]));
    std::vector<float> logits(kPanel, 0);
    logits[5] = std::nanf("");
    std::vector<float> maxima(kPanel, 0);
    std::vector<double> sums(kPanel, 0);
    exponentiate_and_sum(1, kPanel, maxima.data(), logits.data(), sums.data());
    EXPECT_TRUE(std::isnan(logits[5]));
    EXPECT_TRUE(std::isnan(sums[5]));
    EXPECT_EQ(sums[4], 1);
  });
}

}  // namespace
}  // namespace kvreplay::kernels
