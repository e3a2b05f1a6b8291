// The map of one head's importance: what the policy itself scores, against the equations in double precision.
#include "analysis/importance.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>

#include "analysis/retention.h"
#include "base/error.h"
#include "policy/policy.h"
#include "policy/smoothing.h"
#include "replay/trace_source.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using testing::AllOf;
using testing::HasSubstr;
using testing::SizeIs;

constexpr int kAll = 1 << 20;  // bins: one per position

class ImportanceTest : public testing::Test {
 protected:
  TraceReader trace(const RandomTrace& shape = {}) const {
    shape.write(folder_ / "t.h5");
    return TraceReader(folder_ / "t.h5");
  }

  test::TemporaryFolder folder_;
};

TEST_F(ImportanceTest, EndsInTheScoresOfThePolicy) {
  for (const RandomTrace& shape : {RandomTrace{}, RandomTrace{.num_attention_heads = 8, .output_projection = false},
                                   RandomTrace{.sliding_window = 20, .softcapping = 3}}) {
    const TraceReader reader = trace(shape);
    for (const char* metric : {"after", "before"}) {
      for (const char* temporal : {"ema", "mean", "last", "reversed-ema"}) {
        for (const char* rest :
             {"beta=3", "spatial=avg,kernel=3", "spatial=max,projection=false,tau=2", "spatial=none,normalize=true"}) {
          const std::string spec = fmt::format("restkv(window=6,metric={},temporal={},{})", metric, temporal, rest);
          SCOPED_TRACE(spec);
          const int head = shape.num_attention_heads - 1;
          const int eviction = shape.prompt_length - 2;
          const ImportanceMap map = importance_map(reader, 1, head, spec, 16, eviction, kAll);
          const int group = shape.num_attention_heads / shape.num_key_value_heads;
          const TraceHead source(reader, 1, head / group, eviction);
          const Head seen(source);
          const Policy policy = make_policy(spec);
          EXPECT_EQ(map.policy, policy.canonical);
          std::vector<float> scores(static_cast<std::size_t>(seen.rows()), 0.0f);
          policy.ranking()->score(seen, head % group, scores);
          const auto past = [&]() { return std::vector<float>(scores.begin(), scores.end() - 6); };
          EXPECT_EQ(map.temporal.back(), past()) << "to the bit";
          policy.ranking()->smooth(seen, head % group, 16, scores);
          EXPECT_EQ(map.spatial, past());
        }
      }
    }
  }
}

using DoubleMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Equation (1) for attention `a` [P] whose output runs over the first `summed` positions: scores of the first `count`.
std::vector<double> errors(const Eigen::RowVectorXd& a, const DoubleMatrix& values, const DoubleMatrix& projection,
                           Index summed, Index count) {
  const Eigen::RowVectorXd output = a.head(summed) * values.topRows(summed);
  std::vector<double> scores;
  for (Index n = 0; n < count; ++n) {
    scores.push_back(a(n) / (1 - a(n)) * (projection * (output - values.row(n)).transpose()).norm());
  }
  return scores;
}

void expect_near(const std::vector<float>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t n = 0; n < found.size(); ++n) {
    ASSERT_NEAR(found[n], expected[n], 1e-5 * std::max(expected[n], 1e-2)) << n;
  }
}

