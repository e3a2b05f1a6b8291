#include "replay/replay.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "replay/overlap.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

// Every policy that needs nothing but a trace, with a window that small prompts can hold.
std::vector<std::string> policies() {
  return {"full",
          "random(seed=3)",
          "recent",
          "streamingllm(sinks=2)",
          "h2o(window=4)",
          "h2o(window=0,normalize=true)",
          "h2o(window=4,mask=window)",
          "tova",
          "tova(last=true)",
          "snapkv(window=4,kernel=3)",
          "snapkv(window=4,pooling=max)",
          "restkv(window=4,beta=3)",
          "restkv(window=4,metric=before,spatial=max,tau=2,normalize=true)",
          "restkv(window=5,projection=false,temporal=last,spatial=none)",
          "attention(window=4,values=true,temporal=ema,spatial=adaptive,beta=2)",
          "knorm",
          "keydiff",
          "lagkv(sinks=2,lag=8)",
          "caote(window=3)",
          "criticalkv(base=snapkv(window=4))",
          "criticalkv(base=tova,first=0.2)",
          "snapkv(window=4)+chunks(size=4)",
          "oracle-attention"};
}

std::string message_of(const RandomTrace& trace, const ReplayRequest& request) {
  const TemporaryFolder folder;
  trace.write(folder / "t.h5");
  try {
    replay(TraceReader(folder / "t.h5"), request);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

struct Shape {
  const char* name;
  RandomTrace trace;
};

class OddShapes : public testing::TestWithParam<Shape> {};

TEST_P(OddShapes, KeptSetsHoldTheCapacityAndWhatIsProtected) {
  const TemporaryFolder folder;
  GetParam().trace.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const int prompt = trace.info().prompt_length;
  const int window = GetParam().trace.sliding_window;
  const int chunk = GetParam().trace.chunk;
  const int held = window > 0 ? std::min(prompt, window - 1) : chunk > 0 ? prompt % chunk : prompt;
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    // Half of a short prompt would be below the windows.
    const std::string share = held < 10 ? "100%" : "50%";
    const ReplayRequest asked = make_request(policies(), {"5", "9", share, "1000"}, granularity);
    const std::vector<TraceReplay> replays = replay(trace, asked);
    for (const ReplayResult& result : replays.at(0).results) {
      SCOPED_TRACE(fmt::format("{} at {}, {}", result.policy, result.capacity_request, name_of(granularity)));
      const Policy policy = make_policy(result.policy);
      const int expected = policy.canonical == "full" ? held : std::min(held, result.capacity);
      for (const Residency& residency : result.kept.sets) {
        const std::span<const int> set = residency.kept();
        ASSERT_EQ(static_cast<int>(set.size()), expected);
        ASSERT_TRUE(std::ranges::is_sorted(set, std::less_equal<>()));
        ASSERT_GE(set.front(), prompt - held);
        ASSERT_LT(set.back(), prompt);
        const Protection protection = policy.ranking() ? policy.ranking()->protection() : Protection{};
        for (int i = 0; i < std::min(held, protection.window); ++i) {
          ASSERT_TRUE(std::ranges::binary_search(set, prompt - 1 - i));
        }
      }
      for (const MeasureTraits& measure : measures()) {
        for (const float number : result.measures[measure.measure].numbers) ASSERT_TRUE(std::isfinite(number));
      }
      if (expected == held) {
        EXPECT_EQ(std::ranges::max(result.measures[Measure::head_error].numbers), 0.0f);
        EXPECT_EQ(std::ranges::max(result.measures[Measure::layer_error].numbers), 0.0f);
        EXPECT_EQ(std::ranges::min(result.measures[Measure::attention_recall].numbers), 1.0f);
        EXPECT_GT(std::ranges::min(result.measures[Measure::cosine].numbers), 0.9999f);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, OddShapes,
    testing::Values(Shape{"gqa", {}}, Shape{"one_head", {.num_attention_heads = 1, .num_key_value_heads = 1}},
                    Shape{"gqa_8_to_1", {.num_attention_heads = 8, .num_key_value_heads = 1}},
                    Shape{"twelve_on_three", {.num_attention_heads = 12, .num_key_value_heads = 3, .head_dim = 48}},
                    Shape{"prompt_shorter_than_window", {.prompt_length = 3, .num_tokens = 6}},
                    Shape{"one_token_prompt", {.prompt_length = 1, .num_tokens = 3}},
                    Shape{"hidden_below_head_dim", {.head_dim = 16, .hidden_size = 4}},
                    Shape{"without_projection", {.output_projection = false}},
                    Shape{"float16", {.type = DType::float16}}, Shape{"bfloat16", {.type = DType::bfloat16}},
                    Shape{"sliding_window", {.sliding_window = 7}}, Shape{"soft_capping", {.softcapping = 5}},
                    Shape{"chunks", {.chunk = 46}}, Shape{"learned_sinks", {.sinks = {1, 0, -1, 9}}},
                    Shape{"scales", {.scales = {0.1, 0.7}}}),
    [](const auto& shape) { return std::string(shape.param.name); });

TEST(Replay, CapacityOneIsLegalWhereNothingIsProtected) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const auto replays =
      replay(TraceReader(folder / "t.h5"), make_request({"recent", "random", "tova", "h2o(window=0)"}, {"1"}));
  for (const ReplayResult& result : replays.at(0).results) {
    for (const Residency& set : result.kept.sets) EXPECT_EQ(set.kept().size(), 1u) << result.policy;
  }
}

TEST(Replay, ThreadsDoNotChangeABit) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 3, .num_attention_heads = 12, .num_key_value_heads = 6}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const ReplayRequest asked = make_request(policies(), {"8", "30%"});
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto expected = replay(trace, asked);
  for (const int count : {2, 3, 8}) {
    omp_set_num_threads(count);
    const auto replays = replay(trace, asked);
    for (std::size_t i = 0; i < expected.at(0).results.size(); ++i) {
      const ReplayResult& a = expected[0].results[i];
      const ReplayResult& b = replays.at(0).results.at(i);
      SCOPED_TRACE(fmt::format("{} with {} threads", a.policy, count));
      EXPECT_EQ(a.kept.sets, b.kept.sets);
      for (const MeasureTraits& measure : measures()) {
        EXPECT_EQ(a.measures[measure.measure].numbers, b.measures[measure.measure].numbers) << measure.name;
      }
    }
  }
  omp_set_num_threads(threads);
}

TEST(Replay, APolicyDoesNotDependOnItsCompany) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const auto together = replay(trace, make_request(policies(), {"8", "12"}));
  for (const std::string& spec : policies()) {
    const auto alone = replay(trace, make_request({spec}, {"12"}));
    const ReplayResult& expected = alone.at(0).results.at(0);
    const auto same = std::ranges::find_if(together.at(0).results, [&](const ReplayResult& result) {
      return result.policy == expected.policy && result.capacity == expected.capacity;
    });
    ASSERT_NE(same, together[0].results.end()) << spec;
    EXPECT_EQ(same->kept.sets, expected.kept.sets) << spec;
    EXPECT_EQ(same->measures[Measure::layer_error].numbers, expected.measures[Measure::layer_error].numbers) << spec;
  }
}

