// What cannot be replayed is left out and told, and so is what leaves a policy nothing to choose.
#include "replay/left_out.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <map>

#include "base/error.h"
#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::Eq;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

class Replays : public testing::Test {
 protected:
  // A trace that is written for the occasion.
  const TraceReader& trace(const RandomTrace& shape = {}) {
    const std::filesystem::path file = folder_ / fmt::format("t{}.h5", traces_.size());
    shape.write(file);
    traces_.emplace_back(file);
    return traces_.back();
  }

  std::vector<std::string> settings_of(const TraceReplay& replay) const {
    std::vector<std::string> settings;
    for (const ReplayResult& result : replay.results) {
      settings.push_back(fmt::format("{} at {}", result.policy, result.capacity_request));
    }
    return settings;
  }

  TemporaryFolder folder_;
  std::vector<TraceReader> traces_;
};

TEST(SettingNames, NamesAFewAndCountsTheRest) {
  SettingNames names;
  EXPECT_EQ(names.count(), 0);
  names.add("snapkv", "16");
  names.add("snapkv", "25%");
  names.add("h2o", "");
  EXPECT_EQ(names.text(), "snapkv at 16, 25%; h2o");
  for (int seed = 0; seed < 3; ++seed) names.add(fmt::format("random(seed={})", seed), "8");
  EXPECT_EQ(names.text(), "snapkv at 16, 25%; h2o; random(seed=0) at 8; random(seed=1) at 8 and 1 more policy");
  EXPECT_EQ(names.count(), 6);
}

TEST_F(Replays, AnImpossibleCellDoesNotEndTheOthers) {
  trace();
  ReplayRequest asked =
      make_request({"snapkv(window=8)", "snapkv(window=16)", "h2o(window=24)", "recent"}, {"8", "20"});
  const ReplayEngine engine(traces_, asked);
  EXPECT_THAT(settings_of(engine.outlines().at(0)),
              ElementsAre("snapkv(window=8) at 8", "snapkv(window=8) at 20", "snapkv(window=16) at 20", "recent at 8",
                          "recent at 20"));
  EXPECT_THAT(engine.outlines()[0].notes,
              Contains("left out: snapkv(window=16) at 8; h2o(window=24) at 8, 20: the capacity is below the positions "
                       "that they always keep; ask for a larger capacity or protect fewer"));
  EXPECT_THAT(engine.left_out(), IsEmpty());
  const std::vector<TraceReplay> replays = replay(engine);
  ASSERT_THAT(replays.at(0).results, SizeIs(5));
  const auto alone = replay(traces_[0], make_request({"snapkv(window=16)"}, {"20"}));
  EXPECT_EQ(replays[0].results[2].kept.sets, alone.at(0).results.at(0).kept.sets);
  EXPECT_EQ(replays[0].results[2].measures[Measure::layer_error].numbers,
            alone[0].results[0].measures[Measure::layer_error].numbers);

  asked.strict = true;
  EXPECT_THAT(message_of<Error>([&]() { ReplayEngine(traces_, asked); }),
              HasSubstr("t0.h5: capacity 8 is below the 16 positions that snapkv(window=16) always keeps; ask for a"));
}

TEST_F(Replays, OneRuleForWhatIsProtected) {
  trace({.num_layers = 8});
  for (const std::string method : {"streamingllm(sinks=4)", "lagkv(sinks=4,lag=8)", "lacache(sinks=4,span=8)",
                                   "snapkv(window=4)", "snapkv(window=4)+pyramid",
                                   "streamingllm@kvcache-factory(window=4)", "criticalkv(base=lagkv(sinks=4,lag=8))"}) {
    SCOPED_TRACE(method);
    EXPECT_THAT(message_of<Error>([&]() { ReplayEngine(traces_, make_request({method}, {"3"})); }),
                AllOf(HasSubstr("capacity 3 is below the 4 positions that "), HasSubstr(" always keeps")));
    const auto replays = replay(traces_[0], make_request({method}, {"4"}));
    EXPECT_TRUE(replays.at(0).results.at(0).nothing_to_choose);
    for (const Residency& set : replays[0].results[0].kept.sets) EXPECT_THAT(set.kept(), SizeIs(4));
  }
  EXPECT_THAT(
      message_of<Error>([&]() { ReplayEngine(traces_, make_request({"lacache"}, {"12"})); }),
      HasSubstr("capacity 12 is below the 13 positions that lacache needs at least; ask for a larger capacity"));
  replay(traces_[0], make_request({"lacache"}, {"13"}));
}

