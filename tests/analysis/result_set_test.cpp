// Files of results as one set, and what must not be mixed.
#include "analysis/result_set.h"

#include <gmock/gmock.h>

#include "analysis/made_results.h"
#include "base/error.h"
#include "replay/results_file.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

double zero(int /*layer*/, int /*head*/, int /*query*/) { return 0; }
double by_layer(int layer, int /*head*/, int query) { return layer + 0.01 * query; }

class ResultSetTest : public testing::Test {
 protected:
  std::filesystem::path write(const std::string& name, const std::vector<TraceReplay>& replays) const {
    test::write_made(folder_ / name, replays);
    return folder_ / name;
  }
  static ResultSet open(const std::vector<std::filesystem::path>& files, const ResultFilter& filter = {}) {
    return ResultSet::open(files, filter);
  }
  static std::string error(const std::vector<std::filesystem::path>& files) {
    return test::message_of<Error>([&]() { open(files); });
  }
  static std::string usage_error(const std::vector<std::filesystem::path>& files, const ResultFilter& filter) {
    return test::message_of<UsageError>([&]() { open(files, filter); });
  }

  // Two traces, two settings of restkv and snapkv at two capacities, and full.
  std::filesystem::path write_grid(const std::string& name = "grid.h5") const {
    std::vector<TraceReplay> replays;
    for (const char* trace : {"out/a.h5", "b.h5"}) {
      TraceReplay& replay = replays.emplace_back(MadeReplay{.trace = trace}.replay());
      add_result(replay, "full", 0, zero);
      for (const char* policy : {"restkv", "restkv(alpha=0.5)", "snapkv"}) {
        for (const int capacity : {16, 32}) add_result(replay, policy, capacity, by_layer);
      }
    }
    return write(name, replays);
  }

  test::TemporaryFolder folder_;
};

TEST_F(ResultSetTest, WhatTwoFilesMeasuredOfAResultIsReadTogether) {
  // One of a replay, one of a live run that measured the model's loss alone and says nothing of spans.
  TraceReplay offline = MadeReplay{.spans = {{10, 20, "fact"}}}.replay();
  add_result(offline, "snapkv", 16, by_layer);
  TraceReplay live = offline;
  test::add_loss(live.results[0], [](int query) { return 3 * query; });
  test::remove_layers(live.results[0]);
  live.spans.clear();
  const auto a = write("offline.h5", {offline});
  const auto b = write("live.h5", {live});
  for (const ResultSet& set : {open({a, b}), open({b, a})}) {
    ASSERT_THAT(set.results(), SizeIs(1));
    EXPECT_TRUE(set.has(0, Measure::layer_error));
    EXPECT_TRUE(set.has(0, Measure::kl));
    EXPECT_FALSE(set.has(0, Measure::cosine));
    EXPECT_THAT(set.read(0, Measure::layer_error).numbers, SizeIs(16));
    EXPECT_EQ(set.read(0, Measure::kl).numbers[7], 21);
    EXPECT_THAT(set.results()[0].spans, SizeIs(1));
    EXPECT_THAT(set.notes(), ElementsAre(HasSubstr("counted once")));
  }
  // The same once more with another loss.
  live.results[0].measures[Measure::kl].numbers.assign(8, 1.0F);
  EXPECT_THAT(error({a, b, write("other.h5", {live})}), HasSubstr("is in both, with another KL divergence"));
}