// The last columns of a table per query are those of the same table with fewer queries.
void expect_last_columns(const Table& all, const Table& last) {
  const auto count = static_cast<std::size_t>(last.shape.back());
  const auto of_all = static_cast<std::size_t>(all.shape.back());
  ASSERT_EQ(all.numbers.size() / of_all, last.numbers.size() / count);
  for (std::size_t i = 0; i < last.numbers.size(); ++i) {
    ASSERT_NEAR(last.numbers[i], all.numbers[i / count * of_all + of_all - count + i % count], 1e-6) << i;
  }
}

TEST(Replay, WhatStandsBeforeTheFirstEvaluationQueryStaysCached) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked = make_request(policies(), {"8", "12"});
  asked.eviction_positions = {30};
  const TraceReplay from_eviction = replay(trace, asked).at(0);
  EXPECT_EQ(from_eviction.evaluation_positions.size(), 40u);
  asked.evaluate_from = kPromptEnd;
  const TraceReplay from_prompt_end = replay(trace, asked).at(0);
  EXPECT_EQ(from_prompt_end.evaluate_from, 60);
  ASSERT_EQ(from_prompt_end.evaluation_positions.size(), 10u);
  EXPECT_EQ(from_prompt_end.evaluation_positions.front(), 60);
  for (std::size_t i = 0; i < from_eviction.results.size(); ++i) {
    const ReplayResult& all = from_eviction.results[i];
    const ReplayResult& last = from_prompt_end.results.at(i);
    SCOPED_TRACE(all.policy);
    if (all.oracle) continue;  // looks at the evaluation queries
    EXPECT_EQ(all.kept.sets, last.kept.sets) << "a policy sees what stands before the eviction, and nothing else";
    for (const Measure measure :
         {Measure::head_error, Measure::layer_error, Measure::attention_recall, Measure::cosine}) {
      expect_last_columns(all.measures[measure], last.measures[measure]);
    }
  }
}

