// Rank agreement: the statistics against SciPy and their definitions, and what a replay makes of them against
// attention and scores taken anew.
#include "replay/rank_agreement.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::Each;
using testing::IsEmpty;

RankCorrelation correlation(const std::vector<float>& a, const std::vector<float>& b) {
  return RankedValues(a).correlation(b, 0, static_cast<Index>(b.size()));
}

// ---- The statistics
// ----------------------------------------------------------------------------------------------------

// from scipy.stats import spearmanr, kendalltau      # SciPy 1.15; kendalltau's default is τ_b
// for a, b in cases: print(spearmanr(a, b).statistic, kendalltau(a, b).statistic)
TEST(RankCorrelation, IsThatOfSciPy) {
  const struct {
    std::vector<float> a, b;
    double spearman, kendall;
  } cases[] = {
      {{12, 2, 1, 12, 2}, {1, 4, 7, 1, 0}, -0.5407380704358752, -0.4714045207910316},
      {{0, 0, 1, 1, 2, 2, 2, 3}, {3, 1, 1, 2, 2, 2, 0, 5}, 0.21656490257412284, 0.17025130615174974},
      {{1e-30f, 1e-20f, 0, -1, 5, 5, 1e30f}, {7, 3, 3, 3, 9, -2, 8}, 0.3739787960033829, 0.26352313834736496},
      {{-0.5f, 0.25f, 0.25f, 0, 3, 3, 3, 1, 1, 2},
       {2, 2, 2, 2, 1, 1, 0, 0, 4, 4},
       -0.43740984790168713,
       -0.2898754521821014},
  };
  for (const auto& [a, b, spearman, kendall] : cases) {
    EXPECT_NEAR(correlation(a, b).spearman, spearman, 1e-15);
    EXPECT_NEAR(correlation(a, b).kendall, kendall, 1e-15);
    EXPECT_EQ(correlation(b, a).spearman, correlation(a, b).spearman);
    EXPECT_EQ(correlation(b, a).kendall, correlation(a, b).kendall);
  }
}

// i = numpy.arange(1000); a = i * 7919 % 101; b = i * i % 37 + i * 104729 % 53
TEST(RankCorrelation, IsThatOfSciPyForManyTies) {
  std::vector<float> a, b;
  for (int i = 0; i < 1000; ++i) {
    a.push_back(static_cast<float>(i * 7919 % 101));
    b.push_back(static_cast<float>(i * i % 37 + i * 104729 % 53));
  }
  EXPECT_NEAR(correlation(a, b).spearman, 0.011718828830649154, 1e-15);
  EXPECT_NEAR(correlation(a, b).kendall, 0.007486115880865627, 1e-15);
}

// Both by their definitions, pair by pair.
RankCorrelation by_definition(const std::vector<float>& a, const std::vector<float>& b) {
  const std::size_t n = a.size();
  const auto ranks = [n](const std::vector<float>& numbers) {
    std::vector<double> found;
    for (const float number : numbers) {
      const auto below = std::ranges::count_if(numbers, [number](float other) { return other < number; });
      const auto equal = std::ranges::count(numbers, number);
      found.push_back(static_cast<double>(below) + static_cast<double>(equal + 1) / 2 - static_cast<double>(n + 1) / 2);
    }
    return found;
  };
  const std::vector<double> of_a = ranks(a);
  const std::vector<double> of_b = ranks(b);
  const double covariance = std::inner_product(of_a.begin(), of_a.end(), of_b.begin(), 0.0);
  const double both = std::inner_product(of_a.begin(), of_a.end(), of_a.begin(), 0.0) *
                      std::inner_product(of_b.begin(), of_b.end(), of_b.begin(), 0.0);
  double score = 0;
  double apart_in_a = 0;
  double apart_in_b = 0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const int sign_a = (a[i] > a[j] ? 1 : 0) - (a[i] < a[j] ? 1 : 0);
      const int sign_b = (b[i] > b[j] ? 1 : 0) - (b[i] < b[j] ? 1 : 0);
      score += sign_a * sign_b;
      apart_in_a += sign_a * sign_a;
      apart_in_b += sign_b * sign_b;
    }
  }
  return {both > 0 ? covariance / std::sqrt(both) : 0,
          apart_in_a * apart_in_b > 0 ? score / std::sqrt(apart_in_a * apart_in_b) : 0};
}