TEST_F(ResultSetTest, HoldsTheResultsOfAllFilesInTheirOrder) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, by_layer);
  TraceReplay b = MadeReplay{.trace = "b.h5", .layers = 3, .queries = 5}.replay();
  add_result(b, "snapkv", 16, zero);
  add_result(b, "tova", 16, zero);
  const ResultSet set = open({write("1.h5", {a}), write("2.h5", {b})});
  ASSERT_THAT(set.results(), SizeIs(3));
  EXPECT_EQ(set.results()[1].trace, "b.h5");
  EXPECT_THAT(set.settings(), ElementsAre(SettingKey{"snapkv", "16"}, SettingKey{"tova", "16"}));
  EXPECT_THAT(set.of_setting({"snapkv", "16"}), ElementsAre(0u, 1u));
  EXPECT_THAT(set.of_setting({"tova", "99"}), IsEmpty());
  EXPECT_THAT(set.read(0, Measure::layer_error).numbers, testing::Contains(1.07f));
  EXPECT_THAT(set.read(0, Measure::head_error).numbers, IsEmpty());
  EXPECT_THAT(set.notes(), IsEmpty());
}

TEST_F(ResultSetTest, ChoosesWhatIsAskedFor) {
  const auto grid = write_grid();
  const auto settings = [&](const ResultFilter& filter) { return open({grid}, filter).settings().size(); };
  EXPECT_EQ(settings({}), 7u);
  EXPECT_EQ(settings({.policies = {"restkv"}}), 4u) << "all settings of the method, at two capacities";
  EXPECT_EQ(settings({.policies = {"restkv()"}}), 2u) << "the one with the defaults";
  EXPECT_EQ(settings({.policies = {"restkv( alpha=0.50 )"}}), 2u);
  EXPECT_EQ(settings({.capacities = {"16"}}), 4u) << "and what keeps everything";
  EXPECT_THAT(open({grid}, {.traces = {"a"}}).results(), SizeIs(7));
  EXPECT_THAT(open({grid}, {.traces = {"a.h5", "b"}}).results(), SizeIs(14));
  const ResultSet upper = open({grid}, {.policies = {"snapkv"}, .layers = {1}});
  EXPECT_THAT(upper.read(0, Measure::layer_error).shape, ElementsAre(1, 8));
  EXPECT_EQ(upper.read(0, Measure::layer_error).numbers.front(), 1.0f);
  EXPECT_THAT(upper.layers_of(upper.results()[0]), ElementsAre(1));
}

TEST_F(ResultSetTest, SaysWhatThereIsToChoose) {
  const auto grid = write_grid();
  EXPECT_THAT(usage_error({grid}, {.policies = {"tova"}}),
              AllOf(HasSubstr("no result is of policy tova"), HasSubstr("full, restkv, restkv(alpha=0.5), snapkv")));
  EXPECT_THAT(usage_error({grid}, {.capacities = {"64"}}), HasSubstr("There are all, 16, 32"));
  EXPECT_THAT(usage_error({grid}, {.traces = {"c"}}), HasSubstr("out/a.h5, b.h5"));
  EXPECT_THAT(usage_error({grid}, {.eviction_positions = {50}}), HasSubstr("There is 100"));
  EXPECT_THAT(usage_error({grid}, {.layers = {0, 7}}), HasSubstr("There are 0, 1"));
}

TEST_F(ResultSetTest, WhatIsThereButNotTogetherIsToldToo) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, zero);
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add_result(b, "tova", 16, zero);
  EXPECT_THAT(usage_error({write("x.h5", {a, b})}, {.policies = {"tova"}, .traces = {"a"}}), HasSubstr("not together"));
}

TEST_F(ResultSetTest, EqualResultsCountOnce) {
  const auto grid = write_grid();
  const auto again = write_grid("again.h5");
  const ResultSet set = open({grid, again});
  EXPECT_THAT(set.results(), SizeIs(14));
  EXPECT_THAT(set.notes(), ElementsAre(HasSubstr("14 results are in more than one file")));
  EXPECT_THAT(open({grid, grid}).notes(), ElementsAre(HasSubstr("is given more than once and read once")));
}

TEST_F(ResultSetTest, UnequalOnesAreRefused) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, zero);
  TraceReplay b = MadeReplay{}.replay();
  add_result(b, "snapkv", 16, by_layer);
  EXPECT_THAT(error({write("1.h5", {a}), write("2.h5", {b})}),
              AllOf(HasSubstr("1.h5"), HasSubstr("2.h5"), HasSubstr("another layer error")));
}