TEST(Replay, OraclesAndRankAgreementLookAtTheSameQueries) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked =
      make_request({"oracle-attention", "h2o(window=0)", "tova", "oracle-reconstruction"}, {"8"}, Granularity::query);
  asked.eviction_positions = {30};
  asked.rank_agreement = true;
  const auto mean = [](const Table& table) {
    return std::accumulate(table.numbers.begin(), table.numbers.end(), 0.0) / static_cast<double>(table.numbers.size());
  };
  std::vector<double> recall_of_oracle;
  for (const int from : {30, 65}) {
    asked.evaluate_from = from;
    const TraceReplay found = replay(trace, asked).at(0);
    EXPECT_EQ(found.evaluation_positions.front(), from);
    recall_of_oracle.push_back(mean(found.results[0].measures[Measure::attention_recall]));
    for (std::size_t i = 1; i < found.results.size(); ++i) {
      EXPECT_LE(mean(found.results[i].measures[Measure::attention_recall]), recall_of_oracle.back() + 1e-6)
          << "the bound on these queries";
      EXPECT_GE(mean(found.results[i].measures[Measure::layer_error]) + 1e-6,
                mean(found.results[3].measures[Measure::layer_error]));
    }
    for (const float agreement : found.results[0].measures[Measure::spearman].numbers) EXPECT_EQ(agreement, 1.0f);
  }
  EXPECT_NE(recall_of_oracle[0], recall_of_oracle[1]);
}

TEST(Replay, EvictionsOfATraceAreEvaluatedOnTheSameQueries) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked = make_request({"recent"}, {"8"});
  asked.eviction_positions = {20, 50, 40};
  std::vector<TraceReplay> replays = replay(trace, asked);
  for (const TraceReplay& each : replays) {
    EXPECT_EQ(each.evaluation_positions, replays[1].evaluation_positions);
    EXPECT_EQ(each.evaluation_positions.front(), 50) << "the last of the evictions";
    EXPECT_TRUE(each.notes.empty());
  }
  asked.evaluate_from = 30;
  replays = replay(trace, asked);
  EXPECT_EQ(replays[0].evaluation_positions.front(), 30);
  EXPECT_EQ(replays[1].evaluation_positions.front(), 50);
  EXPECT_EQ(replays[2].evaluation_positions.front(), 40);
  for (const TraceReplay& each : replays) {
    ASSERT_EQ(each.notes.size(), 1u);
    EXPECT_EQ(each.notes[0],
              "evictions at 20, 50, 40 are evaluated on different queries, from 30, 40, 50 on, so results of different "
              "evictions cannot be compared; --evaluate-from 50 evaluates all of them on the same");
  }
}

