// Policies under schedules against what the authors' own codes kept at every step and what that did to the output.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "decode/golden.h"
#include "hdf5/hdf5.h"
#include "policy/decision.h"
#include "replay/engine.h"
#include "replay/trace_source.h"
#include "support/temporary_folder.h"
#include "trace/reader.h"

namespace kvreplay::test {
namespace {

class DecodeGolden : public testing::TestWithParam<GoldenRun> {};

class DecodeGoldenWithTies : public testing::TestWithParam<GoldenRun> {};

std::string name_of_run(const testing::TestParamInfo<GoldenRun>& run) {
  std::string name = run.param.file.stem().string() + "_" + run.param.id;
  std::ranges::replace_if(
      name, [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  return name;
}

std::vector<GoldenRun> runs(bool tie_dependent) {
  std::vector<GoldenRun> all;
  for (const std::filesystem::path& file : golden_decode_files()) {
    for (GoldenRun& run : golden_runs(file)) {
      if (run.tie_dependent == tie_dependent) all.push_back(std::move(run));
    }
  }
  return all;
}

TEST_P(DecodeGolden, KeepsWhatTheAuthorsCodeKeeps) {
  const GoldenRun& run = GetParam();
  const TraceReader trace(run.file);
  const TraceInfo& info = trace.info();
  const int prompt = info.prompt_length;
  const TemporaryFolder folder;
  std::string spec = run.spec;
  if (!run.noise.empty()) {
    const hdf5::File golden = hdf5::File::open(run.file);
    hdf5::File::create(folder / "noise.h5")
        .write("/gumbel_noise", golden.read_floats(run.noise), golden.dataset(run.noise).shape());
    spec.replace(spec.find("{noise}"), std::string("{noise}").size(), (folder / "noise.h5").string());
  }
  const ReplayEngine engine(std::span<const TraceReader>(&trace, 1),
                            make_request({spec}, {fmt::format("{}", run.capacity)}, run.granularity));
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
        ASSERT_EQ(cached, expected) << spec << ", layer " << layer << ", set " << set << ", after step " << step;
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
    if (run.masked_at_once) return;
    compare(measure_named("attention_recall"), run.attention_recall, heads);
    const std::vector<float>& found = result.measures[Measure::cache_size];
    ASSERT_EQ(found.size(), heads * queries);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const std::size_t set = i / queries * sets / heads;
      ASSERT_EQ(found[i], run.cache_size[(layer * sets + set) * queries + i % queries]) << "cache size, row " << i;
    }
  });
}

// A KV head with rows in any order, as a trace has them.
class OrderedHead : public HeadSource {
 public:
  OrderedHead(const TraceReader& trace, int layer, int kv_head, std::vector<int> rows, int next_position)
      : trace_(trace), shape_(head_shape(trace.info(), layer, kv_head, next_position)), rows_(std::move(rows)) {
    shape_.positions = CachePositions(rows_);
  }

  const HeadShape& shape() const override { return shape_; }
  const CachePositions& entries() const override { return shape_.positions; }
  void read_keys(Index first, Index count, float* rows) const override { read(HeadTensor::keys, first, count, rows); }
  void read_values(Index first, Index count, float* rows) const override {
    read(HeadTensor::values, first, count, rows);
  }
  std::span<const int> query_positions() const override {
    return std::span(trace_.info().query_positions).first(static_cast<std::size_t>(shape_.next_position));
  }
  Matrix queries(int member, Index first, Index count) const override {
    return trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member), first, count);
  }
  bool has_output_projection() const override { return false; }
  Matrix output_projection(int /*member*/) const override { return {}; }
  std::optional<std::vector<float>> attention_mass(int /*member*/) const override { return std::nullopt; }

 private:
  void read(HeadTensor tensor, Index first, Index count, float* rows) const {
    for (Index i = 0; i < count; ++i) {
      trace_.read_rows(shape_.layer, tensor, shape_.kv_head, rows_[static_cast<std::size_t>(first + i)], 1,
                       rows + i * shape_.head_dim);
    }
  }

  const TraceReader& trace_;
  HeadShape shape_;
  std::vector<int> rows_;
};

// Where equal scores occur and their order has consequences, every event begins with what the code left at the one
// before, and other rows are as good if their scores are the same.
TEST_P(DecodeGoldenWithTies, ScoresEveryEventAsTheAuthorsCodeDoes) {
  const GoldenRun& run = GetParam();
  const TraceReader trace(run.file);
  const TraceInfo& info = trace.info();
  const Policy policy = make_policy(run.spec);
  const auto layers = static_cast<std::size_t>(info.model.num_layers);
  const auto sets = static_cast<std::size_t>(run.sets_per_layer);
  ASSERT_EQ(run.granularity, Granularity::kv);
  int chosen = 0;
  for (std::size_t event = 0; event < run.steps.size(); ++event) {
    const int step = run.steps[event];
    for (std::size_t place = 0; place < layers * sets; ++place) {
      std::vector<int> rows;
      if (event > 0) {
        const auto& before = run.in_order.empty() ? run.kept : run.in_order;
        rows = before[(event - 1) * layers * sets + place];
      }
      for (int position = event == 0 ? 0 : run.steps[event - 1] + 1; position <= step; ++position) {
        rows.push_back(position);
      }
      const std::vector<int>& expected = run.kept[event * layers * sets + place];
      if (expected.size() == rows.size()) continue;
      const OrderedHead source(trace, static_cast<int>(place / sets), static_cast<int>(place % sets), rows, step + 1);
      const Head head(source);
      const int group = info.model.group_size();
      Matrix scores(group, head.rows());
      std::vector<int> members;
      for (int member = 0; member < group; ++member) {
        policy.ranking()->score(head, member, row_of(scores, member));
        policy.ranking()->smooth(head, member, run.capacity, row_of(scores, member));
        members.push_back(member);
      }
      Matrix shared;
      combine(scores, *policy.share, shared);
      policy.ranking()->refine(head, members, run.capacity, row_of(shared, 0));
      const Protection protection = policy.protection().held_by(head.shape());
      const std::vector<int> kept = select_top(row_of(shared, 0), protection, run.capacity);
      // What stands in the text's order is the same set; in any order the scores are the same.
      std::vector<float> ours;
      std::vector<float> theirs;
      for (int row = protection.sinks; row < head.rows() - protection.window; ++row) {
        const float score = shared(0, row);
        if (std::ranges::binary_search(kept, row)) ours.push_back(score);
        if (std::ranges::binary_search(expected, rows[static_cast<std::size_t>(row)])) theirs.push_back(score);
      }
      std::ranges::sort(ours);
      std::ranges::sort(theirs);
      ASSERT_EQ(ours.size(), theirs.size());
      for (std::size_t i = 0; i < ours.size(); ++i) {
        ASSERT_NEAR(ours[i], theirs[i], 1e-6 * std::abs(ours[i]))
            << run.spec << ", layer " << place / sets << ", set " << place % sets << ", after step " << step;
      }
      ++chosen;
    }
  }
  EXPECT_GT(chosen, 0);
}

INSTANTIATE_TEST_SUITE_P(Runs, DecodeGolden, testing::ValuesIn(runs(false)), name_of_run);
INSTANTIATE_TEST_SUITE_P(Runs, DecodeGoldenWithTies, testing::ValuesIn(runs(true)), name_of_run);

}  // namespace
}  // namespace kvreplay::test
