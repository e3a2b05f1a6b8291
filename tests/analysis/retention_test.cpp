// What kept sets say, on sets made by hand, and what does not belong together.
#include "analysis/retention.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "analysis/made_results.h"
#include "base/error.h"
#include "replay/overlap.h"
#include "replay/results_file.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::AllOf;
using testing::ElementsAre;
using testing::FloatEq;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

double zero(int /*layer*/, int /*head*/, int /*query*/) { return 0; }

std::vector<int> range(int first, int end) {
  std::vector<int> positions(static_cast<std::size_t>(end - first));
  std::iota(positions.begin(), positions.end(), first);
  return positions;
}

std::vector<int> joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// A result that keeps `sets`, one per KV head and layer, or per query head where there are as many.
ReplayResult& add_kept(TraceReplay& replay, const std::string& policy, std::vector<std::vector<int>> sets) {
  ReplayResult& result = add_result(replay, policy, static_cast<int>(sets.front().size()), zero);
  result.kept.sets_per_layer = static_cast<int>(sets.size()) / replay.model.num_layers;
  if (result.kept.sets_per_layer == replay.model.num_attention_heads) {
    result.granularity = result.kept.granularity = Granularity::query;
  }
  result.kept.sets.assign(sets.begin(), sets.end());
  return result;
}

class RetentionTest : public testing::Test {
 protected:
  std::filesystem::path at(const std::string& name) const { return folder_ / name; }

  ResultSet results(const std::vector<TraceReplay>& replays, const ResultFilter& filter = {},
                    const std::vector<OverlapTable>& overlaps = {}) const {
    write_results(at("results.h5"), replays, overlaps);
    return ResultSet::open(std::vector{at("results.h5")}, filter);
  }
  RetentionSet kept(const std::vector<TraceReplay>& replays, const ResultSet& of) const {
    write_kept_sets(at("kept.h5"), replays);
    return RetentionSet::open(std::vector{at("kept.h5")}, of);
  }
  // Why kept sets do not go with results.
  std::string refusal(const std::vector<TraceReplay>& sets, const std::vector<TraceReplay>& of) const {
    const ResultSet set = results(of);
    return test::message_of<Error>([&]() { kept(sets, set); });
  }

  test::TemporaryFolder folder_;
};

// ---- Tables of the results
// ---------------------------------------------------------------------------------------------

TEST_F(RetentionTest, OverlapsAreMeansOverTracesAndHeads) {
  std::vector<TraceReplay> replays;
  std::vector<OverlapTable> tables;
  for (const char* trace : {"a.h5", "b.h5"}) {
    TraceReplay& replay = replays.emplace_back(MadeReplay{.trace = trace}.replay());
    add_result(replay, "full", 0, zero);
    const bool first = replay.trace == "a.h5";
    // In layer 0 half of the sets are common, or none; in layer 1 all.
    add_kept(replay, "snapkv", {range(0, 10), range(0, 10), range(0, 10), range(0, 10)});
    add_kept(
        replay, "oracle-attention",
        {range(first ? 5 : 20, first ? 15 : 30), range(first ? 5 : 20, first ? 15 : 30), range(0, 10), range(0, 10)});
    std::ranges::move(overlaps(replay), std::back_inserter(tables));
  }
  const std::vector<PolicyOverlap> rows = policy_overlaps(results(replays, {}, tables));
  ASSERT_THAT(rows, SizeIs(3 * 3 * 3)) << "pairs, each over all layers and for two";
  const auto row = [&](const std::string& policy, const std::string& other, int layer) {
    const auto found = std::ranges::find_if(rows, [&](const PolicyOverlap& candidate) {
      return candidate.policy == policy && candidate.other == other && candidate.layer == layer;
    });
    EXPECT_NE(found, rows.end());
    EXPECT_EQ(found->capacity_request, "10");
    return *found;
  };
  EXPECT_NEAR(row("snapkv", "oracle-attention", 0).jaccard, (5.0 / 15 + 0) / 2, 1e-7);
  EXPECT_NEAR(row("oracle-attention", "snapkv", 0).containment, (0.5 + 0) / 2, 1e-7);
  EXPECT_NEAR(row("snapkv", "oracle-attention", 1).jaccard, 1, 1e-7);
  EXPECT_NEAR(row("snapkv", "oracle-attention", -1).jaccard, (5.0 / 15 + 0 + 2) / 4, 1e-7);
  EXPECT_NEAR(row("snapkv", "snapkv", -1).jaccard, 1, 1e-7);
  EXPECT_NEAR(row("snapkv", "full", 1).jaccard, 0.1, 1e-7);
  EXPECT_NEAR(row("full", "snapkv", 1).containment, 1, 1e-7);

  const std::vector<PolicyOverlap> upper =
      policy_overlaps(results(replays, {.policies = {"snapkv", "oracle-attention"}, .layers = {1}}, tables));
  ASSERT_THAT(upper, SizeIs(4 * 2)) << "over the chosen layer, and of it";
  for (const PolicyOverlap& chosen : upper) EXPECT_NEAR(chosen.jaccard, 1, 1e-7);
  EXPECT_THAT(policy_overlaps(results(replays)), IsEmpty()) << "a sweep's results hold none";
}