TEST_F(Replays, WhatATraceLacksIsLeftOutThere) {
  trace();
  trace({.captured_prompt_queries = 8, .attention_mass = false});
  const ReplayEngine engine(
      traces_, make_request({"snapkv(window=8)", "snapkv(window=16)", "restkv(window=24)", "h2o", "recent"}, {"40"}));
  ASSERT_THAT(engine.outlines(), SizeIs(2));
  EXPECT_THAT(engine.outlines()[0].results, SizeIs(5));
  EXPECT_THAT(engine.outlines()[0].notes, IsEmpty());
  EXPECT_THAT(settings_of(engine.outlines()[1]), ElementsAre("snapkv(window=8) at 40", "recent at 40"));
  EXPECT_THAT(engine.outlines()[1].notes,
              ElementsAre("left out: snapkv(window=16); restkv(window=24): they need more queries before position 60 "
                          "than the last 8 that the trace holds; capture with --queries window:24 or all, or choose a "
                          "smaller window",
                          AllOf(HasSubstr("left out: h2o needs the recorded attention mass of the whole prompt, or "
                                          "all 60 queries"),
                                HasSubstr("--queries all"), HasSubstr("attention_mass=True"))));
  // What keeps everything needs nothing.
  const ReplayEngine whole({&traces_[1], 1}, make_request({"h2o"}, {"40", "100%"}));
  EXPECT_THAT(settings_of(whole.outlines().at(0)), ElementsAre("h2o at 100%"));
}

TEST_F(Replays, WhatCannotBeEvictedOrEvaluatedIsLeftOut) {
  trace();
  trace({.prompt_length = 40, .num_tokens = 50});
  trace({.prompt_length = 40, .num_tokens = 40});
  ReplayRequest asked = make_request({"recent"}, {"8"});
  asked.eviction_positions = {30, 55};
  const ReplayEngine engine(traces_, asked);
  std::vector<std::pair<int, int>> places;
  for (const TraceReplay& outline : engine.outlines()) {
    places.emplace_back(outline.eviction_position, outline.evaluate_from);
  }
  EXPECT_THAT(places, ElementsAre(std::pair(30, 55), std::pair(55, 55), std::pair(30, 30), std::pair(30, 30)))
      << "evaluated from the last eviction that there is";
  ASSERT_THAT(engine.left_out(), SizeIs(2));
  EXPECT_EQ(engine.left_out()[0].trace, (folder_ / "t1.h5").string());
  EXPECT_EQ(engine.left_out()[0].note, "left out: eviction position 55 is outside the trace's 50 tokens");

  asked.eviction_positions = {};
  const ReplayEngine at_end(traces_, asked);
  EXPECT_THAT(at_end.outlines(), SizeIs(2));
  ASSERT_THAT(at_end.left_out(), SizeIs(1));
  EXPECT_THAT(at_end.left_out()[0].note, HasSubstr("left out: no query at or after position 40 was captured"));
  asked.evaluate_from = 60;
  EXPECT_THAT(ReplayEngine(traces_, asked).outlines(), SizeIs(1));
  asked.evaluate_from = 70;
  EXPECT_THAT(message_of<Error>([&]() { ReplayEngine(traces_, asked); }),
              AllOf(HasSubstr("t0.h5: no query at or after position 70"), HasSubstr("--evaluate-from")));
}

