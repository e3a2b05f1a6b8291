// Finished units on disk: what was stored comes back, what is damaged is noticed, what belongs elsewhere is refused.
#include "sweep/unit_store.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <random>

#include "base/error.h"
#include "replay/results_file.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"
#include "sweep/sweep.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

class UnitStoreTest : public testing::Test {
 protected:
  UnitStoreTest() {
    RandomTrace{.num_layers = 3, .spans = {{4, 9, "needle"}}}.write(folder_ / "a.h5");
    RandomTrace{.num_layers = 2, .seed = 2}.write(folder_ / "b.h5");
    open_traces();
  }

  void open_traces() {
    engine_.reset();
    traces_.clear();
    for (const char* name : {"a.h5", "b.h5"}) traces_.emplace_back(folder_ / name);
    ReplayRequest request;
    for (const char* spec :
         {"full", "snapkv(window=4)", "random", "caote(window=4)+cake(window=4)", "restkv(window=4)+adakv"}) {
      request.policies.push_back(make_policy(spec));
    }
    for (const char* capacity : {"12", "50%"}) request.capacities.push_back(CapacityRequest::parse(capacity));
    request.eviction_positions = {40, 60};
    request.granularity = Granularity::query;
    request.rank_agreement = rank_agreement_;
    identity_ = SweepIdentity(request, traces_, {});
    engine_ = std::make_unique<ReplayEngine>(traces_, request);
  }

  std::unique_ptr<UnitStore> store() const {
    return std::make_unique<UnitStore>(folder_ / "sweep.h5", engine_->outlines(), identity_);
  }

  // What --resume finds, and is told.
  std::vector<ReplayUnit> resumed(std::vector<std::string>& notes) const {
    const auto opened = store();
    opened->open(true);
    return opened->finished(notes);
  }

  void run(UnitStore& store, const std::vector<ReplayUnit>& units) const {
    run_units(*engine_, units, store, [](const ReplayUnit&) { return true; });
  }

  // Reads everything in the store into one file.
  std::string merged(const UnitStore& store) const {
    ResultsWriter writer(folder_ / "merged.h5", engine_->outlines());
    for_each_result(engine_->outlines(), store, 1,
                    [&](const TraceReplay& replay, const ReplayResult& result) { writer.add(replay, result); });
    writer.finish();
    return test::read_file(folder_ / "merged.h5");
  }

  std::string refusal(bool resume) const {
    return test::message_of<Error>([&]() { store()->open(resume); });
  }

  test::TemporaryFolder folder_;
  bool rank_agreement_ = true;
  std::vector<TraceReader> traces_;
  std::unique_ptr<ReplayEngine> engine_;
  SweepIdentity identity_;
};

TEST_F(UnitStoreTest, UntilWhenPositionsStayComesBack) {
  const auto opened = store();
  opened->open(false);
  const std::vector<ReplayUnit> units = {engine_->units().front()};
  std::vector<LayerResult> results;
  engine_->run(units, [&](const ReplayUnit&, std::vector<LayerResult> found) { results = std::move(found); });
  const int eviction = engine_->outlines().front().eviction_position;
  results.at(2).kept.at(1) = Residency({1, 5, eviction + 2}, {eviction, Residency::kNever, eviction + 4}, eviction);
  opened->save(units[0], results);
  std::vector<std::string> notes;
  EXPECT_THAT(opened->finished(notes), SizeIs(1)) << "its digests are right";
  EXPECT_THAT(notes, IsEmpty());
  // All settings, and some of them.
  for (const auto& [first, count] : {std::pair<std::size_t, std::size_t>(0, results.size()), {2, 1}, {3, 2}}) {
    const std::vector<LayerResult> found = opened->read(units[0]).read(first, count);
    ASSERT_THAT(found, SizeIs(count));
    for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(found[i].kept, results[first + i].kept) << first + i;
  }
}