TEST_F(ResultSetTest, OneCaptureUnderTwoNamesIsOne) {
  TraceReplay a = MadeReplay{.trace = "out/a.h5", .digest = "same"}.replay();
  add_result(a, "snapkv", 16, zero);
  TraceReplay b = MadeReplay{.trace = "copy.h5", .digest = "same"}.replay();
  add_result(b, "tova", 16, zero);
  const ResultSet set = open({write("1.h5", {a}), write("2.h5", {b})});
  EXPECT_EQ(set.results()[1].trace, "out/a.h5");
  EXPECT_EQ(set.trace_called("copy.h5"), "out/a.h5");
  EXPECT_THAT(set.notes(), ElementsAre(HasSubstr("copy.h5 is the same capture as out/a.h5")));
}

TEST_F(ResultSetTest, WhatCannotBeComparedIsRefused) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, zero);
  const auto first = write("1.h5", {a});
  const auto second = [&](const MadeReplay& made, const std::string& policy) {
    TraceReplay replay = made.replay();
    add_result(replay, policy, 16, zero);
    return write("2.h5", {replay});
  };
  EXPECT_THAT(error({first, second({.digest = "another"}, "tova")}), HasSubstr("not the same capture"));
  EXPECT_THAT(error({first, second({.layers = 3}, "tova")}), HasSubstr("another number of layers or heads"));
  EXPECT_THAT(error({first, second({.spans = {{1, 4, "x"}}}, "tova")}), HasSubstr("other spans"));
  TraceReplay per_query = MadeReplay{.trace = "b.h5"}.replay();
  add_result(per_query, "snapkv", 16, zero).granularity = Granularity::query;
  EXPECT_THAT(error({first, write("2.h5", {per_query})}), HasSubstr("with heads query"));
}

// ---- Evaluation queries

class OtherQueries : public ResultSetTest {
 protected:
  // One trace, evicted at 60 and 100, each evaluated from there on, as older versions did.
  static std::vector<TraceReplay> evicted_twice(const std::vector<std::string>& policies) {
    std::vector<TraceReplay> replays;
    for (const int eviction : {60, 100}) {
      TraceReplay& replay = replays.emplace_back(MadeReplay{.eviction_position = eviction}.replay());
      for (const std::string& policy : policies) add_result(replay, policy, 16, by_layer);
    }
    return replays;
  }
  static std::vector<int> evictions_of(const ResultSet& set) {
    std::vector<int> evictions;
    for (const StoredResult& result : set.results()) evictions.push_back(result.eviction_position);
    return evictions;
  }
};

TEST_F(OtherQueries, AreNotAveragedTogether) {
  const ResultSet set = open({write("x.h5", evicted_twice({"snapkv", "tova"}))});
  EXPECT_THAT(set.results(), SizeIs(4)) << "stability is of all";
  const ResultSet comparable = set.comparable();
  EXPECT_THAT(evictions_of(comparable), testing::Each(100)) << "of equally many those without tokens for free";
  EXPECT_THAT(
      comparable.notes(),
      testing::Contains(AllOf(HasSubstr("a.h5: snapkv at 16 and 1 more result, evicted at 60, were evaluated on 8 "
                                        "queries from 60 on"),
                              HasSubstr("8 queries from 100 on"), HasSubstr("--evaluate-from 100"))));
  EXPECT_THAT(set.comparable_at_each_eviction().results(), SizeIs(4)) << "each on its own queries";
  EXPECT_THAT(set.comparable_at_each_eviction().notes(), IsEmpty());
}

