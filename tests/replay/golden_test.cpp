// Our policies and measures against what the authors' own codes kept and what that did to the output.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "replay/golden.h"
#include "replay/trace_source.h"

namespace kvreplay::test {
namespace {

// Scores closer than this, relative to the larger, may come in either order.
constexpr float kTie = 1e-4f;

class GoldenFile : public testing::TestWithParam<std::filesystem::path> {};

std::string name_of_file(const testing::TestParamInfo<std::filesystem::path>& file) {
  std::string name = file.param.stem().string();
  std::ranges::replace_if(
      name, [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  return name;
}

// A policy that keeps given sets.
class GivenSets : public Pattern {
 public:
  explicit GivenSets(const KeptSets& sets) : sets_(sets) {}

  CapacityRule capacity_rule() const override { return CapacityRule::own; }

  std::vector<int> keep(const HeadShape& shape, int member, int /*capacity*/) const override {
    const std::span<const int> kept =
        sets_.of_query_head(shape.layer, shape.query_head(member), shape.group_size).kept();
    return {kept.begin(), kept.end()};
  }

 private:
  const KeptSets& sets_;
};

ReplayRequest request_for(Policy policy, const GoldenCall& call) {
  ReplayRequest request;
  request.policies.push_back(std::move(policy));
  request.capacities.push_back(CapacityRequest::parse(fmt::format("{}", call.capacity)));
  request.granularity = call.granularity;
  return request;
}

// Our scores for one set of the call: a query head's, what a group shares, or the mean over the layer.
std::vector<float> our_scores(const TraceReader& trace, const Ranking& ranking, const GoldenCall& call, int layer,
                              int set) {
  const TraceInfo& info = trace.info();
  const int group = info.model.group_size();
  std::vector<float> sum(static_cast<std::size_t>(info.prompt_length), 0.0f);
  int parts = 0;
  for (int kv_head = 0; kv_head < info.model.num_key_value_heads; ++kv_head) {
    std::vector<int> members;
    for (int member = 0; member < group; ++member) {
      const bool own = call.granularity == Granularity::query ? kv_head * group + member == set
                       : call.granularity == Granularity::kv  ? kv_head == set
                                                              : true;
      if (own) members.push_back(member);
    }
    if (members.empty()) continue;
    const TraceHead source(trace, layer, kv_head, info.prompt_length);
    const Head head(source);
    std::vector<float> shared(sum.size(), 0.0f);
    for (const int member : members) {
      std::vector<float> scores(sum.size(), 0.0f);
      ranking.score(head, member, scores);
      ranking.smooth(head, member, call.capacity, scores);
      for (std::size_t i = 0; i < sum.size(); ++i) shared[i] += scores[i] / static_cast<float>(members.size());
    }
    ranking.refine(head, members, call.capacity, shared);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += shared[i];
    ++parts;
  }
  for (float& score : sum) score /= static_cast<float>(parts);
  return sum;
}

// kvpress writes a constant where a position is kept without being ranked: by CriticalKV's first stage, and for LagKV's
// sinks and tail.
bool is_ranked(const GoldenCall& call, float golden_score) {
  if (call.spec.starts_with("criticalkv")) return golden_score < std::numeric_limits<float>::max();
  if (call.spec.starts_with("lagkv")) return golden_score < 1;
  return true;
}

// Scores of the ranked positions of one set, as the call stored them.
std::span<const float> golden_scores(const GoldenCall& call, int layer, int set) {
  const std::size_t rows = call.kept.sets.size();
  const std::size_t width = call.scores->size() / rows;
  const auto row = static_cast<std::size_t>(layer * call.kept.sets_per_layer + set);
  return std::span(*call.scores).subspan(row * width, width);
}

// LagKV's scores are ranks: where what is ranked is equal but for rounding, two neighbours can change places.
bool is_rank(const GoldenCall& call) { return call.spec.starts_with("lagkv"); }

// What lies between two ranks.
double rank_step(std::span<const float> scores) {
  return 1.0 / static_cast<double>(std::set<float>(scores.begin(), scores.end()).size() - 1);
}

// Counts the scores that were compared.
void expect_equal_scores(const TraceReader& trace, const GoldenCall& call, const Policy& policy, int& compared) {
  const Protection protection = policy.ranking()->protection();
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    for (int set = 0; set < call.kept.sets_per_layer; ++set) {
      const std::span<const float> golden = golden_scores(call, layer, set);
      const std::vector<float> ours = our_scores(trace, *policy.ranking(), call, layer, set);
      const auto first = static_cast<std::size_t>(protection.sinks);
      const std::size_t last = ours.size() - static_cast<std::size_t>(protection.window);
      ASSERT_GE(golden.size(), last);
      double product = 0;
      double square = 0;
      double largest = 0;
      float first_ranked = -std::numeric_limits<float>::infinity();  // our highest score of a ranked position
      for (std::size_t n = first; n < last; ++n) {
        // Attention of exactly 1 leaves infinity or nothing at all in the original scores.
        if (!is_ranked(call, golden[n]) || !std::isfinite(golden[n])) continue;
        first_ranked = std::max(first_ranked, ours[n]);
        largest = std::max(largest, std::abs(static_cast<double>(golden[n])));
        product += static_cast<double>(golden[n]) * static_cast<double>(ours[n]);
        square += static_cast<double>(ours[n]) * static_cast<double>(ours[n]);
      }
      if (square == 0) {
        ASSERT_EQ(largest, 0) << "layer " << layer << " set " << set;
        continue;
      }
      const double factor = product / square;
      ASSERT_GT(factor, 0);
      // A cosine near 0 is what is left of much larger products, which both sides rounded.
      const double rounding = call.spec == "keydiff" ? 1e-6 * largest : 1e-12;
      std::size_t swapped = 0;
      for (std::size_t n = first; n < last; ++n) {
        if (!is_ranked(call, golden[n])) {
          // Ours need not be the same constant, but must come before everything that is ranked.
          ASSERT_GT(ours[n], first_ranked) << "layer " << layer << " set " << set << " position " << n;
          continue;
        }
        if (!std::isfinite(golden[n])) continue;
        const double expected = static_cast<double>(golden[n]);
        if (is_rank(call) && std::abs(factor * static_cast<double>(ours[n]) - expected) > 1e-4 * expected) {
          ASSERT_LE(std::abs(factor * static_cast<double>(ours[n]) - expected), 1.01 * rank_step(golden));
          ++swapped;
          continue;
        }
        ASSERT_NEAR(factor * static_cast<double>(ours[n]), expected, 1e-4 * std::abs(expected) + rounding)
            << "layer " << layer << " set " << set << " position " << n;
        ++compared;
      }
      // Neighbours whose spreads differ by rounding alone: a pair or two in a set.
      ASSERT_LE(swapped, 2 + (last - first) / 100) << "layer " << layer << " set " << set;
    }
  }
}

TEST(GoldenFiles, AreThere) { EXPECT_FALSE(golden_files().empty()); }

TEST_P(GoldenFile, ScoresEqualUpToAPositiveFactor) {
  const TraceReader trace(GetParam());
  int compared = 0;
  for (const GoldenCall& call : golden_calls(GetParam())) {
    SCOPED_TRACE(call.id + " as " + call.spec);
    if (call.spec.empty()) continue;
    const Policy policy = make_policy(call.spec);
    if (call.scores && policy.ranking()) expect_equal_scores(trace, call, policy, compared);
  }
  const std::vector<GoldenCall> calls = golden_calls(GetParam());
  const bool scored =
      std::ranges::any_of(calls, [](const GoldenCall& call) { return call.scores.has_value() && !call.spec.empty(); });
  EXPECT_EQ(compared > 0, scored);
}

void expect_equal_sets(const TraceReader& trace, const GoldenCall& call) {
  const Policy policy = make_policy(call.spec);
  const int minimum = policy.minimum_capacity();
  if (call.capacity < minimum && call.capacity < trace.info().prompt_length && policy.ranking()) {
    // kvpress scores its window alike, and which part of it a smaller capacity keeps is arbitrary; we refuse.
    EXPECT_THROW(replay(trace, request_for(policy, call)), Error);
    return;
  }
  const auto replays = replay(trace, request_for(policy, call));
  const KeptSets& ours = replays.at(0).results.at(0).kept;
  ASSERT_EQ(ours.sets.size(), call.kept.sets.size());
  for (std::size_t set = 0; set < ours.sets.size(); ++set) {
    ASSERT_EQ(ours.sets[set].kept().size(), call.kept.sets[set].kept().size()) << "set " << set;
    if (ours.sets[set] == call.kept.sets[set]) continue;
    // Positions that only one of them keeps must be tied in the golden scores with the last one that was kept.
    ASSERT_TRUE(call.scores) << "set " << set << " differs and there are no scores that could tie";
    const int per_layer = ours.sets_per_layer;
    const auto scores = golden_scores(call, static_cast<int>(set) / per_layer, static_cast<int>(set) % per_layer);
    std::vector<int> differing;
    std::ranges::set_symmetric_difference(ours.sets[set].kept(), call.kept.sets[set].kept(),
                                          std::back_inserter(differing));
    // As PyTorch's top-k has it, what is not a number comes first.
    const auto score_of = [&scores](int position) {
      const float score = scores[static_cast<std::size_t>(position)];
      return std::isfinite(score) ? score : std::numeric_limits<float>::max();
    };
    const auto step = is_rank(call) ? static_cast<float>(1.01 * rank_step(scores)) : 0.0f;
    float lowest = std::numeric_limits<float>::max();
    for (const int position : call.kept.sets[set].kept()) {
      if (position < static_cast<int>(scores.size())) lowest = std::min(lowest, score_of(position));
    }
    for (const int position : differing) {
      ASSERT_LT(position, static_cast<int>(scores.size())) << "set " << set;
      // Denormal numbers are flushed to 0 by some, and are rounded coarsely by all.
      ASSERT_NEAR(score_of(position), lowest, step + kTie * std::abs(lowest) + 2 * std::numeric_limits<float>::min())
          << "set " << set << " position " << position;
    }
  }
}

TEST_P(GoldenFile, KeptSetsEqualWhereScoresAreNotTied) {
  const TraceReader trace(GetParam());
  for (const GoldenCall& call : golden_calls(GetParam())) {
    SCOPED_TRACE(call.id + " as " + call.spec);
    if (call.spec.empty()) continue;
    EXPECT_NO_THROW(expect_equal_sets(trace, call));
  }
}

void expect_equal_measures(const TraceReader& trace, const GoldenCall& call) {
  Policy given;
  given.canonical = call.id;
  given.rule = std::make_shared<GivenSets>(call.kept);
  const auto replays = replay(trace, request_for(given, call));
  const ReplayResult& result = replays.at(0).results.at(0);
  const auto expect_near = [](const std::vector<float>& ours, const std::vector<float>& golden, const char* what) {
    ASSERT_EQ(ours.size(), golden.size()) << what;
    for (std::size_t i = 0; i < ours.size(); ++i) {
      ASSERT_NEAR(ours[i], golden[i], 1e-4f * std::abs(golden[i]) + 2e-6f) << what << " " << i;
    }
  };
  expect_near(result.measures[Measure::head_error].numbers, call.head_error, "head_error");
  expect_near(result.measures[Measure::layer_error].numbers, call.layer_error, "layer_error");
  expect_near(result.measures[Measure::attention_recall].numbers, call.attention_recall, "attention_recall");
}

TEST_P(GoldenFile, MeasuresOfGoldenKeptSetsEqual) {
  const TraceReader trace(GetParam());
  const std::vector<GoldenCall> calls = golden_calls(GetParam());
  ASSERT_FALSE(calls.empty());
  for (const GoldenCall& call : calls) {
    SCOPED_TRACE(call.id);
    expect_equal_measures(trace, call);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenFile, testing::ValuesIn(golden_files()), name_of_file);

}  // namespace
}  // namespace kvreplay::test
