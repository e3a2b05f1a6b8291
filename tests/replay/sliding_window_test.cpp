// Layers with a sliding window hold, and so can lose, only what later queries still see.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "replay/replay.h"
#include "replay/results_file.h"
#include "replay/results_reader.h"
#include "replay/trace_source.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::Contains;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Le;

// Every policy that needs no file, and every step after one.
std::vector<std::string> every_policy() {
  std::vector<std::string> specs = {"snapkv+adakv",
                                    "knorm+adakv(across=kv)",
                                    "restkv+pyramid",
                                    "recent+pyramid",
                                    "streamingllm+pyramid",
                                    "tova+chunks(size=4)",
                                    "restkv(window=4,metric=before,spatial=max)",
                                    "snapkv(window=4)+chunks",
                                    "h2o(normalize=true)",
                                    "attention(values=true,spatial=adaptive,beta=2)"};
  for (const Method* method : registered_methods()) {
    const bool needs_file =
        std::ranges::any_of(method->parameters, [](const Parameter& p) { return p.kind == Parameter::Kind::file; });
    if (method->step == Method::Step::policy && !needs_file) specs.push_back(written_name(*method));
  }
  return specs;
}

// 150 of its tokens are before the eviction, of which layers hold 20, 119, 150, 20, 150 and 89.
RandomTrace windowed() {
  return {.num_layers = 6,
          .hidden_size = 16,
          .prompt_length = 200,
          .num_tokens = 210,
          .layer_windows = {21, 120, 0, 21, 500, 90}};
}

std::vector<TraceReplay> replayed(const RandomTrace& shape, ReplayRequest request, int evict_at) {
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  request.eviction_positions = {evict_at};
  return replay(TraceReader(folder / "t.h5"), request);
}

std::span<const float> of_layer(const Table& table, int layer) {
  const std::size_t size = table.numbers.size() / static_cast<std::size_t>(table.shape.front());
  return std::span(table.numbers).subspan(static_cast<std::size_t>(layer) * size, size);
}

std::vector<int> range(int first, int end) {
  std::vector<int> all(static_cast<std::size_t>(end - first));
  std::iota(all.begin(), all.end(), first);
  return all;
}

TEST(SlidingWindow, EveryPolicyKeepsHeldPositionsAlone) {
  const TraceReplay replay = replayed(windowed(), make_request(every_policy(), {"70", "80%"}), 150).at(0);
  EXPECT_THAT(replay.held, ElementsAre(20, 119, 150, 20, 150, 89));
  for (const ReplayResult& result : replay.results) {
    for (int layer = 0; layer < replay.model.num_layers; ++layer) {
      SCOPED_TRACE(fmt::format("{} at {}, layer {}", result.policy, result.capacity_request, layer));
      const int held = replay.held[static_cast<std::size_t>(layer)];
      const bool keeps_all = held <= 70 && result.capacity_request == "70";
      for (int set = 0; set < result.kept.sets_per_layer; ++set) {
        const std::span<const int> kept =
            result.kept.sets[static_cast<std::size_t>(layer * result.kept.sets_per_layer + set)].kept();
        ASSERT_FALSE(kept.empty());
        ASSERT_TRUE(std::ranges::is_sorted(kept, std::less_equal<>()));
        ASSERT_GE(kept.front(), 150 - held);
        ASSERT_LT(kept.back(), 150);
        if (keeps_all) {
          ASSERT_TRUE(std::ranges::equal(kept, range(150 - held, 150)));
        }
      }
      if (keeps_all) {
        // Keys that are turned to their places and back are rounded.
        const bool turns = make_policy(result.policy).row_positions == RowPositions::reindexed;
        const float rounding = turns ? 1e-4f : 0.0f;
        EXPECT_THAT(of_layer(result.measures[Measure::layer_error], layer), Each(Le(rounding)));
        EXPECT_THAT(of_layer(result.measures[Measure::head_error], layer), Each(Le(rounding)));
        EXPECT_THAT(of_layer(result.measures[Measure::attention_recall], layer), Each(1.0f));
      }
    }
    for (const Measure measure :
         {Measure::head_error, Measure::layer_error, Measure::attention_recall, Measure::cosine}) {
      for (const float number : result.measures[measure].numbers) ASSERT_TRUE(std::isfinite(number)) << result.policy;
    }
  }
}