TEST(RankCorrelation, FollowsItsDefinition) {
  std::mt19937 random(5);
  for (int round = 0; round < 400; ++round) {
    const std::size_t n = 1 + random() % 70;
    const std::size_t levels = 1 + random() % (round % 2 == 0 ? 6 : 1000);
    std::vector<float> a, b;
    for (std::size_t i = 0; i < n; ++i) {
      a.push_back(std::ldexp(static_cast<float>(random() % levels) - static_cast<float>(levels) / 3, -3));
      b.push_back(static_cast<float>(random() % levels) + (round % 3 == 0 ? a.back() : 0));
    }
    const auto first = static_cast<Index>(random() % n);
    const auto end = first + static_cast<Index>(random() % (n - static_cast<std::size_t>(first) + 1));
    const auto part = [&](const std::vector<float>& whole) {
      return std::vector<float>(whole.begin() + first, whole.begin() + end);
    };
    const RankCorrelation found = RankedValues(a).correlation(b, first, end);
    const RankCorrelation expected = by_definition(part(a), part(b));
    ASSERT_NEAR(found.spearman, expected.spearman, 1e-12) << round;
    ASSERT_NEAR(found.kendall, expected.kendall, 1e-12) << round;
  }
}

TEST(RankCorrelation, EqualOrdersAgreeExactlyAndReversedOnesNotAtAll) {
  std::mt19937 random(3);
  for (const std::size_t n : {2u, 3u, 1000u, 131072u}) {
    std::vector<float> a(n), same(n), reversed(n);
    for (std::size_t i = 0; i < n; ++i) {
      a[i] = static_cast<float>(random() % (2 * n)) - static_cast<float>(n);
      same[i] = std::sinh(a[i] / static_cast<float>(n)) / 3;
      reversed[i] = -a[i];
    }
    a[0] = same[0] = reversed[0] = 2 * static_cast<float>(n);  // never all equal
    same[0] = 2;
    reversed[0] = -a[0];
    EXPECT_EQ(correlation(a, same).spearman, 1);
    EXPECT_EQ(correlation(a, same).kendall, 1);
    EXPECT_EQ(correlation(a, reversed).spearman, -1);
    EXPECT_EQ(correlation(a, reversed).kendall, -1);
  }
}

TEST(RankCorrelation, InfinityIsTheLargestAndTheZerosAreEqual) {
  const float infinity = std::numeric_limits<float>::infinity();
  const RankCorrelation found = correlation({0.0f, -0.0f, -infinity, infinity, 1e38f}, {5, 5, 1, 9, 8});
  EXPECT_EQ(found.spearman, 1);
  EXPECT_EQ(found.kendall, 1);
}

TEST(RankCorrelation, WithoutAnOrderThereIsNoAgreement) {
  for (const auto& [a, b] : {std::pair<std::vector<float>, std::vector<float>>{{}, {}},
                             {{1}, {1}},
                             {{4, 4, 4}, {1, 2, 3}},
                             {{1, 2, 3}, {0.0f, -0.0f, 0.0f}}}) {
    EXPECT_EQ(correlation(a, b).spearman, 0);
    EXPECT_EQ(correlation(a, b).kendall, 0);
  }
}

// ---- In a replay
// -------------------------------------------------------------------------------------------------------

std::vector<TraceReplay> replayed(const RandomTrace& shape, const ReplayRequest& request) {
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  return replay(TraceReader(folder / "t.h5"), request);
}

ReplayRequest with_ranks(const std::vector<std::string>& specs, const std::vector<std::string>& capacities,
                         std::optional<Granularity> granularity = {}) {
  ReplayRequest request = make_request(specs, capacities, granularity);
  request.rank_agreement = true;
  return request;
}