TEST_F(RetentionTest, EveryTraceWeighsTheSameWhateverItsNumberOfEvictions) {
  std::vector<TraceReplay> replays;
  std::vector<OverlapTable> tables;
  const std::vector<std::vector<int>> same(4, range(0, 10));
  const std::vector<std::vector<int>> other(4, range(20, 30));
  for (const auto& [trace, eviction] : {std::pair{"a.h5", 100}, {"b.h5", 80}, {"b.h5", 90}, {"b.h5", 100}}) {
    TraceReplay& replay = replays.emplace_back(
        MadeReplay{.trace = trace, .eviction_position = eviction, .spans = {{1, 4, "x"}, {5, 8, "y"}}}.replay());
    const bool first = replay.trace == "a.h5";
    add_kept(replay, "snapkv", same);
    add_kept(replay, "tova", first ? same : other);
    std::ranges::move(overlaps(replay), std::back_inserter(tables));
    for (ReplayResult& result : replay.results) {
      const float recall = first ? 1.0f : 0.25f;
      result.measures[Measure::span_recall] = {{2, 4, 2}, std::vector<float>(16, recall)};
      result.measures[Measure::spearman] = {{2, 4}, std::vector<float>(8, recall)};
      result.measures[Measure::kendall] = result.measures[Measure::spearman];
    }
  }
  const ResultSet set = results(replays, {}, tables);
  for (const PolicyOverlap& row : policy_overlaps(set)) {
    EXPECT_NEAR(row.jaccard, row.policy == row.other ? 1 : 0.5, 1e-7) << "a is 1, b is 0 three times";
  }
  for (const RankAgreement& row : rank_agreements(set)) EXPECT_NEAR(row.spearman, (1 + 0.25) / 2, 1e-7);
  double sum = 0;
  double weight = 0;
  for (const SpanRecall& row : span_recalls(set)) {
    if (row.policy != "snapkv" || row.layer >= 0) continue;
    sum += row.weight * row.recall;
    weight += row.weight;
  }
  EXPECT_NEAR(weight, 2, 1e-12) << "one per trace";
  EXPECT_NEAR(sum / weight, (1 + 0.25) / 2, 1e-7);
}

TEST_F(RetentionTest, SpanRecallIsPerSpanWithItsDepth) {
  MadeReplay made{.spans = {{10, 14, "needle"}, {95, 120, "end"}}};
  TraceReplay replay = made.replay();
  ReplayResult& result = add_result(replay, "snapkv", 16, zero);
  // [layer, head, span]
  result.measures[Measure::span_recall] = {{2, 4, 2},
                                           {0, 1, 0.5f, 1, 0.5f, 1, 1, 1, 0.25f, 0, 0.25f, 0, 0.25f, 0, 0.25f, 0}};
  const std::vector<SpanRecall> rows = span_recalls(results({replay}));
  ASSERT_THAT(rows, SizeIs(2 * 3));
  EXPECT_EQ(rows[0].label, "needle");
  EXPECT_EQ(rows[0].policy, "snapkv");
  EXPECT_EQ(rows[0].depth, 0.1);
  EXPECT_EQ(rows[0].layer, -1);
  EXPECT_NEAR(rows[0].recall, (0.5 + 0.25) / 2, 1e-7);
  EXPECT_EQ(rows[1].layer, 0);
  EXPECT_NEAR(rows[1].recall, 0.5, 1e-7);
  EXPECT_NEAR(rows[2].recall, 0.25, 1e-7);
  EXPECT_EQ(rows[3].label, "end");
  EXPECT_EQ(rows[3].depth, 0.95);
  EXPECT_NEAR(rows[3].recall, 0.5, 1e-7);
}

