// What holds of every policy under a schedule, on random traces of many shapes.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>

#include "base/error.h"
#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

constexpr int kPrompt = 60;
constexpr int kTokens = 92;
constexpr int kSteps = kTokens - kPrompt;

std::vector<RandomTrace> shapes() {
  const RandomTrace usual{.num_layers = 3, .prompt_length = kPrompt, .num_tokens = kTokens};
  std::vector<RandomTrace> all(8, usual);
  all[1].num_attention_heads = all[1].num_key_value_heads = 1;
  all[2].num_attention_heads = 8;
  all[2].num_key_value_heads = 1;
  all[3].layer_windows = {20, 0, 33};
  all[4].output_projection = false;
  all[5].type = DType::float16;
  all[5].representable_in_float16 = true;
  all[6].softcapping = 5;
  all[6].scales = {0.2, 0.5, 1};
  all[7].sinks = {0.5f, -1, 2, 0};
  return all;
}

// Policies of every kind that decide again and again.
std::vector<std::string> specs() {
  return {"snapkv(window=4)",
          "restkv(window=4)",
          "h2o(window=4)",
          "tova",
          "knorm",
          "keydiff",
          "caote(window=4)",
          "random",
          "recent",
          "streamingllm",
          "snapkv(window=4)+pyramid",
          "tova+chunks(size=4)",
          "knorm+protect(first=2,last=3)"};
}

// Those whose heads or layers get unequal shares.
std::vector<std::string> divided() {
  return {"snapkv(window=4)+adakv", "snapkv(window=4)+adakv(across=kv,floor=0)", "cake(window=4)", "knorm+global"};
}

std::vector<std::string> all_specs() {
  std::vector<std::string> all = specs();
  for (const std::string& spec : divided()) all.push_back(spec);
  return all;
}

std::vector<ReplayResult> results_of(const std::filesystem::path& file, const std::vector<std::string>& specs,
                                     const std::string& capacity, std::optional<Granularity> granularity = {}) {
  ReplayRequest request = make_request(specs, {capacity}, granularity);
  request.strict = true;
  const TraceReader trace(file);
  std::vector<TraceReplay> replays = replay({&trace, 1}, request);
  return std::move(replays.front().results);
}

class Decoding : public testing::TestWithParam<int> {
 protected:
  Decoding() : trace_(shapes()[static_cast<std::size_t>(GetParam())]) { trace_.write(file_); }

  TemporaryFolder folder_;
  std::filesystem::path file_ = folder_ / "t.h5";
  RandomTrace trace_;
};

TEST_P(Decoding, HoldsNoMoreThanTheCapacityAndWhatComesBetweenEvictions) {
  constexpr int kCapacity = 16;
  for (const std::string& spec : specs()) {
    if (spec.ends_with("pyramid")) continue;  // which gives some layers more
    for (const auto& [schedule, most] : {std::pair("+every", kCapacity + 1),
                                         {"+every(5)", kCapacity + 5},
                                         {"+every(slack=4)", kCapacity + 4},
                                         {"+every(5,attend=before)", 0}}) {
      const std::string whole = schedule == std::string("+every(5,attend=before)")
                                    ? spec + "+every(interval=5,attend=before)"
                                    : spec + schedule;
      const int allowed = most > 0 ? most : kCapacity;
      for (const ReplayResult& result : results_of(file_, {whole}, std::to_string(kCapacity))) {
        for (std::size_t i = 0; i < result.kept.sets.size(); ++i) {
          const std::size_t layer = i / static_cast<std::size_t>(result.kept.sets_per_layer);
          const AttentionRule rule = {.sliding_window = trace_.layer_windows.empty() ? 0 : trace_.layer_windows[layer]};
          for (int position = kPrompt; position < kTokens; ++position) {
            const auto first_visible = static_cast<int>(rule.first_visible(position));
            ASSERT_LE(result.kept.sets[i].count_at(position, kPrompt, first_visible), allowed)
                << whole << " at " << position;
          }
        }
        EXPECT_FALSE(result.kept.sets.back().is_one_eviction()) << whole;
      }
    }
  }
}

TEST_P(Decoding, IsOneEvictionWhereTheIntervalIsAllThatComes) {
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    for (const std::string& spec : granularity == Granularity::kv ? all_specs() : specs()) {
      const ReplayResult once = results_of(file_, {spec}, "16", granularity).front();
      const ReplayResult scheduled =
          results_of(file_, {fmt::format("{}+every({})", spec, kSteps)}, "16", granularity).front();
      for (const Measure measure : {Measure::layer_error, Measure::head_error, Measure::attention_recall}) {
        ASSERT_EQ(once.measures[measure].numbers, scheduled.measures[measure].numbers)
            << spec << ", " << name_of(granularity) << ", " << traits_of(measure).name;
      }
    }
  }
}

