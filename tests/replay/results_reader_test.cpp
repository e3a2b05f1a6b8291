// What is written as results is read back as it was, and nothing else is taken for results.
#include "replay/results_reader.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>

#include "base/error.h"
#include "replay/replay.h"
#include "replay/results_file.h"
#include "support/places.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

class Results : public testing::Test {
 protected:
  Results() {
    test::RandomTrace{.spans = {{5, 9, "needle"}, {50, 64, "over the edge"}}}.write(folder_ / "run.h5");
    const TraceReader trace(folder_ / "run.h5");
    ReplayRequest request = make_request({"full", "recent", "snapkv(window=4)"}, {"12", "50%"}, Granularity::query);
    request.eviction_positions = {40, 60};
    replays_ = replay(trace, request);
    for (const TraceReplay& each : replays_) std::ranges::move(overlaps(each), std::back_inserter(tables_));
    write_results(folder_ / "results.h5", replays_, tables_);
    write_kept_sets(folder_ / "kept.h5", replays_);
  }

  // Why a file that `change` was applied to is refused, when all of it is read.
  std::string refusal(const std::string& name, const std::function<void(std::int64_t)>& change) {
    std::filesystem::copy_file(folder_ / name, folder_ / "changed.h5",
                               std::filesystem::copy_options::overwrite_existing);
    test::edit(folder_ / "changed.h5", change);
    try {
      if (name == "kept.h5") {
        const KeptSetsReader reader(folder_ / "changed.h5");
        for (std::size_t i = 0; i < reader.kept().size(); ++i) static_cast<void>(reader.read(i, 2));
      } else {
        const ResultsReader reader(folder_ / "changed.h5");
        for (std::size_t i = 0; i < reader.results().size(); ++i) {
          for (const MeasureTraits& measure : measures()) static_cast<void>(reader.read(i, measure.measure));
        }
        for (std::size_t i = 0; i < reader.overlaps().size(); ++i) static_cast<void>(reader.read_overlap(i));
      }
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }

  test::TemporaryFolder folder_;
  std::vector<TraceReplay> replays_;
  std::vector<OverlapTable> tables_;
};

TEST_F(Results, AreReadBackAsTheyWere) {
  const ResultsReader reader(folder_ / "results.h5");
  ASSERT_EQ(reader.results().size(), 2 * replays_[0].results.size());
  std::size_t i = 0;
  for (const TraceReplay& replay : replays_) {
    for (const ReplayResult& result : replay.results) {
      const StoredResult& stored = reader.results()[i];
      EXPECT_EQ(stored.trace, result.trace);
      EXPECT_EQ(stored.trace_digest, replay.trace_digest);
      EXPECT_EQ(stored.trace_digest.size(), 16u);
      EXPECT_EQ(stored.model, "random");
      EXPECT_EQ(stored.num_layers, 2);
      EXPECT_EQ(stored.num_query_heads, 4);
      EXPECT_EQ(stored.num_kv_heads, 2);
      EXPECT_EQ(stored.prompt_length, 60);
      EXPECT_EQ(stored.policy, result.policy);
      EXPECT_EQ(stored.capacity_request, result.capacity_request);
      EXPECT_EQ(stored.capacity, result.capacity);
      EXPECT_EQ(stored.kept, result.kept.mean_size());
      EXPECT_EQ(stored.bytes_per_token, bytes_per_token(replay, result));
      EXPECT_EQ(stored.nothing_to_choose, result.nothing_to_choose);
      EXPECT_EQ(stored.eviction_position, replay.eviction_position);
      EXPECT_EQ(stored.granularity, Granularity::query);
      EXPECT_EQ(stored.share, result.share);
      EXPECT_FALSE(stored.oracle);
      EXPECT_EQ(stored.evaluation_positions, replay.evaluation_positions);
      EXPECT_EQ(stored.spans.size(), replay.spans.size());
      EXPECT_EQ(stored.spans.front().label, "needle");
      EXPECT_EQ(stored.notes, replay.notes);
      for (const MeasureTraits& measure : measures()) {
        const Table table = reader.read(i, measure.measure);
        EXPECT_EQ(table.numbers, result.measures[measure.measure].numbers) << measure.name;
        if (table.numbers.empty()) continue;
        EXPECT_EQ(table.shape, result.measures[measure.measure].shape) << measure.name;
      }
      ++i;
    }
  }
  ASSERT_EQ(reader.overlaps().size(), tables_.size());
  for (std::size_t t = 0; t < tables_.size(); ++t) {
    const OverlapTable table = reader.read_overlap(t);
    EXPECT_EQ(table.policies, tables_[t].policies);
    EXPECT_EQ(table.eviction_position, tables_[t].eviction_position);
    EXPECT_EQ(table.jaccard.numbers, tables_[t].jaccard.numbers);
    EXPECT_EQ(table.containment.numbers, tables_[t].containment.numbers);
  }
}

TEST_F(Results, KeptSetsAreReadBackAsTheyWere) {
  const KeptSetsReader reader(folder_ / "kept.h5");
  std::size_t i = 0;
  for (const TraceReplay& replay : replays_) {
    for (const ReplayResult& result : replay.results) {
      const StoredKeptSets& stored = reader.kept().at(i);
      EXPECT_EQ(stored.policy, result.policy);
      EXPECT_EQ(stored.capacity_request, result.capacity_request);
      EXPECT_EQ(stored.eviction_position, replay.eviction_position);
      const KeptSets sets = reader.read(i, 2);
      EXPECT_EQ(sets.sets, result.kept.sets);
      EXPECT_EQ(sets.sets_per_layer, 4);
      EXPECT_EQ(sets.granularity, Granularity::query);
      ++i;
    }
  }
  EXPECT_EQ(i, reader.kept().size());
}

TEST_F(Results, TheSameCaptureHasTheSameDigestWhereverItLies) {
  std::filesystem::copy_file(folder_ / "run.h5", folder_ / "copy.h5");
  test::RandomTrace{.seed = 2}.write(folder_ / "other.h5");
  const auto digest = [&](const char* name) {
    return replay(TraceReader(folder_ / name), make_request({"recent"}, {"12"}))[0].trace_digest;
  };
  EXPECT_EQ(digest("run.h5"), digest("copy.h5"));
  EXPECT_NE(digest("run.h5"), digest("other.h5"));
}

// Spans as compound elements, strings of fixed length.
TEST(OldResults, AreRead) {
  const std::filesystem::path data = test::test_data();
  const ResultsReader results(data / "results-version-2.h5");
  ASSERT_EQ(results.results().size(), 3u);
  const StoredResult& result = results.results()[1];
  EXPECT_EQ(result.trace, "t.h5");
  EXPECT_EQ(result.policy, "snapkv(window=2,kernel=1)");
  EXPECT_EQ(result.capacity_request, "4");
  ASSERT_EQ(result.spans.size(), 2u);
  EXPECT_EQ(result.spans[0].label, "needle");
  EXPECT_EQ(result.spans[1].start, 6);
  EXPECT_EQ(result.spans[1].end, 7);
  EXPECT_FLOAT_EQ(results.read(1, Measure::layer_error).numbers[1], 0.7769145f);
  EXPECT_THAT(results.read_overlap(0).policies, ElementsAre("full", "recent", "snapkv(window=2,kernel=1)"));
  const KeptSetsReader kept(data / "kept-version-2.h5");
  ASSERT_EQ(kept.kept().size(), 3u);
  EXPECT_EQ(kept.kept()[1].policy, "snapkv(window=2,kernel=1)");
  EXPECT_THAT(kept.read(1, 2).sets[1].kept(), ElementsAre(0, 3, 7, 8));
}

TEST_F(Results, ANameThatIsNotWhatWasWrittenIsRefused) {
  std::ifstream stream(folder_ / "results.h5", std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const std::size_t at = bytes.find("snapkv(window=4)");
  ASSERT_NE(at, std::string::npos);
  bytes[at] = 'x';
  std::ofstream(folder_ / "damaged.h5", std::ios::binary) << bytes;
  EXPECT_THAT(
      [&] { ResultsReader reader(folder_ / "damaged.h5"); },
      testing::ThrowsMessage<Error>(HasSubstr("string attributes are not those that 'attributes_xxh64' tells")));
}

TEST_F(Results, OtherFilesAreRefusedWithTheReason) {
  EXPECT_THAT([&] { ResultsReader reader(folder_ / "run.h5"); },
              testing::ThrowsMessage<Error>(HasSubstr("not a file of results")));
  EXPECT_THAT([&] { ResultsReader reader(folder_ / "kept.h5"); },
              testing::ThrowsMessage<Error>(HasSubstr("not a file of results")));
  EXPECT_THAT([&] { KeptSetsReader reader(folder_ / "results.h5"); },
              testing::ThrowsMessage<Error>(HasSubstr("not a file of kept sets")));
  EXPECT_THAT([&] { ResultsReader reader(folder_ / "missing.h5"); },
              testing::ThrowsMessage<Error>(HasSubstr("missing.h5")));
}

TEST_F(Results, WhatContradictsItselfIsRefusedWithTheReason) {
  const auto with_int = [&](const char* group, const char* name, int value) {
    return refusal("results.h5", [=](std::int64_t file) { test::set_int(file, group, name, value); });
  };
  EXPECT_THAT(with_int("/", "format_version", 1), AllOf(HasSubstr("version 1"), HasSubstr("replay again")));
  EXPECT_THAT(with_int("/", "format_version", 4), AllOf(HasSubstr("version 4"), HasSubstr("update kvreplay")));
  EXPECT_THAT(with_int("/", "complete", 0), HasSubstr("unfinished"));
  EXPECT_THAT(with_int("/results/3", "num_layers", 3), HasSubstr("/results/3/held"));
  EXPECT_THAT(with_int("/results/3", "num_layers", 0), HasSubstr("'num_layers' is 0"));
  EXPECT_THAT(with_int("/results/3", "num_kv_heads", 3), HasSubstr("4 query heads cannot share 3 KV heads"));
  EXPECT_THAT(with_int("/results/3", "evict_at", 61), HasSubstr("evaluation_positions"));
  const auto with_string = [&](const char* name, const char* value) {
    return refusal("results.h5", [=](std::int64_t file) { test::set_string(file, "/results/0", name, value); });
  };
  EXPECT_THAT(with_string("heads", "token"), HasSubstr("'heads' is 'token'"));
  EXPECT_THAT(with_string("share", "median"), HasSubstr("'share' is 'median'"));
  EXPECT_THAT(refusal("results.h5", [](std::int64_t file) { test::remove(file, "/results/1"); }),
              HasSubstr("/results/"));
  EXPECT_THAT(refusal("results.h5",
                      [](std::int64_t file) {
                        test::poke(file, "/results/2/cosine", {0, 0, 0}, NAN);
                      }),
              HasSubstr("/results/2/cosine: holds what is not a number"));
  EXPECT_THAT(refusal("kept.h5",
                      [](std::int64_t file) {
                        test::replace_ints(file, "/kept/2/kept", std::vector<std::int64_t>(2 * 4 * 20, 59));
                      }),
              HasSubstr("/kept/2/kept: set 0 is not ascending positions before the eviction at 40"));
}

}  // namespace
}  // namespace kvreplay