TEST_F(ImportanceTest, FollowsTheEquations) {
  constexpr int kWindow = 5;
  constexpr double kAlpha = 0.4;
  const RandomTrace shape;
  const TraceReader reader = trace(shape);
  const RandomTrace::Tensors tensors = shape.tensors();
  const int layer = 1;
  const int head = 2;
  const Index d = shape.head_dim;
  const Index prompt = shape.prompt_length;
  const Index tokens = shape.num_tokens;
  const DoubleMatrix keys = MatrixView(tensors.keys[1].data() + 1 * tokens * d, prompt, d).cast<double>();
  const DoubleMatrix values = MatrixView(tensors.values[1].data() + 1 * tokens * d, prompt, d).cast<double>();
  const DoubleMatrix queries = MatrixView(tensors.queries[1].data() + head * tokens * d, tokens, d).cast<double>();
  const DoubleMatrix projection =
      MatrixView(tensors.projection[1].data(), shape.hidden_size, shape.num_attention_heads * d)
          .middleCols(head * d, d)
          .cast<double>();
  DoubleMatrix attention = DoubleMatrix::Zero(kWindow, prompt);
  for (Index i = 0; i < kWindow; ++i) {
    const Index t = prompt - kWindow + i;
    Eigen::RowVectorXd weights = queries.row(t) * keys.topRows(t + 1).transpose() * shape.info().model.softmax_scale;
    for (double& weight : weights) weight = std::exp(weight);
    attention.row(i).head(t + 1) = weights / weights.sum();
  }
  const Index past = prompt - kWindow;

  const ImportanceMap after = importance_map(reader, layer, head, "restkv(window=5,alpha=0.4)", 16, 60, kAll);
  ASSERT_THAT(after.raw, SizeIs(kWindow));
  ASSERT_THAT(after.temporal, SizeIs(kWindow));
  EXPECT_EQ(after.positions, past);
  EXPECT_EQ(after.query_positions.front(), past);
  EXPECT_EQ(after.query_positions.back(), prompt - 1);
  Eigen::RowVectorXd average = attention.row(0);
  for (Index i = 0; i < kWindow; ++i) {
    SCOPED_TRACE(fmt::format("after, query {}", i));
    if (i > 0) average = (1 - kAlpha) * average + kAlpha * attention.row(i);
    expect_near(after.raw[static_cast<std::size_t>(i)], errors(attention.row(i), values, projection, past, past));
    expect_near(after.temporal[static_cast<std::size_t>(i)], errors(average, values, projection, past, past));
  }

  const ImportanceMap before =
      importance_map(reader, layer, head, "restkv(window=5,alpha=0.4,metric=before)", 16, 60, kAll);
  std::vector<double> moving;
  for (Index i = 0; i < kWindow; ++i) {
    SCOPED_TRACE(fmt::format("before, query {}", i));
    const std::vector<double> alone = errors(attention.row(i), values, projection, prompt, past);
    expect_near(before.raw[static_cast<std::size_t>(i)], alone);
    if (i == 0) moving = alone;
    for (std::size_t n = 0; n < moving.size() && i > 0; ++n) {
      moving[n] = (1 - kAlpha) * moving[n] + kAlpha * alone[n];
    }
    expect_near(before.temporal[static_cast<std::size_t>(i)], moving);
  }
}

TEST_F(ImportanceTest, BinsHoldMeansOfTheirPositions) {
  const TraceReader reader = trace();
  for (const std::string spec : {"restkv(window=4,beta=2)", "restkv(window=4,beta=2,metric=before)"}) {
    const ImportanceMap fine = importance_map(reader, 0, 1, spec, 12, 60, kAll);
    const ImportanceMap coarse = importance_map(reader, 0, 1, spec, 12, 60, 6);
    EXPECT_EQ(fine.bin_width, 1);
    EXPECT_EQ(coarse.bin_width, 10);
    EXPECT_EQ(coarse.positions, 56);
    EXPECT_EQ(coarse.width, fine.width);
    EXPECT_EQ(coarse.shift, fine.shift);
    const auto expect_means = [](const std::vector<float>& bins, const std::vector<float>& positions) {
      ASSERT_THAT(bins, SizeIs(6));
      for (std::size_t bin = 0; bin < 6; ++bin) {
        const std::size_t end = std::min<std::size_t>(10 * bin + 10, 56);
        double sum = 0;
        for (std::size_t n = 10 * bin; n < end; ++n) sum += static_cast<double>(positions[n]);
        EXPECT_NEAR(bins[bin], sum / static_cast<double>(end - 10 * bin), 1e-6 * sum);
      }
    };
    for (std::size_t i = 0; i < 4; ++i) {
      expect_means(coarse.raw[i], fine.raw[i]);
      expect_means(coarse.temporal[i], fine.temporal[i]);
    }
    expect_means(coarse.spatial, fine.spatial);
  }
}