TEST_P(Decoding, LosesNothingWhereEverythingFits) {
  for (const std::string& spec : all_specs()) {
    const ReplayResult result = results_of(file_, {spec + "+every"}, std::to_string(kTokens)).front();
    for (const float error : result.measures[Measure::head_error].numbers) ASSERT_LE(error, 1e-6f) << spec;
    for (const float recall : result.measures[Measure::attention_recall].numbers) ASSERT_EQ(recall, 1) << spec;
  }
}

TEST_P(Decoding, DoesNotDependOnThreadsOrOnWhatElseIsReplayed) {
  std::vector<std::string> scheduled;
  for (const std::string& spec : all_specs()) scheduled.push_back(spec + "+every(3)");
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  std::vector<std::vector<ReplayResult>> alone;
  for (const std::string& spec : scheduled) alone.push_back(results_of(file_, {spec}, "16"));
  omp_set_num_threads(4);
  const std::vector<ReplayResult> together = results_of(file_, scheduled, "16");
  omp_set_num_threads(threads);
  ASSERT_EQ(together.size(), alone.size());
  for (std::size_t i = 0; i < together.size(); ++i) {
    EXPECT_EQ(together[i].kept.sets, alone[i].front().kept.sets) << scheduled[i];
    EXPECT_EQ(together[i].measures[Measure::layer_error].numbers,
              alone[i].front().measures[Measure::layer_error].numbers)
        << scheduled[i];
  }
}

TEST_P(Decoding, NeverEvictsAPinnedPrompt) {
  for (const std::string& spec : specs()) {
    // Patterns draw what they are, and a budget over layers gives some less than the prompt.
    if (spec.starts_with("recent") || spec.starts_with("streamingllm") || spec.ends_with("pyramid")) continue;
    if (!trace_.layer_windows.empty()) continue;  // whose prompt leaves the window
    for (const auto& [pin, capacity] : {std::pair("+pin(prompt)", kPrompt + 8), {"+pin(prompt,counted=false)", 8}}) {
      const ReplayResult result =
          results_of(file_, {spec + "+every" + std::string(pin)}, std::to_string(capacity)).front();
      for (const Residency& set : result.kept.sets) {
        ASSERT_EQ(set.kept().size(), static_cast<std::size_t>(kPrompt)) << spec << pin;
        for (std::size_t i = 0; i < set.kept().size() && !set.is_one_eviction(); ++i) {
          ASSERT_EQ(set.until()[i], Residency::kNever) << spec << pin;
        }
        EXPECT_EQ(set.count_at(kTokens - 1, kPrompt), kPrompt + 8 + 1) << spec << pin;
      }
    }
  }
}

TEST_P(Decoding, LosesForGoodWhatIsNotMasked) {
  std::vector<std::string> all;
  for (const Method* method : registered_methods()) {
    if (method->step != Method::Step::policy || method->name == "kept") continue;
    // Windows and intervals that fit the trace.
    std::string given;
    for (const Parameter& parameter : method->parameters) {
      for (const auto& [name, value] : {std::pair("window", 4), {"recent", 4}, {"interval", 5}, {"large", 4}}) {
        if (parameter.name != name || parameter.kind != Parameter::Kind::integer) continue;
        given += fmt::format("{}{}={}", given.empty() ? "" : ",", name, value);
      }
    }
    const std::string spec = given.empty() ? method->name : fmt::format("{}({})", method->name, given);
    if (make_policy(spec).schedule) all.push_back(spec);
  }
  const TraceReader trace(file_);
  const TraceReplay found = replay({&trace, 1}, make_request(all, {"16"})).front();
  EXPECT_GT(found.results.size(), 15U);
  for (const ReplayResult& result : found.results) {
    const bool has_gaps =
        std::ranges::any_of(result.kept.sets, [](const Residency& set) { return !set.gaps().empty(); });
    EXPECT_EQ(has_gaps, make_policy(result.policy).masks) << result.policy;
  }
}

TEST_P(Decoding, TurnsKeysToTheirPlacesAndBack) {
  // Where nothing goes, places are positions.
  const ReplayResult result =
      results_of(file_, {"streamingllm+every+positions(reindexed)"}, std::to_string(kTokens)).front();
  for (const float error : result.measures[Measure::head_error].numbers) ASSERT_LE(error, 1e-4f);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Decoding, testing::Range(0, 8));

}  // namespace
}  // namespace kvreplay::test