// The measures, from their definitions, in double precision.
TEST(Replay, MeasuresFollowTheirDefinitions) {
  for (const RandomTrace& shape :
       {RandomTrace{}, RandomTrace{.sliding_window = 25, .softcapping = 3}, RandomTrace{.output_projection = false},
        RandomTrace{.chunk = 32}, RandomTrace{.sinks = {1, -2, 6, 0}}, RandomTrace{.scales = {0.2, 0.5}}}) {
    const TemporaryFolder folder;
    shape.write(folder / "t.h5");
    const RandomTrace::Tensors tensors = shape.tensors();
    const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"streamingllm(sinks=3)"}, {"10"}));
    const ReplayResult& result = replays.at(0).results.at(0);
    const int group = shape.num_attention_heads / shape.num_key_value_heads;
    const int d = shape.head_dim;
    const int evaluation = shape.num_tokens - shape.prompt_length;
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      const auto l = static_cast<std::size_t>(layer);
      for (int e = 0; e < evaluation; ++e) {
        const int t = shape.prompt_length + e;
        std::vector<double> full_all;
        std::vector<double> evicted_all;
        for (int h = 0; h < shape.num_attention_heads; ++h) {
          const auto row = [&](const std::vector<float>& tensor, int head, int position) {
            return tensor.data() + (static_cast<std::ptrdiff_t>(head) * shape.num_tokens + position) * d;
          };
          std::vector<double> weights(static_cast<std::size_t>(t + 1));
          int first = shape.sliding_window > 0 ? std::max(0, t - shape.sliding_window + 1) : 0;
          while (shape.chunk > 0 && first / shape.chunk < t / shape.chunk) ++first;
          for (int n = first; n <= t; ++n) {
            double logit = 0;
            for (int i = 0; i < d; ++i) {
              logit += static_cast<double>(row(tensors.queries[l], h, t)[i]) *
                       static_cast<double>(row(tensors.keys[l], h / group, n)[i]);
            }
            logit *= shape.scales.empty() ? 1 / std::sqrt(d) : shape.scales[l];
            if (shape.softcapping > 0) logit = shape.softcapping * std::tanh(logit / shape.softcapping);
            weights[static_cast<std::size_t>(n)] = std::exp(logit);
          }
          const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
          // A learned sink takes its share of every output.
          const double learned =
              shape.sinks.empty() ? 0 : std::exp(static_cast<double>(shape.sinks[static_cast<std::size_t>(h)]));
          // The window has dropped the first positions, and recent ones have their room.
          const bool sinks = shape.sliding_window == 0 && shape.chunk == 0;
          const auto cached = [&](int n) {
            return sinks ? n < 3 || n >= shape.prompt_length - 7 : n >= shape.prompt_length - 10;
          };
          double kept = 0;
          for (int n = 0; n <= t; ++n) kept += cached(n) ? weights[static_cast<std::size_t>(n)] : 0;
          double difference = 0;
          double norm = 0;
          double evicted_norm = 0;
          double dot = 0;
          for (int i = 0; i < d; ++i) {
            double full = 0;
            double evicted = 0;
            for (int n = 0; n <= t; ++n) {
              const double part =
                  weights[static_cast<std::size_t>(n)] * static_cast<double>(row(tensors.values[l], h / group, n)[i]);
              full += part / (total + learned);
              evicted += cached(n) ? part / (kept + learned) : 0;
            }
            difference += (evicted - full) * (evicted - full);
            norm += full * full;
            evicted_norm += evicted * evicted;
            dot += full * evicted;
            full_all.push_back(full);
            evicted_all.push_back(evicted);
          }
          const auto at = static_cast<std::size_t>((layer * shape.num_attention_heads + h) * evaluation + e);
          EXPECT_NEAR(result.measures[Measure::head_error].numbers[at], std::sqrt(difference / norm), 1e-5);
          EXPECT_NEAR(result.measures[Measure::attention_recall].numbers[at], kept / total, 1e-5);
          EXPECT_NEAR(result.measures[Measure::cosine].numbers[at], dot / std::sqrt(norm * evicted_norm), 1e-5);
        }
        double error = 0;
        double reference = 0;
        const auto width = full_all.size();
        const std::size_t rows = shape.output_projection ? static_cast<std::size_t>(shape.hidden_size) : width;
        for (std::size_t c = 0; c < rows; ++c) {
          double delta = 0;
          double out = 0;
          for (std::size_t i = 0; i < width; ++i) {
            const double w = shape.output_projection ? static_cast<double>(tensors.projection[l][c * width + i])
                                                     : (c == i ? 1.0 : 0.0);
            delta += w * (evicted_all[i] - full_all[i]);
            out += w * full_all[i];
          }
          error += delta * delta;
          reference += out * out;
        }
        EXPECT_NEAR(result.measures[Measure::layer_error].numbers[static_cast<std::size_t>(layer * evaluation + e)],
                    std::sqrt(error / reference), 1e-5);
      }
    }
  }
}

TEST(Replay, MoreCapacityNeverLosesAttention) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  for (const std::string& spec : policies()) {
    const Policy policy = make_policy(spec);
    if (policy.ranking() && policy.ranking()->depends_on_capacity()) continue;
    const auto replays = replay(trace, make_request({spec}, {"6", "11", "23", "50"}));
    for (std::size_t i = 1; i < replays.at(0).results.size(); ++i) {
      const auto& smaller = replays[0].results[i - 1].measures[Measure::attention_recall].numbers;
      const auto& larger = replays[0].results[i].measures[Measure::attention_recall].numbers;
      for (std::size_t j = 0; j < smaller.size(); ++j) EXPECT_GE(larger[j], smaller[j]) << spec;
    }
  }
}