TEST(SlidingWindow, ThreadsDoNotChangeABit) {
  const TemporaryFolder folder;
  windowed().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked = make_request(every_policy(), {"80%"});
  asked.eviction_positions = {150};
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto expected = replay(trace, asked);
  omp_set_num_threads(5);
  const auto found = replay(trace, asked);
  omp_set_num_threads(threads);
  for (std::size_t i = 0; i < expected.at(0).results.size(); ++i) {
    SCOPED_TRACE(expected[0].results[i].policy);
    EXPECT_EQ(expected[0].results[i].kept.sets, found.at(0).results.at(i).kept.sets);
    EXPECT_EQ(expected[0].results[i].measures[Measure::layer_error].numbers,
              found[0].results[i].measures[Measure::layer_error].numbers);
  }
}

TEST(SlidingWindow, OneThatReachesBeyondThePromptIsNone) {
  RandomTrace without = windowed();
  without.layer_windows.clear();
  RandomTrace huge = without;
  huge.sliding_window = 1000;
  ReplayRequest asked = make_request(every_policy(), {"70", "80%"});
  asked.rank_agreement = true;
  const TraceReplay expected = replayed(without, asked, 150).at(0);
  const TraceReplay found = replayed(huge, asked, 150).at(0);
  EXPECT_EQ(found.held, expected.held);
  EXPECT_EQ(found.notes, expected.notes);
  for (std::size_t i = 0; i < expected.results.size(); ++i) {
    const ReplayResult& a = expected.results[i];
    const ReplayResult& b = found.results.at(i);
    SCOPED_TRACE(a.policy);
    EXPECT_EQ(a.kept.sets, b.kept.sets);
    EXPECT_EQ(a.measures[Measure::layer_error].numbers, b.measures[Measure::layer_error].numbers);
    EXPECT_EQ(a.measures[Measure::head_error].numbers, b.measures[Measure::head_error].numbers);
    EXPECT_EQ(a.measures[Measure::attention_recall].numbers, b.measures[Measure::attention_recall].numbers);
    EXPECT_EQ(a.measures[Measure::spearman].numbers, b.measures[Measure::spearman].numbers);
  }
}

TEST(SlidingWindow, SharesAreOfWhatALayerHolds) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .layer_windows = {41, 0}};
  const TraceReplay replay = replayed(shape, make_request({"knorm", "recent", "tova"}, {"25%"}), 100).at(0);
  for (const ReplayResult& result : replay.results) {
    EXPECT_EQ(result.kept.mean_size(0), 10) << result.policy;
    EXPECT_EQ(result.kept.mean_size(1), 25) << result.policy;
    EXPECT_EQ(result.capacity, 25) << result.policy;
  }
}

TEST(SlidingWindow, OfTheHeldPositionsThoseWithTheBestScoresAreKept) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .sliding_window = 41};
  const TraceReplay replay = replayed(shape, make_request({"knorm"}, {"6"}), 100).at(0);
  const RandomTrace::Tensors tensors = shape.tensors();
  const auto length = [&](int layer, int head, int position) {
    const float* key = tensors.keys[static_cast<std::size_t>(layer)].data() +
                       (static_cast<std::ptrdiff_t>(head) * shape.num_tokens + position) * shape.head_dim;
    return std::inner_product(key, key + shape.head_dim, key, 0.0);
  };
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < 2; ++head) {
      std::vector<int> shortest = range(60, 100);
      std::ranges::sort(shortest, {}, [&](int position) { return length(layer, head, position); });
      shortest.resize(6);
      std::ranges::sort(shortest);
      EXPECT_EQ(replay.results.at(0).kept.sets[static_cast<std::size_t>(2 * layer + head)], shortest);
    }
  }
}

TEST(SlidingWindow, SinksThatAreGoneLeaveTheirRoomToRecentPositions) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .layer_windows = {41, 99}};
  const TraceReplay replay = replayed(shape, make_request({"streamingllm"}, {"16"}), 100).at(0);
  EXPECT_EQ(replay.results.at(0).kept.sets[0], range(84, 100));
  // Of the sinks 0 to 3 only 2 and 3 are held.
  std::vector<int> expected = {2, 3};
  std::ranges::copy(range(86, 100), std::back_inserter(expected));
  EXPECT_EQ(replay.results[0].kept.sets[2], expected);
}

