// Policies under schedules against what the authors' own codes kept at every step and what that did to the output.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "decode/golden.h"
#include "replay/engine.h"
#include "trace/reader.h"

namespace kvreplay::test {
namespace {

class DecodeGolden : public testing::TestWithParam<GoldenRun> {};

std::string name_of_run(const testing::TestParamInfo<GoldenRun>& run) {
  std::string name = run.param.file.stem().string() + "_" + run.param.id;
  std::ranges::replace_if(
      name, [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  return name;
}

std::vector<GoldenRun> all_runs() {
  std::vector<GoldenRun> all;
  for (const std::filesystem::path& file : golden_decode_files())
    std::ranges::move(golden_runs(file), std::back_inserter(all));
  return all;
}

TEST_P(DecodeGolden, KeepsWhatTheAuthorsCodeKeeps) {
  const GoldenRun& run = GetParam();
  if (run.spec.empty()) GTEST_SKIP() << run.id;
  const TraceReader trace(run.file);
  const TraceInfo& info = trace.info();
  const int prompt = info.prompt_length;
  const ReplayEngine engine(std::span<const TraceReader>(&trace, 1),
                            make_request({run.spec}, {fmt::format("{}", run.capacity)}, run.granularity));
  const auto heads = static_cast<std::size_t>(info.model.num_attention_heads);
  const auto queries = static_cast<std::size_t>(info.num_tokens() - prompt);
  engine.run(engine.units(), [&](const ReplayUnit& unit, const std::vector<LayerResult>& results) {
    ASSERT_EQ(results.size(), 1U);
    const LayerResult& result = results.front();
    const auto layer = static_cast<std::size_t>(unit.layer);
    const auto sets = static_cast<std::size_t>(run.sets_per_layer);
    for (std::size_t event = 0; event < run.steps.size(); ++event) {
      for (std::size_t set = 0; set < sets; ++set) {
        const int step = run.steps[event];
        const std::vector<int>& expected =
            run.kept[(event * static_cast<std::size_t>(info.model.num_layers) + layer) * sets + set];
        // A query that is masked by its own step's eviction sees what was left before its token came.
        std::vector<int> cached = result.kept[set].cached_at(step + (run.masked_at_once ? 0 : 1), prompt);
        if (!run.masked_at_once) cached.pop_back();
        ASSERT_EQ(cached, expected) << run.spec << ", layer " << layer << ", set " << set << ", after step " << step;
      }
    }
    const auto compare = [&](Measure measure, const std::vector<float>& expected, std::size_t rows) {
      const std::vector<float>& found = result.measures[measure];
      ASSERT_EQ(found.size(), rows * queries);
      for (std::size_t i = 0; i < found.size(); ++i) {
        ASSERT_NEAR(found[i], expected[layer * found.size() + i], 1e-4)
            << traits_of(measure).name << ", layer " << layer << ", row " << i / queries << ", query " << i % queries;
      }
    };
    // The code masks every query head of a group by itself; its sets are the cache's.
    if (run.masked_at_once && info.model.group_size() > 1) return;
    compare(measure_named("head_error"), run.head_error, heads);
    compare(measure_named("layer_error"), run.layer_error, 1);
    // These are of what was left after the eviction before.
    if (!run.masked_at_once) compare(measure_named("attention_recall"), run.attention_recall, heads);
  });
}

INSTANTIATE_TEST_SUITE_P(Runs, DecodeGolden, testing::ValuesIn(all_runs()), name_of_run);

}  // namespace
}  // namespace kvreplay::test