TEST_F(UnitStoreTest, WhatIsStoredIsWhatAReplayInMemoryGives) {
  const auto opened = store();
  opened->open(false);
  run(*opened, engine_->units());

  std::vector<TraceReplay> replays = engine_->outlines();
  for (TraceReplay& replay : replays) allocate_tables(replay);
  engine_->run(engine_->units(), [&](const ReplayUnit& unit, std::vector<LayerResult> results) {
    store_layer(replays[static_cast<std::size_t>(unit.replay)], unit.layer, std::move(results));
  });
  for (TraceReplay& replay : replays) settle_capacities(replay);
  std::vector<const ReplayResult*> expected;
  for (const TraceReplay& replay : replays) {
    for (const ReplayResult& result : replay.results) expected.push_back(&result);
  }
  // One at a time, several, and all.
  for (const Index bytes : {Index{1}, 3 * memory_of_result(engine_->outlines()), Index{1} << 30}) {
    std::size_t compared = 0;
    for_each_result(engine_->outlines(), *opened, bytes, [&](const TraceReplay&, const ReplayResult& result) {
      const ReplayResult& other = *expected.at(compared++);
      EXPECT_EQ(result.policy, other.policy);
      EXPECT_EQ(result.capacity, other.capacity);
      EXPECT_EQ(result.trace, other.trace);
      EXPECT_EQ(result.kept.sets, other.kept.sets);
      for (const MeasureTraits& measure : measures()) {
        EXPECT_EQ(result.measures[measure.measure].numbers, other.measures[measure.measure].numbers) << measure.name;
        EXPECT_EQ(result.measures[measure.measure].shape, other.measures[measure.measure].shape) << measure.name;
      }
    });
    EXPECT_EQ(compared, expected.size());
  }
}

TEST_F(UnitStoreTest, AnyUnitsMayBeMissingAndAreDoneAgainToTheSameBytes) {
  const std::vector<ReplayUnit> all = engine_->units();
  ASSERT_THAT(all, SizeIs(10));
  std::string whole;
  {
    const auto opened = store();
    opened->open(false);
    run(*opened, all);
    whole = merged(*opened);
  }
  std::mt19937 random(7);
  for (int round = 0; round < 4; ++round) {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / "sweep.h5.units")) {
      if (entry.path().extension() == ".h5" && random() % 2 == 0) files.push_back(entry.path());
    }
    for (const auto& file : files) std::filesystem::remove(file);
    const auto opened = store();
    opened->open(true);
    std::vector<std::string> notes;
    const std::vector<ReplayUnit> done = opened->finished(notes);
    EXPECT_EQ(done.size(), all.size() - files.size());
    EXPECT_THAT(notes, IsEmpty());
    std::vector<ReplayUnit> left;
    for (const ReplayUnit& unit : all) {
      if (std::ranges::find(done, unit) == done.end()) left.push_back(unit);
    }
    std::ranges::shuffle(left, random);
    run(*opened, left);
    EXPECT_TRUE(merged(*opened) == whole);
  }
}

// What budgets find out about all layers is found out once, by all processes together, and is not taken on trust.
TEST_F(UnitStoreTest, SurveysAreSharedStoredAndDoneAgainWhereDamaged) {
  const auto opened = store();
  opened->open(false);
  const std::vector<ReplayUnit> units = engine_->units();
  EXPECT_FALSE(opened->read_survey(units.front()));
  for (const int rank : {1, 0}) survey_layers(*engine_, units, *opened, rank, 2);
  for (const ReplayUnit& unit : units) EXPECT_EQ(opened->read_survey(unit), engine_->survey(unit));
  run(*opened, units);
  const std::string expected = merged(*opened);

  // One is cut short, one is of other numbers, one is gone: the results are the same.
  opened->remove();
  open_traces();
  const auto again = store();
  again->open(false);
  survey_layers(*engine_, units, *again, 0, 1);
  const auto place = [&](int replay, int layer) {
    return again->folder() / fmt::format("survey-{}-{}.h5", replay, layer);
  };
  std::filesystem::resize_file(place(0, 0), 100);
  std::string bytes = test::read_file(place(0, 1));
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 0x55);
  test::write_file(place(0, 1), bytes);
  std::filesystem::remove(place(1, 0));
  EXPECT_FALSE(again->read_survey({0, 0}));
  EXPECT_FALSE(again->read_survey({1, 0}));
  give_surveys(*engine_, units, *again);
  run(*again, units);
  EXPECT_EQ(merged(*again), expected);
  again->remove();
  EXPECT_FALSE(std::filesystem::exists(again->folder()));
}