TEST(Replay, PermutingHeadsPermutesResults) {
  const TemporaryFolder folder;
  const RandomTrace shape{.num_attention_heads = 6, .num_key_value_heads = 3};
  RandomTrace permuted = shape;
  permuted.head_order = {2, 0, 1};
  shape.write(folder / "a.h5");
  permuted.write(folder / "b.h5");
  std::vector<std::string> specs = policies();
  std::erase_if(specs, [](const std::string& spec) { return spec.starts_with("random"); });  // draws by head number
  for (const Granularity granularity : {Granularity::query, Granularity::kv}) {
    const auto a = replay(TraceReader(folder / "a.h5"), make_request(specs, {"9"}, granularity));
    const auto b = replay(TraceReader(folder / "b.h5"), make_request(specs, {"9"}, granularity));
    for (std::size_t i = 0; i < a.at(0).results.size(); ++i) {
      for (int layer = 0; layer < 2; ++layer) {
        for (int head = 0; head < 6; ++head) {
          const int original = permuted.head_order[static_cast<std::size_t>(head / 2)] * 2 + head % 2;
          EXPECT_EQ(b.at(0).results[i].kept.of_query_head(layer, head, 2),
                    a[0].results[i].kept.of_query_head(layer, original, 2))
              << a[0].results[i].policy;
        }
      }
    }
  }
}

TEST(Replay, StorageTypeDoesNotMatterWhereItLosesNothing) {
  const TemporaryFolder folder;
  RandomTrace shape{.representable_in_float16 = true};
  shape.write(folder / "float32.h5");
  shape.type = DType::float16;
  shape.write(folder / "float16.h5");
  const auto a = replay(TraceReader(folder / "float32.h5"), make_request(policies(), {"12"}));
  const auto b = replay(TraceReader(folder / "float16.h5"), make_request(policies(), {"12"}));
  for (std::size_t i = 0; i < a.at(0).results.size(); ++i) {
    EXPECT_EQ(a[0].results[i].kept.sets, b.at(0).results[i].kept.sets) << a[0].results[i].policy;
    EXPECT_EQ(a[0].results[i].measures[Measure::layer_error].numbers,
              b[0].results[i].measures[Measure::layer_error].numbers);
  }
}

// A policy may use only what lies before the eviction: the same run, cut short, must lead to the same kept sets.
TEST(Replay, EvictingEarlierSeesNothingThatCameLater) {
  const TemporaryFolder folder;
  const RandomTrace shape{.attention_mass = false};
  shape.write(folder / "long.h5");
  RandomTrace prompt_ends_there = shape;
  prompt_ends_there.prompt_length = 40;
  prompt_ends_there.write(folder / "short.h5");
  ReplayRequest early = make_request(policies(), {"12"});
  early.eviction_positions = {40};
  const auto a = replay(TraceReader(folder / "long.h5"), early);
  const auto b = replay(TraceReader(folder / "short.h5"), make_request(policies(), {"12"}));
  EXPECT_EQ(a.at(0).evaluation_positions.size(), 30u);
  for (std::size_t i = 0; i < a[0].results.size(); ++i) {
    EXPECT_EQ(a[0].results[i].kept.sets, b.at(0).results[i].kept.sets) << a[0].results[i].policy;
    EXPECT_EQ(a[0].results[i].measures[Measure::head_error].numbers,
              b[0].results[i].measures[Measure::head_error].numbers);
  }
}

TEST(Replay, RecordedAttentionMassIsUsedOnlyAtTheEndOfThePrompt) {
  const TemporaryFolder folder;
  // The random trace records the same mass for all positions: a tie, which earlier positions win.
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked = make_request({"h2o(window=2)"}, {"5"});
  EXPECT_EQ(replay(trace, asked).at(0).results.at(0).kept.sets.at(0), (std::vector<int>{0, 1, 2, 58, 59}));
  asked.eviction_positions = {50};
  EXPECT_NE(replay(trace, asked).at(0).results.at(0).kept.sets.at(0), (std::vector<int>{0, 1, 2, 48, 49}));
}

