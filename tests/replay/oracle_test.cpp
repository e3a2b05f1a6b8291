#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "policy/exchanges.h"
#include "replay/replay.h"
#include "replay/trace_source.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
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

using Sets = std::vector<std::vector<int>>;

// A layer's objective and the exchanges, straight from their definitions: every set that one could get to is attended
// to from the start.
class Definition {
 public:
  Definition(const TraceReader& trace, int layer, int eviction, int evaluate_from) : eviction_(eviction) {
    const TraceInfo& info = trace.info();
    const ModelInfo& model = info.model;
    const int window = info.layers[static_cast<std::size_t>(layer)].rule.sliding_window;
    for (int head = 0; head < model.num_attention_heads; ++head) {
      const int kv_head = head / model.group_size();
      const auto tokens = info.num_tokens();
      const Eigen::MatrixXd keys = trace.read(layer, HeadTensor::keys, kv_head, 0, tokens).cast<double>();
      values_.emplace_back(trace.read(layer, HeadTensor::values, kv_head, 0, tokens).cast<double>());
      std::vector<Eigen::VectorXd>& weights = weights_.emplace_back();
      for (std::size_t q = 0; q < info.query_positions.size(); ++q) {
        const int position = info.query_positions[q];
        if (position < std::max(eviction, evaluate_from)) continue;
        const Eigen::RowVectorXd query =
            trace.read(layer, HeadTensor::queries, head, static_cast<Index>(q), 1).row(0).cast<double>();
        Eigen::VectorXd row = Eigen::VectorXd::Zero(tokens);
        for (int n = window > 0 ? std::max(0, position - window + 1) : 0; n <= position; ++n) {
          double logit = query.dot(keys.row(n)) * model.softmax_scale;
          const double cap = model.attn_logit_softcapping;
          if (cap > 0) logit = cap * std::tanh(logit / cap);
          row(n) = std::exp(logit);
        }
        weights.push_back(row);
      }
      Eigen::MatrixXd projection = Eigen::MatrixXd::Zero(model.num_attention_heads * model.head_dim, model.head_dim);
      if (trace.has_output_projection(layer)) {
        projection = trace.read_output_projection(layer, head).cast<double>();
      } else {
        projection.middleRows(head * model.head_dim, model.head_dim).setIdentity();
      }
      projections_.push_back(projection);
    }
  }

  double objective(const Sets& sets) const {
    const std::size_t queries = weights_.front().size();
    double sum = 0;
    for (std::size_t q = 0; q < queries; ++q) {
      Eigen::VectorXd full = Eigen::VectorXd::Zero(projections_.front().rows());
      Eigen::VectorXd error = full;
      for (std::size_t head = 0; head < weights_.size(); ++head) {
        const Eigen::VectorXd& all = weights_[head][q];
        Eigen::VectorXd cached = all;
        cached.head(eviction_).setZero();
        for (const int n : sets[head * sets.size() / weights_.size()]) cached(n) = all(n);
        const Eigen::VectorXd exact = values_[head].transpose() * all / all.sum();
        const Eigen::VectorXd evicted = values_[head].transpose() * cached / cached.sum();
        full += projections_[head] * exact;
        error += projections_[head] * (evicted - exact);
      }
      sum += error.squaredNorm() / full.squaredNorm();
    }
    return sum / static_cast<double>(queries);
  }

  // Sets `first` to `first` + `count` − 1 are one.
  void improve(Sets& sets, std::size_t first, std::size_t count, int first_held, int exchanges) const {
    const auto objective_with = [&](const std::vector<int>& set) {
      Sets with = sets;
      std::fill_n(with.begin() + static_cast<std::ptrdiff_t>(first), count, set);
      return objective(with);
    };
    for (int i = 0; i < exchanges; ++i) {
      const std::vector<int> before = sets[first];
      std::vector<int> best;
      double least = std::numeric_limits<double>::infinity();
      const auto consider = [&](const std::vector<int>& set) {
        if (const double found = objective_with(set); found < least) {
          least = found;
          best = set;
        }
      };
      for (int n = first_held; n < eviction_; ++n) {
        if (std::ranges::binary_search(before, n)) continue;
        std::vector<int> with = before;
        with.insert(std::ranges::lower_bound(with, n), n);
        consider(with);
      }
      const std::vector<int> larger = best;
      least = std::numeric_limits<double>::infinity();
      for (const int n : larger) {
        std::vector<int> without = larger;
        std::erase(without, n);
        consider(without);
      }
      if (least >= objective_with(before)) return;
      std::fill_n(sets.begin() + static_cast<std::ptrdiff_t>(first), count, best);
    }
  }

