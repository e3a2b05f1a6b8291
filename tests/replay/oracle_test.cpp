#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

// The mean over layers and queries of the squared layer error of one layer.
double objective(const ReplayResult& result, Index layer) {
  const Index queries = result.measures[Measure::layer_error].shape.back();
  double sum = 0;
  for (Index e = 0; e < queries; ++e) {
    const auto error = static_cast<double>(
        result.measures[Measure::layer_error].numbers[static_cast<std::size_t>(layer * queries + e)]);
    sum += error * error;
  }
  return sum / static_cast<double>(queries);
}

std::vector<TraceReplay> run(const RandomTrace& shape, const std::vector<std::string>& specs,
                             const std::string& capacity, Granularity granularity) {
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  ReplayRequest request;
  for (const std::string& spec : specs) request.policies.push_back(make_policy(spec));
  request.capacities.push_back(CapacityRequest::parse(capacity));
  request.granularity = granularity;
  return replay(TraceReader(folder / "t.h5"), request);
}

TEST(OracleReconstruction, IsNeverWorseThanAnyPolicyOfTheRun) {
  const std::vector<std::string> specs = {"oracle-reconstruction", "recent", "random",          "snapkv(window=4)",
                                          "restkv(window=4)",      "tova",   "oracle-attention"};
  for (const RandomTrace& shape :
       {RandomTrace{}, RandomTrace{.output_projection = false}, RandomTrace{.sliding_window = 20, .softcapping = 4},
        RandomTrace{.num_attention_heads = 8, .num_key_value_heads = 1},
        RandomTrace{.chunk = 32, .sinks = {0, 1, -1, 2}}}) {
    for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
      const auto replays = run(shape, specs, "9", granularity);
      const std::vector<ReplayResult>& results = replays.at(0).results;
      EXPECT_TRUE(results[0].oracle);
      EXPECT_FALSE(results[1].oracle);
      for (Index layer = 0; layer < shape.num_layers; ++layer) {
        double best = objective(results[1], layer);
        for (const ReplayResult& other : results) {
          EXPECT_LE(objective(results[0], layer), objective(other, layer)) << other.policy;
          if (&other != &results[0]) best = std::min(best, objective(other, layer));
        }
        EXPECT_LT(objective(results[0], layer), 0.9 * best) << "exchanges did not improve on where they started";
      }
    }
  }
}

TEST(OracleReconstruction, KeepsTheCapacityExactly) {
  const auto replays = run({}, {"oracle-reconstruction", "oracle-attention"}, "7", Granularity::kv);
  for (const ReplayResult& result : replays.at(0).results) {
    for (const Residency& residency : result.kept.sets) {
      const std::span<const int> set = residency.kept();
      EXPECT_EQ(set.size(), 7u);
      EXPECT_TRUE(std::ranges::is_sorted(set, std::less_equal<>()));
    }
  }
}

// One head, nine positions, three kept: all 84 sets can be tried.
TEST(OracleReconstruction, ComesCloseToTheBestSetThereIs) {
  double ratio = 0;
  constexpr int kRounds = 20;
  for (unsigned seed = 0; seed < kRounds; ++seed) {
    const RandomTrace shape{.num_layers = 1,
                            .num_attention_heads = 1,
                            .num_key_value_heads = 1,
                            .prompt_length = 9,
                            .num_tokens = 13,
                            .seed = seed};
    const TemporaryFolder folder;
    shape.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    ReplayRequest request;
    request.policies.push_back(make_policy("oracle-reconstruction"));
    class OneSet : public Pattern {
     public:
      explicit OneSet(std::vector<int> set) : set_(std::move(set)) {}
      std::vector<int> keep(const HeadShape&, int, int) const override { return set_; }

     private:
      std::vector<int> set_;
    };
    for (int a = 0; a < 9; ++a) {
      for (int b = a + 1; b < 9; ++b) {
        for (int c = b + 1; c < 9; ++c) {
          Policy policy;
          policy.canonical = fmt::format("{} {} {}", a, b, c);
          policy.rule = std::make_shared<OneSet>(std::vector<int>{a, b, c});
          // In a run of their own, so that the oracle cannot start from them.
          request.policies.push_back(policy);
        }
      }
    }
    ReplayRequest oracle_alone;
    oracle_alone.policies.push_back(request.policies[0]);
    request.capacities.push_back(CapacityRequest::parse("3"));
    oracle_alone.capacities = request.capacities;
    const double found = objective(replay(trace, oracle_alone).at(0).results.at(0), 0);
    const auto all = replay(trace, request);
    double best = found;
    for (const ReplayResult& result : all.at(0).results) best = std::min(best, objective(result, 0));
    EXPECT_GE(found, best);
    EXPECT_DOUBLE_EQ(objective(all[0].results.at(0), 0), best) << "started from the best set and lost it";
    ratio += std::sqrt(found / best) / kRounds;
  }
  EXPECT_LT(ratio, 1.15) << "on average more than 15 % above the least layer error";
}

TEST(OracleAttention, HasTheHighestAttentionRecall) {
  const auto replays =
      run({}, {"oracle-attention", "random", "tova", "restkv(window=4)", "h2o(window=4)"}, "10", Granularity::query);
  const auto recall = [](const ReplayResult& result) {
    return std::accumulate(result.measures[Measure::attention_recall].numbers.begin(),
                           result.measures[Measure::attention_recall].numbers.end(), 0.0);
  };
  for (const ReplayResult& other : replays.at(0).results) {
    EXPECT_LE(recall(other), recall(replays[0].results[0]) + 1e-4) << other.policy;
  }
}

}  // namespace
}  // namespace kvreplay::test