TEST_F(UnitStoreTest, DamagedAndHalfUnitsAreToldAndRemoved) {
  {
    const auto opened = store();
    opened->open(false);
    run(*opened, engine_->units());
  }
  const std::filesystem::path units = folder_ / "sweep.h5.units";
  std::string bytes = test::read_file(units / "unit-0-0.h5");
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);  // among the numbers
  test::write_file(units / "unit-0-0.h5", bytes);
  std::filesystem::resize_file(units / "unit-0-1.h5", 500);
  test::write_file(units / "unit-0-2.h5", "");
  std::filesystem::copy_file(units / "unit-2-0.h5", units / "unit-2-1.h5",
                             std::filesystem::copy_options::overwrite_existing);
  test::write_file(units / "unit-9-9.h5", "no such unit");
  test::write_file(units / "unit-1-0.h5.tmp-abcdef", "half");
  std::vector<std::string> notes;
  const std::vector<ReplayUnit> done = resumed(notes);
  EXPECT_THAT(done, SizeIs(6));
  EXPECT_THAT(done, Not(Contains(ReplayUnit{0, 0})));
  EXPECT_THAT(done, Not(Contains(ReplayUnit{2, 1})));
  EXPECT_THAT(notes, SizeIs(5)) << "what was being written needs no word";
  EXPECT_THAT(notes, Contains(AllOf(HasSubstr("unit-0-0.h5"), HasSubstr("digest"), HasSubstr("done again"))));
  EXPECT_THAT(notes, Contains(AllOf(HasSubstr("unit-2-1.h5"), HasSubstr("another sweep"))));
  EXPECT_FALSE(std::filesystem::exists(units / "unit-0-0.h5"));
  EXPECT_FALSE(std::filesystem::exists(units / "unit-1-0.h5.tmp-abcdef"));
}

TEST_F(UnitStoreTest, AnEarlierSweepIsNotTakenWithoutBeingAsked) {
  {
    const auto opened = store();
    opened->open(false);
    run(*opened, {{0, 1}});
  }
  EXPECT_THAT(refusal(false), AllOf(HasSubstr("sweep.h5.units: holds 1 finished unit of an earlier sweep"),
                                    HasSubstr("--resume"), HasSubstr("remove the folder")));
  std::vector<std::string> notes;
  EXPECT_THAT(resumed(notes), ElementsAre(ReplayUnit{0, 1}));
}

TEST_F(UnitStoreTest, RankAgreementIsPartOfWhatASweepIs) {
  rank_agreement_ = false;
  open_traces();
  {
    const auto opened = store();
    opened->open(false);
    run(*opened, {{0, 1}});
    EXPECT_THAT(test::read_file(folder_ / "sweep.h5.units" / "sweep.toml"), Not(HasSubstr("rank")))
        << "folders from before there was such a thing are taken";
  }
  std::vector<std::string> notes;
  EXPECT_THAT(resumed(notes), SizeIs(1));
  rank_agreement_ = true;
  open_traces();
  EXPECT_THAT(refusal(true), HasSubstr("--rank-agreement was not given, is given"));
}

TEST_F(UnitStoreTest, TwoProcessesDoNotWorkInOneFolder) {
  const auto first = store();
  first->open(false);
  EXPECT_THAT(refusal(true), HasSubstr("another kvreplay works in this folder"));
}

TEST_F(UnitStoreTest, WhereThereIsNothingToResumeItBegins) {
  std::vector<std::string> notes;
  EXPECT_THAT(resumed(notes), IsEmpty());
  // A process that was killed before it had written the manifest leaves an empty folder.
  std::filesystem::remove_all(folder_ / "sweep.h5.units");
  std::filesystem::create_directory(folder_ / "sweep.h5.units");
  EXPECT_THAT(resumed(notes), IsEmpty());
  EXPECT_THAT(notes, IsEmpty());
}

TEST_F(UnitStoreTest, FoldersOfOthersAreLeftAlone) {
  std::filesystem::create_directory(folder_ / "sweep.h5.units");
  test::write_file(folder_ / "sweep.h5.units/thesis.tex", "precious");
  EXPECT_THAT(refusal(true), HasSubstr("is not a sweep's folder"));
  EXPECT_THAT(refusal(false), HasSubstr("is not a sweep's folder"));
  EXPECT_EQ(test::read_file(folder_ / "sweep.h5.units/thesis.tex"), "precious");
}

TEST_F(UnitStoreTest, WhatWasPutThereIsRemoved) {
  const auto opened = store();
  opened->open(false);
  run(*opened, {{0, 1}, {1, 0}});
  opened->remove();
  EXPECT_FALSE(std::filesystem::exists(folder_ / "sweep.h5.units"));
}