TEST_F(OtherQueries, OfTheSameQueriesAllEvictionsCount) {
  std::vector<TraceReplay> replays;
  for (const int eviction : {60, 100}) {
    TraceReplay& replay =
        replays.emplace_back(MadeReplay{.eviction_position = eviction, .evaluate_from = 100}.replay());
    for (const char* policy : {"snapkv", "tova"}) add_result(replay, policy, 16, by_layer);
  }
  const ResultSet comparable = open({write("x.h5", replays)}).comparable();
  EXPECT_THAT(comparable.results(), SizeIs(4));
  EXPECT_THAT(comparable.notes(), IsEmpty());
}

TEST_F(OtherQueries, OfFilesThatWereEvaluatedDifferentlyTheLargerPartCounts) {
  TraceReplay from_60 = MadeReplay{.eviction_position = 60}.replay();
  add_result(from_60, "tova", 16, by_layer);
  TraceReplay from_100 = MadeReplay{.eviction_position = 60, .evaluate_from = 100}.replay();
  for (const char* policy : {"snapkv", "recent"}) add_result(from_100, policy, 16, by_layer);
  const ResultSet set = open({write("a-file.h5", {from_60}), write("another.h5", {from_100})});
  for (const ResultSet& comparable : {set.comparable(), set.comparable_at_each_eviction()}) {
    EXPECT_THAT(comparable.policies(), ElementsAre("snapkv", "recent"));
    EXPECT_THAT(comparable.notes(), testing::Contains(HasSubstr("tova at 16, evicted at 60, was evaluated on")));
  }
  EXPECT_THAT(test::message_of<Error>([&]() { set.comparable().policy_named("tova"); }),
              AllOf(HasSubstr("tova cannot be compared with the rest"), HasSubstr("--evaluate-from 100")));
}

TEST_F(OtherQueries, WhatOnlyMixingCouldAnswerIsRefused) {
  TraceReplay from_60 = MadeReplay{.eviction_position = 60}.replay();
  add_result(from_60, "tova", 16, by_layer);
  TraceReplay from_100 = MadeReplay{.eviction_position = 100}.replay();
  add_result(from_100, "snapkv", 16, by_layer);
  const std::vector<std::filesystem::path> two = {write("x.h5", {from_60, from_100})};
  EXPECT_THAT(test::message_of<Error>([&]() { open(two).comparable(); }),
              AllOf(HasSubstr("no two policies were evaluated on the same queries"), HasSubstr("--evaluate-from 100")));
  add_result(from_100, "recent", 16, by_layer);
  const std::vector<std::filesystem::path> three = {write("y.h5", {from_60, from_100})};
  EXPECT_THAT(open(three).comparable().policies(), ElementsAre("snapkv", "recent"));
  EXPECT_THAT(test::message_of<Error>([&]() {
                open(three, {.policies = {"tova", "snapkv", "recent"}}).comparable();
              }),
              HasSubstr("tova cannot be compared with the rest"));
}

// Files of version 2 do not say where there was nothing to choose.
TEST_F(ResultSetTest, OldFilesHaveNothingToChooseWhereTheirSpecsSaySo) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv(window=16)", "snapkv(window=8)", "recent", "of-a-plug-in(window=16)"}) {
    add_result(a, policy, 16, by_layer);
  }
  const std::filesystem::path file = write("x.h5", {a});
  const auto told = [&file]() {
    const ResultSet set = open({file});
    std::vector<bool> nothing;
    for (const StoredResult& result : set.results()) nothing.push_back(*result.nothing_to_choose);
    return nothing;
  };
  EXPECT_THAT(told(), testing::Each(false)) << "as the file says";
  test::edit(file, [](std::int64_t id) {
    for (const char* result : {"/results/0", "/results/1", "/results/2", "/results/3"}) {
      test::remove_attribute(id, result, "nothing_to_choose");
    }
  });
  EXPECT_THAT(told(), ElementsAre(true, false, false, false));
}

