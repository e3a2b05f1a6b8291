// The eviction that looks ahead, against its rule taken step by step from attention in double.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "policy/policy.h"
#include "replay/overlap.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::HasSubstr;

constexpr int kPrompt = 50;
constexpr int kTokens = 200;  // more than two blocks of later queries
constexpr int kCapacity = 12;

// [query since the prompt][position]: full attention, mean over the query heads of a KV head.
std::vector<std::vector<double>> attention_of(const RandomTrace& shape, const RandomTrace::Tensors& tensors, int layer,
                                              int kv_head) {
  const Index depth = shape.head_dim;
  const int group = shape.num_attention_heads / shape.num_key_value_heads;
  const auto rows_of = [&](const std::vector<float>& tensor, int head) {
    return MatrixView(tensor.data() + Index{head} * kTokens * depth, kTokens, depth).cast<double>().eval();
  };
  const auto keys = rows_of(tensors.keys[static_cast<std::size_t>(layer)], kv_head);
  std::vector<std::vector<double>> attention;
  for (int t = kPrompt; t < kTokens; ++t) {
    std::vector<double>& mean = attention.emplace_back(static_cast<std::size_t>(kTokens), 0.0);
    for (int member = 0; member < group; ++member) {
      const auto queries = rows_of(tensors.queries[static_cast<std::size_t>(layer)], kv_head * group + member);
      const Eigen::VectorXd logits =
          keys.topRows(t + 1) * queries.row(t).transpose() * shape.info().model.softmax_scale;
      const Eigen::VectorXd weights = (logits.array() - logits.maxCoeff()).exp();
      for (int n = 0; n <= t; ++n) mean[static_cast<std::size_t>(n)] += weights(n) / weights.sum() / group;
    }
  }
  return attention;
}

TEST(OracleResidency, EvictsWhatLaterQueriesAttendToLeast) {
  const TemporaryFolder folder;
  const RandomTrace shape{.prompt_length = kPrompt, .num_tokens = kTokens};
  shape.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const RandomTrace::Tensors tensors = shape.tensors();
  for (const auto& [spec, interval] : {std::pair("oracle-residency", 1), {"oracle-residency+every(7)", 7}}) {
    const TraceReplay replayed = replay(trace, make_request({spec}, {std::to_string(kCapacity)})).at(0);
    ASSERT_EQ(replayed.results.size(), 1u);
    EXPECT_TRUE(replayed.results[0].oracle);
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int head = 0; head < shape.num_key_value_heads; ++head) {
        const std::vector<std::vector<double>> attention = attention_of(shape, tensors, layer, head);
        // What queries after the one at t pay to a position.
        const auto to_come = [&](int n, int t) {
          double sum = 0;
          for (int later = std::max(t + 1, kPrompt); later < kTokens; ++later) {
            sum += attention[static_cast<std::size_t>(later - kPrompt)][static_cast<std::size_t>(n)];
          }
          return sum;
        };
        std::vector<int> cache(kPrompt);
        std::iota(cache.begin(), cache.end(), 0);
        const auto evict = [&](int t) {
          std::map<int, double> worth;
          for (const int n : cache) worth[n] = to_come(n, t);
          std::ranges::stable_sort(cache, [&](int a, int b) { return worth[a] > worth[b]; });
          cache.resize(kCapacity);
          std::ranges::sort(cache);
        };
        evict(kPrompt - 1);
        const Residency& found =
            replayed.results[0].kept.of_query_head(layer, head * 2, trace.info().model.group_size());
        for (int t = kPrompt; t < kTokens; ++t) {
          cache.push_back(t);
          ASSERT_EQ(found.cached_at(t, kPrompt), cache) << spec << ", layer " << layer << ", at " << t;
          // Nothing is left to look at behind the last query.
          if ((t - kPrompt + 1) % interval == 0 && t + 1 < kTokens) evict(t);
        }
      }
    }
  }
}

TEST(OracleResidency, HasMoreRecallThanWhatDoesNotLookAhead) {
  const TemporaryFolder folder;
  RandomTrace{.prompt_length = kPrompt, .num_tokens = kTokens}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const TraceReplay replayed =
      replay(trace, make_request({"oracle-residency", "h2o(window=4)+every", "tova+every", "recent+every"}, {"12"},
                                 Granularity::kv))
          .at(0);
  ASSERT_EQ(replayed.results.size(), 4u);
  const auto mean = [](const ReplayResult& result) {
    const std::vector<float>& numbers = result.measures[Measure::attention_recall].numbers;
    return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
  };
  for (std::size_t i = 1; i < 4; ++i) EXPECT_GT(mean(replayed.results[0]), mean(replayed.results[i]));
  // Agreement with it, step by step.
  const OverlapTable table = overlaps(replayed).at(0);
  const std::size_t heads = table.jaccard.numbers.size() / 16;
  for (std::size_t head = 0; head < heads; ++head) {
    EXPECT_EQ(table.jaccard.numbers[head], 1) << "with itself";
    EXPECT_LT(table.jaccard.numbers[heads + head], 1);
    EXPECT_EQ(table.jaccard.numbers[heads + head], table.jaccard.numbers[4 * heads + head]);
  }
}

TEST(OracleResidency, IsTheOneThatLooksAheadUnderASchedule) {
  const TemporaryFolder folder;
  RandomTrace{.prompt_length = kPrompt, .num_tokens = kTokens}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const TraceReplay replayed =
      replay(trace, make_request({"oracle-attention+every(8)", "oracle-residency+every(8)"}, {"12"})).at(0);
  EXPECT_EQ(replayed.results.size(), 1u);
  EXPECT_THAT(replayed.notes, testing::Contains(HasSubstr("oracle-residency")));
}

}  // namespace
}  // namespace kvreplay::test