TEST_F(RetentionTest, RankAgreementIsAMeanOverHeadsThenTraces) {
  std::vector<TraceReplay> replays;
  for (const char* trace : {"a.h5", "b.h5"}) {
    TraceReplay& replay = replays.emplace_back(MadeReplay{.trace = trace}.replay());
    add_result(replay, "recent", 16, zero);
    ReplayResult& result = add_result(replay, "snapkv", 16, zero);
    const float more = replay.trace == "a.h5" ? 0.0f : 0.2f;
    result.measures[Measure::spearman] = {{2, 4},
                                          {0.1f + more, 0.2f + more, 0.3f + more, 0.4f + more, 0.5f, 0.5f, 0.5f, 0.5f}};
    result.measures[Measure::kendall] = {{2, 4}, {-1, 1, 0, 0, 0.5f, 0.25f, 0.5f, 0.25f}};
  }
  const std::vector<RankAgreement> rows = rank_agreements(results(replays));
  ASSERT_THAT(rows, SizeIs(3)) << "none where there are no ranks";
  EXPECT_EQ(rows[0].policy, "snapkv");
  EXPECT_EQ(rows[0].layer, -1);
  EXPECT_NEAR(rows[0].spearman, (0.35 + 0.5) / 2, 1e-7);
  EXPECT_NEAR(rows[1].spearman, 0.35, 1e-7);
  EXPECT_NEAR(rows[1].kendall, 0, 1e-7);
  EXPECT_NEAR(rows[2].kendall, 0.375, 1e-7);
  EXPECT_THAT(rank_agreements(results(replays, {.layers = {1}})), SizeIs(2));
}

// ---- Files of kept sets
// ------------------------------------------------------------------------------------------------

TEST_F(RetentionTest, SetsComeBackAsTheyWereKept) {
  TraceReplay replay = MadeReplay{}.replay();
  add_kept(replay, "snapkv", {range(0, 3), range(1, 4), range(2, 5), {7, 50, 99}});
  add_kept(replay, "tova", {{1, 2}, {1, 3}, {1, 4}, {1, 5}, {2, 3}, {2, 4}, {2, 5}, {2, 6}});
  const ResultSet of = results({replay});
  const RetentionSet set = kept({replay}, of);
  ASSERT_THAT(set.entries(), SizeIs(2));
  EXPECT_FALSE(set.empty());
  EXPECT_THAT(set.notes(), IsEmpty());
  EXPECT_EQ(set.read(set.entries()[0], of).sets, replay.results[0].kept.sets);
  EXPECT_EQ(set.read(set.entries()[1], of).of_query_head(1, 3, 2), (std::vector<int>{2, 6}));
}