TEST_F(UnitStoreTest, AChangedSweepIsRefusedNamingWhatDiffers) {
  {
    const auto opened = store();
    opened->open(false);
    run(*opened, {{0, 1}});
  }
  const SweepIdentity original = identity_;
  const auto changed = [&](const std::function<void(SweepIdentity&)>& change) {
    identity_ = original;
    change(identity_);
    const std::string message = refusal(true);
    EXPECT_THAT(message, AllOf(HasSubstr("sweep.h5.units: "), HasSubstr("remove the folder")));
    return message;
  };
  EXPECT_THAT(changed([](auto& i) { i.capacities = {"12", "70%"}; }), HasSubstr("--capacity was 12, 50%, is 12, 70%"));
  EXPECT_THAT(changed([](auto& i) { i.policies.pop_back(); }),
              AllOf(HasSubstr("--policy lacks restkv(window=4)+adakv"), Not(HasSubstr("--capacity"))));
  EXPECT_THAT(changed([](auto& i) { i.policies.push_back("tova"); }), HasSubstr("--policy has tova as well"));
  EXPECT_THAT(changed([](auto& i) { std::swap(i.policies[0], i.policies[1]); }),
              HasSubstr("--policy stands in another order"));
  EXPECT_THAT(changed([](auto& i) { i.eviction_positions = {}; }), HasSubstr("--evict-at was 40, 60, is none"));
  EXPECT_THAT(changed([](auto& i) { i.evaluate_from = "60"; }), HasSubstr("--evaluate-from was not given, is 60"));
  EXPECT_THAT(changed([](auto& i) { i.heads = "kv"; }), HasSubstr("--heads was query, is kv"));
  EXPECT_THAT(changed([](auto& i) { i.share = "max"; }), HasSubstr("--share was not given, is max"));
  EXPECT_THAT(changed([](auto& i) { i.version = "9.9"; }), AllOf(HasSubstr("version"), HasSubstr("is 9.9")));
  EXPECT_THAT(changed([](auto& i) { i.traces.pop_back(); }), HasSubstr("list of traces"));
  EXPECT_THAT(changed([](auto& i) {
                i.heads = "kv";
                i.share = "sum";
              }),
              AllOf(HasSubstr("--heads"), HasSubstr("; --share")));
}

TEST_F(UnitStoreTest, AChangedTraceIsRefusedBySizeOrContent) {
  {
    const auto opened = store();
    opened->open(false);
  }
  RandomTrace{.num_layers = 2, .seed = 3}.write(folder_ / "b.h5");
  open_traces();
  EXPECT_THAT(refusal(true), AllOf(HasSubstr("the content of"), HasSubstr("b.h5 is another, of the same size"),
                                   Not(HasSubstr("a.h5"))));
  RandomTrace{.num_layers = 2, .num_tokens = 75, .seed = 2}.write(folder_ / "b.h5");
  open_traces();
  EXPECT_THAT(refusal(true), AllOf(HasSubstr("the size of"), HasSubstr("b.h5 was")));
  RandomTrace{.num_layers = 2, .seed = 2}.write(folder_ / "b.h5");
  open_traces();
  EXPECT_EQ(identity_.traces[1].size, static_cast<std::int64_t>(std::filesystem::file_size(folder_ / "b.h5")));
}

TEST_F(UnitStoreTest, UnitsAreDividedByCostAndAllAreThere) {
  const std::vector<ReplayUnit> all = engine_->units();
  for (const int processes : {1, 2, 3, 20}) {
    const auto parts = divide_units(*engine_, all, processes);
    EXPECT_EQ(parts, divide_units(*engine_, all, processes));
    ASSERT_EQ(parts.size(), static_cast<std::size_t>(processes));
    std::vector<ReplayUnit> together;
    for (const auto& part : parts) together.insert(together.end(), part.begin(), part.end());
    EXPECT_THAT(together, SizeIs(all.size()));
    for (const ReplayUnit& unit : all) EXPECT_THAT(together, Contains(unit));
    for (const auto& part : parts) EXPECT_LE(part.size(), (all.size() + 1) / static_cast<std::size_t>(processes) + 2);
  }
}

}  // namespace
}  // namespace kvreplay