TEST(SlidingWindow, AWindowOfOneHoldsNothing) {
  const RandomTrace shape{.layer_windows = {1, 0}};
  const TraceReplay replay = replayed(shape, make_request({"snapkv(window=4)", "full"}, {"9"}), 60).at(0);
  for (const ReplayResult& result : replay.results) {
    EXPECT_EQ(result.kept.mean_size(0), 0) << result.policy;
    EXPECT_THAT(of_layer(result.measures[Measure::layer_error], 0), Each(0.0f)) << result.policy;
  }
}

TEST(SlidingWindow, APyramidAndALadderAreDrawnOverLayersThatHoldAsMuch) {
  const RandomTrace mixed{
      .num_layers = 7, .prompt_length = 300, .num_tokens = 304, .layer_windows = {41, 0, 41, 0, 0, 41, 0}};
  const RandomTrace full{.num_layers = 4, .prompt_length = 300, .num_tokens = 304};
  const std::vector<std::string> specs = {"recent+pyramid", "lacache(span=2)"};
  const TraceReplay found = replayed(mixed, make_request(specs, {"60"}), 300).at(0);
  const TraceReplay expected = replayed(full, make_request(specs, {"60"}), 300).at(0);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const KeptSets& of_mixed = found.results.at(i).kept;
    const KeptSets& of_full = expected.results.at(i).kept;
    int place = 0;
    for (const int layer : {1, 3, 4, 6}) {
      EXPECT_EQ(of_mixed.of_query_head(layer, 0, 2), of_full.of_query_head(place++, 0, 2)) << specs[i] << layer;
    }
    for (const int layer : {0, 2, 5}) EXPECT_EQ(of_mixed.of_query_head(layer, 0, 2), range(260, 300)) << specs[i];
  }
}

TEST(SlidingWindow, AnAdaptiveBudgetDividesWhatTheHeadsHold) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .sliding_window = 41};
  const TraceReplay replay = replayed(shape, make_request({"snapkv(window=4)+adakv"}, {"20"}), 100).at(0);
  for (int layer = 0; layer < 2; ++layer) EXPECT_NEAR(replay.results.at(0).kept.mean_size(layer), 20, 1);
}

TEST(SlidingWindow, SpanRecallIsOfHeldPositions) {
  const RandomTrace shape{.prompt_length = 100,
                          .num_tokens = 110,
                          .layer_windows = {41, 0},
                          .spans = {{10, 20, "gone"}, {58, 62, "half"}, {90, 100, "held"}}};
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"recent"}, {"39"}));
  const ReplayResult& result = replays.at(0).results.at(0);
  for (int head = 0; head < 4; ++head) {
    const auto recall =
        of_layer(result.measures[Measure::span_recall], 0).subspan(static_cast<std::size_t>(3 * head), 3);
    EXPECT_TRUE(std::isnan(recall[0]));
    EXPECT_EQ(recall[1], 0.5f);  // of 60 and 61
    EXPECT_EQ(recall[2], 1.0f);
    EXPECT_THAT(of_layer(result.measures[Measure::span_recall], 1).subspan(static_cast<std::size_t>(3 * head), 3),
                ElementsAre(0.0f, 0.25f, 1.0f));
  }
  // What was not there to be kept is not a number in files either.
  write_results(folder / "r.h5", replays, {});
  const ResultsReader reader(folder / "r.h5");
  const Table stored = reader.read(0, Measure::span_recall);
  EXPECT_TRUE(std::isnan(stored.numbers.at(0)));
  EXPECT_THAT(reader.results().at(0).held, ElementsAre(40, 100));
  EXPECT_THAT(reader.results()[0].kept_per_layer, ElementsAre(39.0, 39.0));
  EXPECT_DOUBLE_EQ(reader.results()[0].kept_in({0, 1}).share, 78.0 / 140);
  EXPECT_DOUBLE_EQ(reader.results()[0].kept_in({1}).share, 0.39);
}

TEST(SlidingWindow, ResultsThatDoNotSayWhatWasHeldHeldEverything) {
  const TemporaryFolder folder;
  RandomTrace{}.write(folder / "t.h5");
  write_results(folder / "r.h5", replay(TraceReader(folder / "t.h5"), make_request({"recent"}, {"15"})), {});
  edit(folder / "r.h5", [](std::int64_t file) {
    remove(file, "/results/0/held");
    remove(file, "/results/0/kept_per_layer");
  });
  const ResultsReader reader(folder / "r.h5");
  EXPECT_THAT(reader.results().at(0).held, ElementsAre(60, 60));
  EXPECT_DOUBLE_EQ(reader.results()[0].kept_in({0}).share, 0.25);
}