TEST(Replay, SpanRecallCountsWhatSurvives) {
  const TemporaryFolder folder;
  RandomTrace{.spans = {{50, 54, "half"}, {58, 65, "across"}, {62, 65, "later"}}}.write(folder / "t.h5");
  const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"recent"}, {"8"}));
  ASSERT_EQ(replays.at(0).spans.size(), 2u) << "a span after the eviction cannot be evicted";
  const ReplayResult& result = replays[0].results.at(0);
  EXPECT_EQ(result.measures[Measure::span_recall].shape, (std::vector<Index>{2, 4, 2}));
  EXPECT_FLOAT_EQ(result.measures[Measure::span_recall].numbers[0], 0.5f);
  EXPECT_FLOAT_EQ(result.measures[Measure::span_recall].numbers[1], 1.0f);
}

TEST(Replay, MissingOutputProjectionIsTold) {
  const TemporaryFolder folder;
  RandomTrace{.output_projection = false}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const auto replays = replay(trace, make_request({"restkv(window=4)", "restkv(window=4,projection=false)"}, {"9"}));
  ASSERT_EQ(replays.at(0).notes.size(), 2u);
  EXPECT_NE(replays[0].notes[0].find("restkv(window=4): the trace has no output projection"), std::string::npos);
  EXPECT_NE(replays[0].notes[1].find("layer error"), std::string::npos);
  EXPECT_EQ(replays[0].results[0].kept.sets, replays[0].results[1].kept.sets);
}

TEST(Replay, WhatCannotBeReplayedIsRefusedBeforehand) {
  EXPECT_NE(message_of({}, make_request({"snapkv"}, {"16"})).find("capacity 16 is below the 32 positions that snapkv"),
            std::string::npos);
  EXPECT_NE(message_of({}, make_request({"snapkv"}, {"10%"})).find("capacity 10% (6 of 60 positions) is below"),
            std::string::npos);
  EXPECT_NE(message_of({.captured_prompt_queries = 8}, make_request({"snapkv"}, {"40"})).find("--queries window:32"),
            std::string::npos);
  EXPECT_NE(message_of({.captured_prompt_queries = 8, .attention_mass = false}, make_request({"h2o"}, {"40"}))
                .find("--queries all"),
            std::string::npos);
  EXPECT_EQ(message_of({.captured_prompt_queries = 8}, make_request({"h2o"}, {"40"})), "");
  EXPECT_NE(message_of({.prompt_length = 60, .num_tokens = 60}, make_request({"recent"}, {"8"})).find("--generate"),
            std::string::npos);
  ReplayRequest outside = make_request({"recent"}, {"8"});
  outside.eviction_positions = {71};
  EXPECT_NE(message_of({}, outside).find("outside the trace's 70 tokens"), std::string::npos);
}

TEST(Replay, ACapacityAboveThePromptKeepsAllAndSaysSo) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"snapkv"}, {"1000"}));
  ASSERT_EQ(replays.at(0).notes.size(), 1u);
  EXPECT_NE(replays[0].notes[0].find("everything is kept"), std::string::npos);
  EXPECT_EQ(replays[0].results.at(0).kept.mean_size(), 60);
}

TEST(Capacity, IsACountOrAShare) {
  EXPECT_EQ(CapacityRequest::parse("128").resolve(1000), 128);
  EXPECT_EQ(CapacityRequest::parse("25%").resolve(777), 194);
  EXPECT_EQ(CapacityRequest::parse("29%").resolve(100), 29);
  EXPECT_EQ(CapacityRequest::parse("0.1%").resolve(100), 1);
  for (const char* text : {"", "0", "-3", "12x", "0%", "101%", "%", "1.5", "99999999999", "nan%"}) {
    EXPECT_THROW(CapacityRequest::parse(text), UsageError) << text;
  }
}

TEST(Overlap, FollowsItsDefinition) {
  EXPECT_FLOAT_EQ(overlap(std::vector{1, 2, 3, 4}, std::vector{3, 4, 5}).jaccard, 2.0f / 5);
  EXPECT_FLOAT_EQ(overlap(std::vector{1, 2, 3, 4}, std::vector{3, 4, 5}).containment, 2.0f / 3);
  EXPECT_FLOAT_EQ(overlap(std::vector<int>{}, std::vector{1}).jaccard, 0);
  EXPECT_FLOAT_EQ(overlap(std::vector<int>{}, std::vector<int>{}).jaccard, 1);
}