// Attention of query `t` of a head over all positions, in double precision.
std::vector<double> attention(const RandomTrace& shape, const RandomTrace::Tensors& tensors, int layer, int head,
                              int t) {
  const auto d = static_cast<std::size_t>(shape.head_dim);
  const auto kv_head = static_cast<std::size_t>(head / (shape.num_attention_heads / shape.num_key_value_heads));
  const auto l = static_cast<std::size_t>(layer);
  const auto tokens = static_cast<std::size_t>(shape.num_tokens);
  const float* query = &tensors.queries[l][(static_cast<std::size_t>(head) * tokens + static_cast<std::size_t>(t)) * d];
  std::vector<double> weights(tokens, 0.0);
  double sum = 0;
  const int first = shape.sliding_window > 0 ? std::max(0, t - shape.sliding_window + 1) : 0;
  for (int n = first; n <= t; ++n) {
    const float* key = &tensors.keys[l][(kv_head * tokens + static_cast<std::size_t>(n)) * d];
    double logit = 0;
    for (std::size_t i = 0; i < d; ++i) logit += static_cast<double>(query[i]) * static_cast<double>(key[i]);
    logit *= shape.info().model.softmax_scale;
    if (shape.softcapping > 0) logit = shape.softcapping * std::tanh(logit / shape.softcapping);
    sum += weights[static_cast<std::size_t>(n)] = std::exp(logit);
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

// Attention summed over queries: [P].
std::vector<double> summed(const RandomTrace& shape, const RandomTrace::Tensors& tensors, int layer, int head,
                           int first, int end) {
  std::vector<double> sums(static_cast<std::size_t>(shape.prompt_length), 0.0);
  for (int t = first; t < end; ++t) {
    const std::vector<double> row = attention(shape, tensors, layer, head, t);
    for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += row[n];
  }
  return sums;
}

// What heads share.
std::vector<double> shared(const std::vector<std::vector<double>>& heads, Share share) {
  std::vector<double> all = heads.front();
  for (std::size_t h = 1; h < heads.size(); ++h) {
    for (std::size_t n = 0; n < all.size(); ++n) {
      all[n] = share == Share::max ? std::max(all[n], heads[h][n]) : all[n] + heads[h][n];
    }
  }
  for (double& number : all) number /= share == Share::mean ? static_cast<double>(heads.size()) : 1;
  return all;
}

// The scores that decide for a query head, from those of all heads.
std::vector<double> deciding(const std::vector<std::vector<double>>& heads, int head, int group,
                             Granularity granularity, Share share) {
  if (granularity == Granularity::query) return heads[static_cast<std::size_t>(head)];
  std::vector<std::vector<double>> groups;
  for (std::size_t first = 0; first < heads.size(); first += static_cast<std::size_t>(group)) {
    const auto begin = heads.begin() + static_cast<std::ptrdiff_t>(first);
    groups.push_back(shared({begin, begin + group}, share));
  }
  return granularity == Granularity::kv ? groups[static_cast<std::size_t>(head / group)] : shared(groups, share);
}

struct Shape {
  const char* name;
  RandomTrace trace;
};

class RankAgreementOn : public testing::TestWithParam<Shape> {};

TEST_P(RankAgreementOn, IsThatOfScoresAndImportanceTakenAnew) {
  constexpr int kWindow = 4;
  const RandomTrace& shape = GetParam().trace;
  const RandomTrace::Tensors tensors = shape.tensors();
  const int prompt = shape.prompt_length;
  const int held = shape.sliding_window > 0 ? shape.sliding_window - 1 : prompt;
  const int group = shape.num_attention_heads / shape.num_key_value_heads;
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    for (const Share share : {Share::mean, Share::max, Share::sum}) {
      SCOPED_TRACE(fmt::format("{}, {}", name_of(granularity), name_of(share)));
      ReplayRequest request = with_ranks({"snapkv(window=4,kernel=1)"}, {"12", "50%"}, granularity);
      request.share = share;
      const std::vector<TraceReplay> replays = replayed(shape, request);
      for (int layer = 0; layer < shape.num_layers; ++layer) {
        std::vector<std::vector<double>> scores, importance;
        for (int head = 0; head < shape.num_attention_heads; ++head) {
          scores.push_back(summed(shape, tensors, layer, head, prompt - kWindow, prompt));
          importance.push_back(summed(shape, tensors, layer, head, prompt, shape.num_tokens));
        }
        for (int head = 0; head < shape.num_attention_heads; ++head) {
          const auto ranked = [&](const std::vector<std::vector<double>>& heads) {
            const std::vector<double> all = deciding(heads, head, group, granularity, share);
            return std::vector<float>(all.end() - held, all.end() - kWindow);
          };
          const RankCorrelation expected = by_definition(ranked(scores), ranked(importance));
          for (const ReplayResult& result : replays.at(0).results) {
            const auto at = static_cast<std::size_t>(layer * shape.num_attention_heads + head);
            ASSERT_NEAR(result.measures[Measure::spearman].numbers.at(at), expected.spearman, 1e-6);
            ASSERT_NEAR(result.measures[Measure::kendall].numbers.at(at), expected.kendall, 1e-6);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RankAgreementOn,
                         testing::Values(Shape{"gqa", {}}, Shape{"four_to_one", {.num_attention_heads = 8, .seed = 3}},
                                         Shape{"soft_capping", {.softcapping = 2, .seed = 4}},
                                         Shape{"sliding_window", {.sliding_window = 45, .seed = 5}}),
                         [](const auto& shape) { return std::string(shape.param.name); });

TEST(RankAgreement, TheOracleAgreesWithItself) {
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    const std::vector<TraceReplay> replays =
        replayed({}, with_ranks({"oracle-attention", "snapkv(window=4)"}, {"12"}, granularity));
    EXPECT_THAT(replays.at(0).results.at(0).measures[Measure::spearman].numbers, Each(1.0f));
    EXPECT_THAT(replays.at(0).results.at(0).measures[Measure::kendall].numbers, Each(1.0f));
    EXPECT_THAT(replays.at(0).results.at(0).measures[Measure::spearman].shape, testing::ElementsAre(2, 4));
    EXPECT_LT(std::ranges::max(replays.at(0).results.at(1).measures[Measure::spearman].numbers), 1.0f);
  }
}

TEST(RankAgreement, IsOfPoliciesThatRankAndOnlyWhereItIsAskedFor) {
  const std::vector<std::string> specs = {"full",
                                          "recent",
                                          "random",
                                          "streamingllm(sinks=2)",
                                          "lacache",
                                          "oracle-reconstruction(exchanges=1)",
                                          "snapkv(window=4)",
                                          "snapkv(window=4)+adakv"};
  const RandomTrace shape;
  const std::vector<TraceReplay> asked = replayed(shape, with_ranks(specs, {"20", "100%"}));
  for (const ReplayResult& result : asked.at(0).results) {
    const bool scores = result.policy.starts_with("snapkv") || result.policy == "random";
    const bool ranks = scores && result.capacity < shape.prompt_length;
    EXPECT_EQ(result.rank_agreement, ranks) << result.policy;
    EXPECT_EQ(result.measures[Measure::spearman].numbers.size(), ranks ? 8u : 0u) << result.policy;
    EXPECT_EQ(result.measures[Measure::kendall].numbers.size(), ranks ? 8u : 0u) << result.policy;
  }
  const std::vector<TraceReplay> not_asked = replayed(shape, make_request(specs, {"20"}));
  for (const ReplayResult& result : not_asked.at(0).results) {
    EXPECT_THAT(result.measures[Measure::spearman].numbers, IsEmpty()) << result.policy;
  }
  // One position is left to rank: no order.
  const RandomTrace small{.prompt_length = 9, .num_tokens = 14};
  const std::vector<TraceReplay> unordered = replayed(small, with_ranks({"snapkv(window=8)"}, {"8"}));
  EXPECT_THAT(unordered.at(0).results.at(0).measures[Measure::spearman].numbers, IsEmpty());
}

TEST(RankAgreement, DoesNotChangeWhatIsKeptOrMeasured) {
  const std::vector<std::string> specs = {"snapkv(window=4)", "tova", "snapkv(window=4)+adakv", "restkv(window=4)"};
  const std::vector<TraceReplay> without = replayed({}, make_request(specs, {"12"}));
  const std::vector<TraceReplay> with = replayed({}, with_ranks(specs, {"12"}));
  for (std::size_t i = 0; i < specs.size(); ++i) {
    EXPECT_EQ(with[0].results[i].kept.sets, without[0].results[i].kept.sets);
    EXPECT_EQ(with[0].results[i].measures[Measure::layer_error].numbers,
              without[0].results[i].measures[Measure::layer_error].numbers);
    EXPECT_EQ(with[0].results[i].measures[Measure::cosine].numbers,
              without[0].results[i].measures[Measure::cosine].numbers);
  }
}

}  // namespace
}  // namespace kvreplay::test
