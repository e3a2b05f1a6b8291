// Our policies and measures against what the authors' own codes kept and what that did to the output.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "replay/golden.h"
#include "replay/trace_head.h"

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

  std::vector<int> keep(const HeadShape& shape, int member, int /*capacity*/) const override {
    return sets_.of_query_head(shape.layer, shape.query_head(member), shape.group_size);
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
      ranking.score(head, member, call.capacity, scores);
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
  if (call.id == "kvpress-critical-snapkv") return golden_score < std::numeric_limits<float>::max();
  if (call.id == "kvpress-lagkv") return golden_score < 1;
  return true;
}

// Scores of the ranked positions of one set, as the call stored them.
std::span<const float> golden_scores(const GoldenCall& call, int layer, int set) {
  const std::size_t rows = call.kept.sets.size();
  const std::size_t width = call.scores->size() / rows;
  const auto row = static_cast<std::size_t>(layer * call.kept.sets_per_layer + set);
  return std::span(*call.scores).subspan(row * width, width);
}

TEST_P(GoldenFile, ScoresEqualUpToAPositiveFactor) {
  const TraceReader trace(GetParam());
  int compared = 0;
  for (const GoldenCall& call : golden_calls(GetParam())) {
    if (!call.scores) continue;
    SCOPED_TRACE(call.id + " as " + call.spec);
    const Policy policy = make_policy(call.spec);
    if (!policy.ranking) continue;
    const Protection protection = policy.ranking->protection();
    for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
      for (int set = 0; set < call.kept.sets_per_layer; ++set) {
        const std::span<const float> golden = golden_scores(call, layer, set);
        const std::vector<float> ours = our_scores(trace, *policy.ranking, call, layer, set);
        const auto first = static_cast<std::size_t>(protection.sinks);
        const std::size_t last = ours.size() - static_cast<std::size_t>(protection.window);
        ASSERT_GE(golden.size(), last);
        double product = 0;
        double square = 0;
        for (std::size_t n = first; n < last; ++n) {
          if (!is_ranked(call, golden[n])) continue;
          product += static_cast<double>(golden[n]) * static_cast<double>(ours[n]);
          square += static_cast<double>(ours[n]) * static_cast<double>(ours[n]);
        }
        const double factor = product / square;
        ASSERT_GT(factor, 0);
        for (std::size_t n = first; n < last; ++n) {
          if (!is_ranked(call, golden[n])) {
            // Ours need not be the same constant, but must come before everything that is ranked.
            ASSERT_GE(ours[n], 1) << "layer " << layer << " set " << set << " position " << n;
            continue;
          }
          const double expected = static_cast<double>(golden[n]);
          ASSERT_NEAR(factor * static_cast<double>(ours[n]), expected, 1e-4 * std::abs(expected) + 1e-12)
              << "layer " << layer << " set " << set << " position " << n;
          ++compared;
        }
      }
    }
  }
  RecordProperty("scores_compared", compared);
}

TEST_P(GoldenFile, KeptSetsEqualWhereScoresAreNotTied) {
  const TraceReader trace(GetParam());
  for (const GoldenCall& call : golden_calls(GetParam())) {
    SCOPED_TRACE(call.id + " as " + call.spec);
    const auto replays = replay(trace, request_for(make_policy(call.spec), call));
    const KeptSets& ours = replays.at(0).results.at(0).kept;
    ASSERT_EQ(ours.sets.size(), call.kept.sets.size());
    for (std::size_t set = 0; set < ours.sets.size(); ++set) {
      ASSERT_EQ(ours.sets[set].size(), call.kept.sets[set].size()) << "set " << set;
      if (ours.sets[set] == call.kept.sets[set]) continue;
      // Positions that only one of them keeps must be tied in the golden scores with the last one that was kept.
      ASSERT_TRUE(call.scores) << "set " << set << " differs and there are no scores that could tie";
      const int per_layer = ours.sets_per_layer;
      const auto scores = golden_scores(call, static_cast<int>(set) / per_layer, static_cast<int>(set) % per_layer);
      std::vector<int> differing;
      std::ranges::set_symmetric_difference(ours.sets[set], call.kept.sets[set], std::back_inserter(differing));
      float lowest = std::numeric_limits<float>::infinity();
      for (const int position : call.kept.sets[set]) {
        if (position < static_cast<int>(scores.size())) {
          lowest = std::min(lowest, scores[static_cast<std::size_t>(position)]);
        }
      }
      for (const int position : differing) {
        ASSERT_LT(position, static_cast<int>(scores.size())) << "set " << set;
        ASSERT_NEAR(scores[static_cast<std::size_t>(position)], lowest, kTie * std::abs(lowest))
            << "set " << set << " position " << position;
      }
    }
  }
}

TEST_P(GoldenFile, MeasuresOfGoldenKeptSetsEqual) {
  const TraceReader trace(GetParam());
  const std::vector<GoldenCall> calls = golden_calls(GetParam());
  ASSERT_FALSE(calls.empty());
  for (const GoldenCall& call : calls) {
    SCOPED_TRACE(call.id);
    Policy given;
    given.canonical = call.id;
    given.pattern = std::make_shared<GivenSets>(call.kept);
    const auto replays = replay(trace, request_for(given, call));
    const ReplayResult& result = replays.at(0).results.at(0);
    const auto expect_near = [](const std::vector<float>& ours, const std::vector<float>& golden, const char* what) {
      ASSERT_EQ(ours.size(), golden.size()) << what;
      for (std::size_t i = 0; i < ours.size(); ++i) {
        ASSERT_NEAR(ours[i], golden[i], 1e-4f * std::max(1.0f, std::abs(golden[i]))) << what << " " << i;
      }
    };
    expect_near(result.head_error.numbers, call.head_error, "head_error");
    expect_near(result.layer_error.numbers, call.layer_error, "layer_error");
    expect_near(result.attention_recall.numbers, call.attention_recall, "attention_recall");
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenFile, testing::ValuesIn(golden_files()), name_of_file);

}  // namespace
}  // namespace kvreplay::test