TEST(Overlap, ComparesAllPoliciesPerLayerAndHead) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const auto replays = replay(TraceReader(folder / "t.h5"),
                              make_request({"full", "recent", "streamingllm(sinks=4)", "tova"}, {"8", "16"}));
  const std::vector<OverlapTable> tables = overlaps(replays.at(0));
  ASSERT_EQ(tables.size(), 2u);
  EXPECT_EQ(tables[0].capacity_request, "8");
  EXPECT_EQ(tables[0].policies, (std::vector<std::string>{"full", "recent", "streamingllm", "tova"}));
  EXPECT_EQ(tables[0].jaccard.shape, (std::vector<Index>{4, 4, 2, 4}));
  const auto first_head_of = [](const Table& table, std::size_t a, std::size_t b) {
    return table.numbers[(a * 4 + b) * 8];
  };
  EXPECT_FLOAT_EQ(first_head_of(tables[0].jaccard, 1, 1), 1);
  // 4 recent positions in common, 4 + 4 of one's own.
  EXPECT_FLOAT_EQ(first_head_of(tables[0].jaccard, 1, 2), 4.0f / 12);
  EXPECT_FLOAT_EQ(first_head_of(tables[0].containment, 1, 2), 0.5f);
  EXPECT_FLOAT_EQ(first_head_of(tables[0].jaccard, 0, 1), 8.0f / 60);
  EXPECT_FLOAT_EQ(first_head_of(tables[0].containment, 0, 1), 1);
}

// Numbers that leave float32's range on the way must not come out as errors of 0.
TEST(Replay, OverflowIsNamedAndNotMeasured) {
  RandomTrace shape;
  RandomTrace::Tensors tensors = shape.tensors();
  const TemporaryFolder folder;
  TraceWriter writer(folder / "t.h5", shape.info(), DType::float32);
  for (float& key : tensors.keys[1]) key *= 1e20f;
  for (float& query : tensors.queries[1]) query *= 1e20f;
  for (int layer = 0; layer < 2; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    writer.write(layer, HeadTensor::keys, tensors.keys[l]);
    writer.write(layer, HeadTensor::values, tensors.values[l]);
    writer.write(layer, HeadTensor::queries, tensors.queries[l]);
    writer.write(layer, HeadTensor::outputs, tensors.outputs[l]);
  }
  writer.finish();
  for (const std::string spec : {"full", "recent", "snapkv(window=4)"}) {
    try {
      replay(TraceReader(folder / "t.h5"), make_request({spec}, {"8"}));
      FAIL() << spec;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("layer 1"), std::string::npos) << error.what();
    }
  }
}

TEST(Replay, LayersWithoutProjectionAreCounted) {
  const RandomTrace shape;
  const RandomTrace::Tensors tensors = shape.tensors();
  const TemporaryFolder folder;
  TraceWriter writer(folder / "t.h5", shape.info(), DType::float32);
  for (int layer = 0; layer < 2; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    writer.write(layer, HeadTensor::keys, tensors.keys[l]);
    writer.write(layer, HeadTensor::values, tensors.values[l]);
    writer.write(layer, HeadTensor::queries, tensors.queries[l]);
    writer.write(layer, HeadTensor::outputs, tensors.outputs[l]);
    if (layer == 0) writer.write_output_projection(layer, tensors.projection[l]);
  }
  writer.finish();
  const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"restkv(window=4)"}, {"9"}));
  ASSERT_EQ(replays.at(0).notes.size(), 2u);
  EXPECT_NE(replays[0].notes[0].find("1 of 2 layers have no output projection"), std::string::npos);
}

// What a plug-in's method returns goes into indices.
TEST(Replay, KeptSetsThatAreNoPositionsAreRefused) {
  class Wild : public Pattern {
   public:
    explicit Wild(std::vector<int> set) : set_(std::move(set)) {}
    std::vector<int> keep(const HeadShape&, int, int) const override { return set_; }

   private:
    std::vector<int> set_;
  };
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  for (const std::vector<int>& set : {std::vector<int>{}, {-1, 2}, {3, 60}, {3, 3}, {5, 4}}) {
    ReplayRequest wild = make_request({}, {"8"});
    wild.policies.push_back(Policy{.canonical = "wild", .rule = std::make_shared<Wild>(set)});
    EXPECT_THROW(replay(TraceReader(folder / "t.h5"), wild), Error);
  }
}

}  // namespace
}  // namespace kvreplay::test