TEST_F(Replays, NothingToChooseIsTold) {
  const int unscored = 12;  // lagkv(sinks=2,lag=8) on 60 positions: 2 sinks, and 10 that no chunk follows
  const std::pair<const char*, std::map<std::string, bool>> cases[] = {
      {"snapkv(window=8)", {{"8", true}, {"9", false}, {"12", false}, {"60", false}}},
      {"h2o(window=0)", {{"1", false}}},
      {"lagkv(sinks=2,lag=8)", {{"8", true}, {"12", true}, {"13", false}}},
      {"lagkv(sinks=2,lag=32)", {{"12", true}, {"59", true}}},
      {"criticalkv(base=lagkv(sinks=2,lag=8))", {{"2", true}, {"8", false}}},
      {"criticalkv(base=lagkv(sinks=2,lag=8),first=1)", {{"8", true}, {"13", false}}},
      {"snapkv(window=8)+pyramid", {{"8", true}, {"9", false}}},
      {"snapkv(window=8)+adakv", {{"8", true}, {"9", false}}},
      {"lagkv(sinks=2,lag=8)+pyramid", {{"2", true}, {"12", false}}},
      {"lagkv(sinks=2,lag=8)+adakv", {{"2", true}, {"8", false}}},
      {"streamingllm(sinks=8)", {{"8", true}, {"9", false}}},
      {"recent", {{"1", false}, {"8", false}}},
      {"full", {{"8", false}}},
      {"oracle-reconstruction", {{"1", false}}},
  };
  trace();
  for (const auto& [policy, expected] : cases) {
    for (const auto& [capacity, nothing] : expected) {
      SCOPED_TRACE(fmt::format("{} at {}", policy, capacity));
      const TraceReplay found = replay(traces_[0], make_request({policy}, {capacity})).at(0);
      EXPECT_EQ(found.results.at(0).nothing_to_choose, nothing);
      const std::string note = fmt::format(
          "nothing to choose: {} at {}: the capacity is no more than what is kept whatever the scores, so "
          "these say nothing of the policy's choice",
          policy, capacity);
      EXPECT_EQ(std::ranges::count(found.notes, note), nothing ? 1 : 0);
      if (!nothing) continue;
      for (const Residency& set : found.results[0].kept.sets) {
        EXPECT_EQ(set, found.results[0].kept.sets.front()) << "no score had a say";
      }
    }
  }
  const auto same_as = [&](const std::string& a, const std::string& b, int capacity) {
    const auto replays = replay(traces_[0], make_request({a, b}, {fmt::format("{}", capacity)}));
    return replays.at(0).results.at(0).kept.sets == replays[0].results.at(1).kept.sets;
  };
  EXPECT_TRUE(same_as("lagkv(sinks=2,lag=8)", "streamingllm(sinks=2)", unscored));
  EXPECT_FALSE(same_as("lagkv(sinks=2,lag=8)", "streamingllm(sinks=2)", unscored + 1));
  EXPECT_TRUE(same_as("snapkv(window=8)", "recent", 8));
}

TEST_F(Replays, KeptSetsCostBytesPerTokenOfThePrompt) {
  trace();  // 2 layers, 4 query heads on 2 KV heads of width 8, 60 positions
  const auto cost = [&](const std::string& policy, const std::string& capacity, Granularity granularity) {
    const auto replays = replay(traces_[0], make_request({policy}, {capacity}, granularity));
    const double bytes = bytes_per_token(replays.at(0), replays[0].results.at(0));
    EXPECT_EQ(bytes_per_token_of_capacity(replays[0], replays[0].results[0]),
              128.0 * replays[0].results[0].capacity / 60);
    return bytes;
  };
  EXPECT_EQ(cost("full", "30", Granularity::kv), 2 * 2 * 2 * 8 * 2);
  EXPECT_EQ(cost("snapkv(window=8)", "30", Granularity::kv), 64);
  EXPECT_EQ(cost("snapkv(window=8)", "30", Granularity::query), 128) << "a set per query head";
  EXPECT_EQ(cost("tova", "30", Granularity::layer), 64) << "one set, but each KV head stores it";
  EXPECT_GT(cost("snapkv(window=8)+pyramid", "15", Granularity::kv), 0);
}

}  // namespace
}  // namespace kvreplay::test