 private:
  int eviction_;
  std::vector<Eigen::MatrixXd> values_;                // [head]: [T, D]
  std::vector<std::vector<Eigen::VectorXd>> weights_;  // [head][query]: [T]
  std::vector<Eigen::MatrixXd> projections_;           // [head]: [C, D]
};

// As many positions for every set, some of those from `first_held` on.
Sets some_sets(std::size_t count, bool equal, int size, int first_held, int eviction) {
  Sets sets(count);
  for (std::size_t set = 0; set < count; ++set) {
    for (int i = 0; i < size; ++i) {
      const int shift = equal ? 0 : static_cast<int>(set);
      sets[set].push_back(first_held + (7 * i + 3 * shift) % (eviction - first_held));
    }
    std::ranges::sort(sets[set]);
  }
  return sets;
}

TEST(OracleReconstruction, ExchangesWhatTheDefinitionDoes) {
  const RandomTrace small{.head_dim = 5, .hidden_size = 11, .prompt_length = 31, .num_tokens = 36};
  RandomTrace without_projection = small;
  without_projection.output_projection = false;
  RandomTrace windows = small;
  windows.sliding_window = 12;
  windows.softcapping = 4;
  RandomTrace eight_to_one = small;
  eight_to_one.num_attention_heads = 8;
  eight_to_one.num_key_value_heads = 1;
  RandomTrace more_queries = small;
  more_queries.num_key_value_heads = 4;
  more_queries.num_tokens = 31 + 11;
  for (const RandomTrace& shape : {small, without_projection, windows, eight_to_one, more_queries}) {
    const TemporaryFolder folder;
    shape.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    for (const int eviction : {31, 24}) {
      const int first_held = shape.sliding_window > 0 ? eviction - shape.sliding_window + 1 : 0;
      const Definition definition(trace, 1, eviction, 31);
      LayerExchanges layer(TraceLayer(trace, 1, Eviction{eviction, 31}));
      for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
        SCOPED_TRACE(fmt::format("{} heads on {}, eviction at {}, granularity {}", shape.num_attention_heads,
                                 shape.num_key_value_heads, eviction, name_of(granularity)));
        const auto count = static_cast<std::size_t>(granularity == Granularity::query ? shape.num_attention_heads
                                                                                      : shape.num_key_value_heads);
        const std::size_t together = granularity == Granularity::layer ? count : 1;
        const Sets start = some_sets(count, together > 1, 6, first_held, eviction);
        for (const int exchanges : {1, 4}) {
          Sets expected = start;
          for (std::size_t set = 0; set < count; set += together) {
            definition.improve(expected, set, together, first_held, exchanges);
          }
          EXPECT_LT(definition.objective(expected), definition.objective(start));
          EXPECT_EQ(layer.improve(granularity, start, exchanges), expected);
        }
      }
    }
  }
}

// Where a query attends to one position alone, what is left without it is hardly more than rounding.
TEST(OracleReconstruction, LeavesEveryQuerySomethingToAttendTo) {
  const RandomTrace shape{.prompt_length = 31, .num_tokens = 36};
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  edit(folder / "t.h5", [](std::int64_t file) {
    for (const Index position : {3, 10, 17, 24}) {
      for (const Index dimension : {0, 3, 6}) {
        poke(file, "/layers/1/keys", {0, position, dimension}, dimension == 3 ? -60.0f : 60.0f);
      }
    }
  });
  const TraceReader trace(folder / "t.h5");
  const Definition definition(trace, 1, 31, 31);
  LayerExchanges layer(TraceLayer(trace, 1, Eviction{31, 31}));
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    const Sets start =
        some_sets(granularity == Granularity::query ? 4 : 2, granularity == Granularity::layer, 6, 0, 31);
    const Sets improved = layer.improve(granularity, start, 20);
    EXPECT_LE(definition.objective(improved), definition.objective(start));
  }
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