TEST_F(ImportanceTest, SaysWhichWindowSmoothsInSpace) {
  const TraceReader reader = trace();
  const ImportanceMap adaptive = importance_map(reader, 0, 1, "restkv(window=6,beta=1)", 16, 60, 10);
  const TraceHead source(reader, 0, 0, 60);
  const AdaptiveWindow window = AdaptiveWindow::from_drift(attention_drift(Head(source), 1, 6, 10), 1, 5);
  EXPECT_EQ(adaptive.width, window.width);
  EXPECT_EQ(adaptive.shift, window.shift);
  const ImportanceMap average = importance_map(reader, 0, 1, "restkv(window=6,spatial=avg,kernel=7)", 16, 60, 10);
  EXPECT_EQ(average.width, 7);
  EXPECT_EQ(average.shift, 0);
  EXPECT_EQ(importance_map(reader, 0, 1, "restkv(window=6,spatial=none)", 16, 60, 10).width, 1);
}

TEST_F(ImportanceTest, TheSettingMayHaveABudgetOrBeTheAuthorsOwn) {
  const TraceReader reader = trace();
  const ImportanceMap plain = importance_map(reader, 0, 0, "restkv", 40, 60, 10);
  const ImportanceMap budget = importance_map(reader, 0, 0, "restkv+pyramid", 40, 60, 10);
  EXPECT_EQ(budget.policy, "restkv+pyramid");
  EXPECT_EQ(budget.spatial, plain.spatial);
  EXPECT_EQ(importance_map(reader, 0, 0, "restkv@rest-kv", 40, 60, 10).raw, plain.raw);
}

TEST_F(ImportanceTest, WhatCannotBeShownIsRefused) {
  const TraceReader reader = trace({.captured_prompt_queries = 8});
  const auto usage_error = [&](int layer, int head, const std::string& spec, int capacity) {
    return test::message_of<UsageError>([&]() { importance_map(reader, layer, head, spec, capacity, 60, 10); });
  };
  const auto error = [&](const std::string& spec, int eviction) {
    return test::message_of<Error>([&]() { importance_map(reader, 0, 0, spec, 60, eviction, 10); });
  };
  EXPECT_THAT(usage_error(0, 0, "snapkv(window=4)", 20), HasSubstr("'snapkv(window=4)' does not"));
  EXPECT_THAT(usage_error(0, 0, "restkv(windw=4)", 20), HasSubstr("windw"));
  EXPECT_THAT(usage_error(2, 0, "restkv(window=4)", 20),
              AllOf(HasSubstr("t.h5: there is no query head 0 of layer 2"), HasSubstr("layers are 0 to 1")));
  EXPECT_THAT(usage_error(0, 4, "restkv(window=4)", 20), HasSubstr("no query head 4"));
  EXPECT_THAT(usage_error(0, -1, "restkv(window=4)", 20), HasSubstr("no query head -1"));
  EXPECT_THAT(usage_error(0, 0, "restkv(window=4)", 3), HasSubstr("capacity 3 is below the 4 positions"));
  EXPECT_THAT(error("restkv(window=9)", 60),
              AllOf(HasSubstr("needs the last 9 queries before position 60"), HasSubstr("holds 8 of them")));
  EXPECT_THAT(error("restkv(window=4)", 4), HasSubstr("no position is left before the observation window"));
  EXPECT_THAT(error("restkv(window=4)", 71), HasSubstr("eviction position 71 is outside"));
}

}  // namespace
}  // namespace kvreplay
