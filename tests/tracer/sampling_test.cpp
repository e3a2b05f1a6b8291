// How the next token is drawn: against the distribution that it is drawn from, calculated here term by term.
#include "tracer/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;

std::vector<double> softmax_at(std::span<const float> logits, double temperature) {
  std::vector<double> shares;
  for (const float logit : logits) shares.push_back(std::exp(static_cast<double>(logit) / temperature));
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  for (double& share : shares) share /= sum;
  return shares;
}

std::vector<double> drawn_shares(const SamplingOptions& options, std::span<const float> logits) {
  constexpr int kDraws = 40000;
  Sampler sampler(options);
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<std::size_t>(sampler.next(logits))];
  std::vector<double> shares;
  for (const int count : counts) shares.push_back(static_cast<double>(count) / kDraws);
  return shares;
}

const std::vector<float> kLogits = {0.5F, 2.0F, -1.0F, 1.5F, 2.0F, -3.0F};

TEST(Sampling, TakesTheMostLikelyTokenUnlessATemperatureIsGiven) {
  Sampler sampler({});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(sampler.next(kLogits), 1) << "the lower one of two that are equal";
  EXPECT_EQ(description({}), "greedy decoding");
}

TEST(Sampling, DrawsTokensAsOftenAsTheSoftmaxAtTheTemperatureSays) {
  for (const double temperature : {0.5, 1.0, 3.0}) {
    const std::vector<double> expected = softmax_at(kLogits, temperature);
    const std::vector<double> drawn = drawn_shares({.temperature = temperature}, kLogits);
    // Six standard deviations of a share of one half.
    for (std::size_t id = 0; id < drawn.size(); ++id) EXPECT_NEAR(drawn[id], expected[id], 0.015) << temperature;
  }
}

TEST(Sampling, DrawsFromTheMostLikelyTokensAlone) {
  const std::vector<double> three = drawn_shares({.temperature = 1, .top_k = 3}, kLogits);
  const std::vector<float> rest = {2.0F, 1.5F, 2.0F};
  const std::vector<double> expected = softmax_at(rest, 1);
  EXPECT_NEAR(three[1], expected[0], 0.015);
  EXPECT_NEAR(three[3], expected[1], 0.015);
  EXPECT_NEAR(three[4], expected[2], 0.015);
  EXPECT_EQ(three[0] + three[2] + three[5], 0);
  EXPECT_EQ(drawn_shares({.temperature = 1, .top_k = 1}, kLogits)[1], 1) << "of equal ones the lower";
  EXPECT_GT(drawn_shares({.temperature = 5, .top_k = 1000}, kLogits)[5], 0) << "more than there are";
}

// Shares 0.37, 0.37, 0.22, 0.08 and less.
TEST(Sampling, DrawsFromTheFewestTokensThatComeToTheShare) {
  const auto drawn = [](double top_p, int top_k = 0) {
    std::set<std::int32_t> ids;
    const std::vector<double> shares = drawn_shares({.temperature = 1, .top_k = top_k, .top_p = top_p}, kLogits);
    for (std::size_t id = 0; id < shares.size(); ++id) {
      if (shares[id] > 0) ids.insert(static_cast<std::int32_t>(id));
    }
    return ids;
  };
  using Ids = std::set<std::int32_t>;
  EXPECT_EQ(drawn(1e-9), Ids{1}) << "at least one";
  EXPECT_EQ(drawn(0.3), Ids{1});
  EXPECT_EQ(drawn(0.5), (Ids{1, 4}));
  EXPECT_EQ(drawn(0.8), (Ids{1, 3, 4}));
  EXPECT_EQ(drawn(0.95), (Ids{0, 1, 3, 4}));
  EXPECT_EQ(drawn(0.6, 2), (Ids{1, 4})) << "of the share that the others left";
  EXPECT_EQ(drawn(0.5, 2), Ids{1}) << "two equal ones: half of what is left";
  EXPECT_EQ(drawn(1), (Ids{0, 1, 2, 3, 4, 5}));
}

TEST(Sampling, DrawsTheSameTokensForTheSameSeed) {
  const auto drawn = [](std::uint64_t seed) {
    Sampler sampler({.temperature = 1, .seed = seed});
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 16; ++i) ids.push_back(sampler.next(kLogits));
    return ids;
  };
  EXPECT_EQ(drawn(0), drawn(0));
  EXPECT_NE(drawn(0), drawn(1));
}

// The generator of the C++ standard and 53 bits of what it gives: the same on every machine.
TEST(Sampling, DrawsByNumbersThatTheStandardSays) {
  constexpr int kTokens = 1000;
  const std::vector<float> alike(kTokens, 0.25F);
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{7}}) {
    Sampler sampler({.temperature = 0.5, .seed = seed});
    std::mt19937_64 generator(seed);
    for (int i = 0; i < 16; ++i) {
      const double number = static_cast<double>(generator() >> 11) * 0x1p-53;
      EXPECT_EQ(sampler.next(alike), static_cast<std::int32_t>(number * kTokens)) << seed << ", " << i;
    }
  }
}

TEST(Sampling, StaysDefinedAtTheEnds) {
  const std::vector<float> wide = {-1e30F, 3e38F, -3e38F};
  EXPECT_EQ(Sampler({.temperature = 1}).next(wide), 1);
  EXPECT_EQ(Sampler({.temperature = std::numeric_limits<double>::denorm_min()}).next(kLogits), 1);
  EXPECT_GT(drawn_shares({.temperature = 1e300}, kLogits)[5], 0.15) << "all alike";
}

TEST(Sampling, DescribesItself) {
  EXPECT_EQ(description({.temperature = 0.7, .seed = 3}), "sampling at temperature 0.7, seed 3");
  EXPECT_EQ(description({.temperature = 1, .top_k = 40, .top_p = 0.9, .seed = 0}),
            "sampling at temperature 1, top-k 40, top-p 0.9, seed 0");
}

TEST(Sampling, RefusesWhatIsNoDistribution) {
  const auto refused = [](const SamplingOptions& options) {
    return message_of<UsageError>([&] { check_sampling(options); });
  };
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double wrong : {-0.1, kNan, kInfinity}) {
    EXPECT_NE(refused({.temperature = wrong}).find("temperature"), std::string::npos) << wrong;
  }
  for (const double wrong : {0.0, -1.0, 1.5, kNan}) {
    EXPECT_NE(refused({.temperature = 1, .top_p = wrong}).find("top-p"), std::string::npos) << wrong;
  }
  EXPECT_NE(refused({.temperature = 1, .top_k = -1}).find("top-k"), std::string::npos);
  EXPECT_NO_THROW(check_sampling({.temperature = 0.3, .top_k = 5, .top_p = 1}));
}

}  // namespace
}  // namespace kvreplay::tracer