TEST(SlidingWindow, RanksAreComparedWhereThereAreSome) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .layer_windows = {11, 0}};
  ReplayRequest asked = make_request({"snapkv(window=4)", "tova"}, {"20"});
  asked.rank_agreement = true;
  const TraceReplay replay = replayed(shape, asked, 100).at(0);
  for (const ReplayResult& result : replay.results) {
    for (const float number : of_layer(result.measures[Measure::spearman], 0))
      EXPECT_TRUE(std::isnan(number)) << result.policy;
    for (const float number : of_layer(result.measures[Measure::spearman], 1))
      EXPECT_TRUE(std::isfinite(number)) << result.policy;
  }
}

TEST(SlidingWindow, KeptSetsOfPositionsThatAreNotHeldAreReadWithoutThem) {
  const TemporaryFolder folder;
  RandomTrace all{.prompt_length = 100, .num_tokens = 110};
  all.write(folder / "all.h5");
  // As versions did that let a layer with a window keep what no query sees.
  write_kept_sets(folder / "kept.h5", replay(TraceReader(folder / "all.h5"), make_request({"streamingllm"}, {"30"})));
  RandomTrace some = all;
  some.layer_windows = {21, 0};
  some.write(folder / "some.h5");
  const std::string spec = fmt::format("kept(file=\"{}\")", (folder / "kept.h5").string());
  const TraceReplay found = replay(TraceReader(folder / "some.h5"), make_request({spec}, {"30"})).at(0);
  EXPECT_THAT(found.notes, Contains(HasSubstr("lists positions that layers with a sliding window no longer hold")));
  const ReplayResult& result = found.results.at(0);
  EXPECT_EQ(result.kept.sets.at(0), range(80, 100));
  EXPECT_EQ(result.kept.sets.at(2).kept().size(), 30u);
  EXPECT_THAT(of_layer(result.measures[Measure::layer_error], 0), Each(0.0f));
}

TEST(SlidingWindow, ACapacityBelowWhatALayerProtectsIsRefusedWithTheLayer) {
  try {
    replayed({.prompt_length = 200, .num_tokens = 210, .layer_windows = {21, 0}},
             make_request({"snapkv(window=16)"}, {"25%"}), 200);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("capacity 25% (5 of 20 positions that layer 0 holds) is below the 16"));
  }
}

TEST(SlidingWindow, IsTold) {
  const TraceReplay replay = replayed(windowed(), make_request({"recent"}, {"20", "70"}), 150).at(0);
  ASSERT_EQ(replay.notes.size(), 3u);
  EXPECT_EQ(replay.notes[0],
            "layers 0, 3 hold the last 20 positions of their sliding window alone; capacities and shares are of these, "
            "and at 20, 70 nothing is evicted there");
  EXPECT_THAT(replay.notes[1], HasSubstr("layer 1 holds the last 119 positions of its sliding window alone"));
  EXPECT_THAT(replay.notes[2], HasSubstr("layer 5 holds the last 89"));
}

TEST(SlidingWindow, OraclesChooseAmongHeldPositions) {
  const RandomTrace shape{.prompt_length = 100, .num_tokens = 110, .layer_windows = {41, 0}};
  const TraceReplay replay =
      replayed(shape, make_request({"oracle-reconstruction(exchanges=8)", "random", "recent"}, {"12"}), 100).at(0);
  const auto objective = [&](std::size_t result) {
    double sum = 0;
    for (const float error : of_layer(replay.results.at(result).measures[Measure::layer_error], 0)) {
      sum += static_cast<double>(error) * static_cast<double>(error);
    }
    return sum;
  };
  for (int set = 0; set < 2; ++set) {
    EXPECT_GE(replay.results.at(0).kept.sets[static_cast<std::size_t>(set)].kept().front(), 60);
    EXPECT_EQ(replay.results[0].kept.sets[static_cast<std::size_t>(set)].kept().size(), 12u);
  }
  EXPECT_LE(objective(0), objective(1));
  EXPECT_LE(objective(0), objective(2));
}

}  // namespace
}  // namespace kvreplay::test