TEST_F(ResultSetTest, OtherFilesAreCalledWhatTheyAre) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, zero);
  write_kept_sets(folder_ / "kept.h5", {a});
  EXPECT_THAT(error({folder_ / "kept.h5"}), AllOf(HasSubstr("kept.h5"), HasSubstr("a file of kept sets")));
  test::RandomTrace{}.write(folder_ / "run.h5");
  EXPECT_THAT(error({folder_ / "run.h5"}), AllOf(HasSubstr("run.h5"), HasSubstr("a trace")));
  test::write_file(folder_ / "results.csv", "trace,policy\n");
  EXPECT_THAT(error({folder_ / "results.csv"}), HasSubstr("results.csv"));
  EXPECT_THAT(error({folder_ / "absent.h5"}), HasSubstr("absent.h5"));
  EXPECT_THAT(error({write("empty.h5", {MadeReplay{}.replay()})}), HasSubstr("holds no results"));
}

TEST_F(ResultSetTest, FindsPoliciesByWhatTheyAreCalled) {
  const ResultSet set = open({write_grid()});
  EXPECT_EQ(set.policy_named("snapkv"), "snapkv");
  EXPECT_EQ(set.policy_named("restkv"), "restkv") << "a spec of its own, though a method's name as well";
  EXPECT_EQ(set.policy_named("restkv(alpha=0.50)"), "restkv(alpha=0.5)");
  EXPECT_THAT(test::message_of<UsageError>([&]() { set.policy_named("snapk"); }),
              AllOf(HasSubstr("Did you mean 'snapkv'?"), HasSubstr("restkv(alpha=0.5)")));
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv(kernel=7)", 16, zero);
  add_result(a, "tova(last=true)", 16, zero);
  add_result(a, "snapkv(kernel=9)", 16, zero);
  const ResultSet few = open({write("few.h5", {a})});
  EXPECT_EQ(few.policy_named("tova"), "tova(last=true)");
  EXPECT_THAT(test::message_of<UsageError>([&]() { few.policy_named("snapkv"); }), HasSubstr("may be any of"));
}

TEST_F(ResultSetTest, PoliciesOfPlugInsNeedNoPlugIn) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "from-a-plug-in(strength=3)", 16, zero);
  add_result(a, "not even a spec (", 16, zero);
  const ResultSet set = open({write("x.h5", {a})});
  EXPECT_THAT(set.settings(), SizeIs(2));
  EXPECT_EQ(set.policy_named("from-a-plug-in"), "from-a-plug-in(strength=3)");
}

TEST_F(ResultSetTest, NotesOfSeveralTracesAreOne) {
  std::vector<TraceReplay> replays;
  for (const char* trace : {"a.h5", "b.h5", "c.h5"}) {
    add_result(replays.emplace_back(MadeReplay{.trace = trace, .notes = {"no projection"}}.replay()), "snapkv", 16,
               zero);
  }
  EXPECT_THAT(open({write("x.h5", replays)}).notes(), ElementsAre("a.h5 and 2 more traces: no projection"));
}

TEST_F(ResultSetTest, OverlapsAreOfWhatWasChosen) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "tova", "recent"}) add_result(a, policy, 16, zero);
  write_results(folder_ / "x.h5", {a}, overlaps(a));
  const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
  ASSERT_THAT(open(files).overlaps(), SizeIs(1));
  const std::vector<OverlapTable> two = open(files, {.policies = {"recent", "snapkv"}}).overlaps();
  ASSERT_THAT(two, SizeIs(1));
  EXPECT_THAT(two[0].policies, ElementsAre("snapkv", "recent"));
  EXPECT_THAT(two[0].jaccard.shape, ElementsAre(2, 2, 2, 4));
  EXPECT_THAT(two[0].jaccard.numbers, SizeIs(32));
  EXPECT_THAT(two[0].jaccard.numbers, testing::Each(1.0f)) << "all of them keep the same";
}

}  // namespace
}  // namespace kvreplay