TEST_F(RetentionTest, WhatWasNotChosenIsLeftOutAndTold) {
  TraceReplay replay = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "tova", "recent"}) {
    add_kept(replay, policy, {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  }
  const ResultSet of = results({replay}, {.policies = {"tova"}});
  const RetentionSet set = kept({replay}, of);
  EXPECT_THAT(set.entries(), SizeIs(1));
  EXPECT_THAT(set.notes(), ElementsAre(HasSubstr("kept.h5: 2 of 3 kept sets are of no result that was chosen")));
}

TEST_F(RetentionTest, TheSameSetsTwiceCountOnce) {
  TraceReplay replay = MadeReplay{}.replay();
  add_kept(replay, "snapkv", {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  const ResultSet of = results({replay});
  write_kept_sets(at("one.h5"), {replay});
  write_kept_sets(at("same.h5"), {replay});
  replay.results[0].kept.sets[2] = std::vector{0, 1, 3};
  write_kept_sets(at("other.h5"), {replay});
  const RetentionSet twice = RetentionSet::open(std::vector{at("one.h5"), at("same.h5")}, of);
  EXPECT_THAT(twice.entries(), SizeIs(1));
  EXPECT_THAT(twice.notes(), ElementsAre(AllOf(HasSubstr("same.h5: 1 kept sets stand in an earlier file"))));
  EXPECT_THAT(test::message_of<Error>([&]() {
                RetentionSet::open(std::vector{at("one.h5"), at("other.h5")}, of);
              }),
              AllOf(HasSubstr("other.h5: the sets of snapkv at 3, a.h5 evicted at 100 differ from those in"),
                    HasSubstr("one.h5")));
}

TEST_F(RetentionTest, ATraceGoesByTheNameOfTheResults) {
  TraceReplay first = MadeReplay{.trace = "a.h5", .digest = "d"}.replay();
  add_kept(first, "snapkv", {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  TraceReplay again = MadeReplay{.trace = "copy/a.h5", .digest = "d"}.replay();
  add_kept(again, "tova", {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  const ResultSet of = results({first, again});
  EXPECT_THAT(kept({again}, of).entries(), SizeIs(1));
}

TEST_F(RetentionTest, SetsOfOtherResultsAreRefused) {
  const std::vector<std::vector<int>> four = {range(0, 3), range(0, 3), range(0, 3), range(0, 3)};
  const std::vector<std::vector<int>> six(6, range(0, 3));
  const std::vector<std::vector<int>> eight(8, range(0, 3));
  const auto replay_of = [](const MadeReplay& made, const std::string& policy,
                            const std::vector<std::vector<int>>& sets) {
    TraceReplay replay = made.replay();
    add_kept(replay, policy, sets);
    return std::vector{replay};
  };
  const std::vector<TraceReplay> here = replay_of({}, "snapkv", four);
  EXPECT_EQ(refusal(here, here), "");
  EXPECT_THAT(refusal(replay_of({}, "tova", four), here),
              AllOf(HasSubstr("kept.h5: none of its 1 kept sets is of one of the results"),
                    HasSubstr("it begins with tova at 3, a.h5 evicted at 100")));
  EXPECT_THAT(refusal(replay_of({.trace = "b.h5"}, "snapkv", four), here), HasSubstr("none of its 1 kept sets"));
  EXPECT_THAT(refusal(replay_of({.eviction_position = 90}, "snapkv", four), here),
              HasSubstr("it begins with snapkv at 3, a.h5 evicted at 90"));
  ResultStream empty(at("empty.h5"), "kvreplay-kept");
  empty.file().create_group("/kept");
  empty.finish();
  const ResultSet of = results(here);
  EXPECT_THAT(test::message_of<Error>([&]() { RetentionSet::open(std::vector{at("empty.h5")}, of); }),
              HasSubstr("empty.h5: holds no kept sets; give the kept sets of the replay whose results these are"));
  EXPECT_THAT(refusal(replay_of({.layers = 3}, "snapkv", six), here),
              HasSubstr("are 6, and its result has 2 layers of 2 heads; give the files of one replay"));
  EXPECT_THAT(refusal(replay_of({}, "snapkv", eight), here),
              HasSubstr("are per query head, and those of its result per KV head"));
  EXPECT_THAT(refusal(here, replay_of({}, "snapkv", eight)),
              HasSubstr("are per KV head, and those of its result per query head"));
}

TEST_F(RetentionTest, AsManyPositionsMustBeKeptAsTheResultSays) {
  TraceReplay replay = MadeReplay{}.replay();
  add_kept(replay, "snapkv", {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  const ResultSet of = results({replay});
  replay.results[0].kept.sets[1] = range(0, 5);
  const RetentionSet set = kept({replay}, of);
  EXPECT_THAT(test::message_of<Error>([&]() { set.read(set.entries()[0], of); }),
              HasSubstr("/kept/0: 3.5 positions are kept on average, and its result says 3"));
}

TEST_F(RetentionTest, FilesOfOtherKindsAreRefused) {
  TraceReplay replay = MadeReplay{}.replay();
  add_kept(replay, "snapkv", {range(0, 3), range(0, 3), range(0, 3), range(0, 3)});
  const ResultSet of = results({replay});
  EXPECT_THAT(test::message_of<Error>([&]() { RetentionSet::open(std::vector{at("results.h5")}, of); }),
              HasSubstr("is not a file of kept sets"));
  EXPECT_THAT(test::message_of<Error>([&]() { RetentionSet::open(std::vector{at("nowhere.h5")}, of); }),
              HasSubstr("nowhere.h5"));
}

// ---- What they say
// ---------------------------------------------------------------------------------------------------

TEST_F(RetentionTest, HeadsAreComparedWithinGroupsAndBetweenThem) {
  TraceReplay replay = MadeReplay{}.replay();
  // Query heads 0 and 1 share KV head 0, 2 and 3 share KV head 1; in layer 1 all keep the same.
  std::vector<std::vector<int>> sets = {range(0, 10), range(5, 15), range(20, 30), range(20, 30)};
  sets.resize(8, range(0, 10));
  add_kept(replay, "snapkv", sets);
  add_kept(replay, "tova", {range(0, 9), range(3, 12), range(0, 9), range(9, 18)});
  add_kept(replay, "h2o", {range(0, 8), range(0, 8), range(0, 8), range(0, 8)}).granularity = Granularity::layer;
  add_result(replay, "full", 0, zero);
  const ResultSet of = results({replay});
  const std::vector<HeadOverlap> rows = head_overlaps(of, kept({replay}, of), of);
  std::vector<std::string> found;
  for (const HeadOverlap& row : rows) {
    found.push_back(
        fmt::format("{} {} {} {:.6f}", row.policy, row.layer, row.within_group ? "within" : "between", row.jaccard));
  }
  EXPECT_THAT(found, ElementsAre(fmt::format("snapkv -1 within {:.6f}", ((5.0 / 15 + 1) / 2 + 1) / 2),
                                 fmt::format("snapkv 0 within {:.6f}", (5.0 / 15 + 1) / 2), "snapkv 1 within 1.000000",
                                 "snapkv -1 between 0.500000", "snapkv 0 between 0.000000", "snapkv 1 between 1.000000",
                                 "tova -1 between 0.250000", "tova 0 between 0.500000", "tova 1 between 0.000000"));
}

TEST_F(RetentionTest, StabilityComparesWhatIsLeftOfTheSamePositions) {
  std::vector<TraceReplay> replays;
  // At 60, 80 and 90 of 100: half of the 10 positions are given up, and later half of those come back.
  const std::vector<std::vector<int>> kept_at = {range(0, 10), joined(range(0, 5), range(70, 75)),
                                                 joined(joined(range(0, 3), range(5, 8)), range(75, 79))};
  const int evictions[] = {60, 80, 90};
  for (std::size_t i = 0; i < 3; ++i) {
    TraceReplay& replay = replays.emplace_back(MadeReplay{.eviction_position = evictions[i]}.replay());
    add_kept(replay, "snapkv", std::vector<std::vector<int>>(4, kept_at[i]));
    add_result(replay, "full", 0, zero);
  }
  std::ranges::reverse(replays);  // the order of the files does not matter
  const ResultSet of = results(replays);
  const std::vector<Stability> rows = stabilities(of, kept(replays, of));
  ASSERT_THAT(rows, SizeIs(9)) << "60 → 80, 60 → 90 and 80 → 90, over all layers and for two";
  const auto expect = [&](std::size_t first, int from, int to, double jaccard, double returned) {
    for (std::size_t i = first; i < first + 3; ++i) {
      EXPECT_EQ(rows[i].trace, "a.h5");
      EXPECT_EQ(rows[i].layer, static_cast<int>(i - first) - 1);
      EXPECT_EQ(rows[i].from, from);
      EXPECT_EQ(rows[i].to, to);
      EXPECT_DOUBLE_EQ(rows[i].jaccard, jaccard);
      EXPECT_DOUBLE_EQ(rows[i].returned, returned);
    }
  };
  expect(0, 60, 80, 5.0 / 10, 0);         // {0…4} of {0…9}
  expect(3, 60, 90, 6.0 / 10, 0);         // {0, 1, 2, 5, 6, 7} of {0…9}
  expect(6, 80, 90, 3.0 / 17, 7.0 / 10);  // {0, 1, 2} in both; 5, 6, 7 and 75…78 were gone
}

TEST_F(RetentionTest, RastersHoldTheShareOfEachBin) {
  TraceReplay replay = MadeReplay{}.replay();
  add_kept(replay, "snapkv", {range(0, 20), range(0, 20), range(80, 100), joined(range(0, 10), range(90, 100))});
  const ResultSet of = results({replay});
  const RetentionSet set = kept({replay}, of);
  const std::vector<KeptRaster> rows = kept_rasters(of, set, 3, true);
  ASSERT_THAT(rows, SizeIs(3));
  EXPECT_EQ(RasterBins::of(100, 3).width, 34);
  EXPECT_EQ(rows[0].layer, -1);
  EXPECT_THAT(rows[0].share, ElementsAre(FloatEq(50.0f / (34 * 4)), 0.0f, FloatEq(30.0f / (32 * 4))));
  EXPECT_THAT(rows[1].share, ElementsAre(FloatEq(40.0f / (34 * 2)), 0.0f, 0.0f));
  EXPECT_THAT(rows[2].share, ElementsAre(FloatEq(10.0f / (34 * 2)), 0.0f, FloatEq(30.0f / (32 * 2))));
  EXPECT_THAT(kept_rasters(of, set, 1000, false), SizeIs(1));
  const std::vector<float>& fine = kept_rasters(of, set, 1000, false)[0].share;
  ASSERT_THAT(fine, SizeIs(100));
  EXPECT_EQ(fine[5], 0.75f);
  EXPECT_EQ(fine[85], 0.25f);
}

TEST_F(RetentionTest, WhatIsEvictedLaterCountsForTheQueriesThatSawIt) {
  TraceReplay replay = MadeReplay{.layers = 1}.replay();
  add_kept(replay, "snapkv", {range(0, 20), range(0, 10)});
  // Half of what the first head keeps is gone for the last four of the eight queries.
  std::vector<int> until(20, Residency::kNever);
  std::fill(until.begin() + 10, until.end(), replay.evaluation_positions[3]);
  replay.results[0].kept.sets[0] = Residency(range(0, 20), until, replay.eviction_position);
  const ResultSet of = results({replay});
  const RetentionSet set = kept({replay}, of);
  const std::vector<float> share = kept_rasters(of, set, 1000, false).at(0).share;
  EXPECT_EQ(share[5], 1.0f);
  EXPECT_EQ(share[15], 0.25f);
  EXPECT_EQ(share[25], 0.0f);
  const std::vector<HeadOverlap> rows = head_overlaps(of, set, of);
  EXPECT_THAT(rows, Not(IsEmpty()));
  // What came before a query is in both caches.
  const double first_four = 10.0 / 20 + 11.0 / 21 + 12.0 / 22 + 13.0 / 23;
  for (const HeadOverlap& row : rows) EXPECT_NEAR(row.jaccard, (first_four + 4) / 8, 1e-6);
}

TEST(RasterBinsTest, CoverThePositionsWithNoMoreBinsThanAsked) {
  for (const int positions : {1, 2, 99, 100, 101, 131072}) {
    for (const int most : {1, 2, 7, 100, 512}) {
      const RasterBins bins = RasterBins::of(positions, most);
      EXPECT_LE(bins.count(), most);
      EXPECT_GE(bins.count() * bins.width, positions);
      EXPECT_LT((bins.count() - 1) * bins.width, positions);
    }
  }
}

// ---- From a replay
// --------------------------------------------------------------------------------------------------

TEST_F(RetentionTest, AReplaysFilesGoTogether) {
  test::RandomTrace{.spans = {{4, 9, "needle"}}}.write(at("t.h5"));
  ReplayRequest request =
      make_request({"full", "recent", "snapkv(window=4)", "oracle-attention"}, {"12", "50%"}, Granularity::query);
  request.eviction_positions = {40, 60};
  request.rank_agreement = true;
  const std::vector<TraceReplay> replays = replay(TraceReader(at("t.h5")), request);
  std::vector<OverlapTable> tables;
  for (const TraceReplay& replay : replays) std::ranges::move(overlaps(replay), std::back_inserter(tables));
  const ResultSet of = results(replays, {}, tables);
  const RetentionSet set = kept(replays, of);
  EXPECT_THAT(set.entries(), SizeIs(of.results().size()));
  EXPECT_THAT(policy_overlaps(of), SizeIs(2 * 16 * 3));
  EXPECT_THAT(span_recalls(of), SizeIs(of.results().size() * 3));
  EXPECT_THAT(head_overlaps(of, set, of), SizeIs(6 * 2 * 3));
  EXPECT_THAT(kept_rasters(of, set, 10, false), SizeIs(of.results().size()));
  for (const RankAgreement& row : rank_agreements(of)) {
    if (row.policy == "oracle-attention") {
      EXPECT_EQ(row.spearman, 1);
      EXPECT_EQ(row.kendall, 1);
    } else {
      EXPECT_EQ(row.policy, "snapkv(window=4)");
      EXPECT_LT(row.spearman, 1);
    }
  }
  // What slides over the prompt keeps nothing of its own once it has passed.
  for (const Stability& row : stabilities(of, set)) {
    if (row.policy != "recent") continue;
    const int later = row.capacity_request == "12" ? 0 : 10;  // of 30 positions before 60, those before 40
    EXPECT_DOUBLE_EQ(row.jaccard, later / 20.0 * (row.capacity_request == "12" ? 0 : 1));
    EXPECT_EQ(row.returned, 0);
  }
}

}  // namespace
}  // namespace kvreplay
