// TriAttention that is calibrated by other traces.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "replay/engine.h"
#include "replay/query_statistics.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::SizeIs;

class TriAttention : public testing::Test {
 protected:
  static RandomTrace shape() { return {.num_layers = 3, .prompt_length = 40, .num_tokens = 80}; }

  void write_statistics(const std::string& file, const std::string& trace, int sinks = 0) const {
    const TraceReader reader(folder_ / trace);
    write_query_statistics(folder_ / file, std::span(&reader, 1), sinks);
  }

  std::string spec(const std::string& mode, const std::string& statistics = "") const {
    const std::string given =
        statistics.empty() ? "" : fmt::format(",statistics=\"{}\"", (folder_ / statistics).string());
    return fmt::format("triattention(mode={},interval=4,prompt=evicted{})", mode, given);
  }

  TraceReplay replayed(const std::string& trace, const std::vector<std::string>& specs) const {
    const TraceReader reader(folder_ / trace);
    return replay({&reader, 1}, make_request(specs, {"20"})).at(0);
  }

  TemporaryFolder folder_;
};

TEST_F(TriAttention, CalibratedByTheTraceItselfKeepsTheSame) {
  shape().write(folder_ / "t.h5");
  write_statistics("own.h5", "t.h5");
  for (const std::string mode : {"per-head", "layer-head", "global"}) {
    const TraceReplay found = replayed("t.h5", {spec(mode), spec(mode, "own.h5")});
    ASSERT_THAT(found.results, SizeIs(2)) << mode;
    EXPECT_FALSE(found.results[0].kept.sets.front().is_one_eviction());
    EXPECT_EQ(found.results[0].kept.sets, found.results[1].kept.sets) << mode;
  }
}

TEST_F(TriAttention, CalibratedByAnotherTraceNeedsNoQueries) {
  RandomTrace without = shape();
  without.captured_prompt_queries = 0;
  without.write(folder_ / "without.h5");
  shape().write(folder_ / "t.h5");
  RandomTrace other = shape();
  other.seed = 9;
  other.write(folder_ / "other.h5");
  write_statistics("own.h5", "t.h5");
  write_statistics("other.h5.statistics", "other.h5");
  for (const std::string mode : {"per-head", "layer-head", "global"}) {
    const TraceReplay found =
        replayed("without.h5", {spec(mode), spec(mode, "own.h5"), spec(mode, "other.h5.statistics")});
    ASSERT_THAT(found.results, SizeIs(2)) << "without queries and statistics it is left out";
    EXPECT_EQ(found.results[0].kept.sets, replayed("t.h5", {spec(mode)}).results[0].kept.sets) << mode;
    EXPECT_NE(found.results[1].kept.sets, found.results[0].kept.sets) << mode;
  }
}

TEST_F(TriAttention, CalibrationOfAnotherModelIsRefusedAndTheRestGoesOn) {
  shape().write(folder_ / "t.h5");
  RandomTrace wide = shape();
  wide.head_dim = 16;
  wide.write(folder_ / "wide.h5");
  write_statistics("wide.statistics", "wide.h5");
  const auto note_of = [&](const std::string& statistics) {
    const TraceReplay found = replayed("t.h5", {spec("per-head", statistics), "knorm+every"});
    EXPECT_THAT(found.results, SizeIs(1)) << statistics;
    for (const std::string& note : found.notes) {
      if (note.find(statistics) != std::string::npos) return note;
    }
    return std::string();
  };
  EXPECT_THAT(note_of("wide.statistics"),
              AllOf(HasSubstr("left out: triattention("), HasSubstr("is not of 4 query heads of width 8"),
                    HasSubstr("write the statistics of traces of this model")));
  // Of the same shape by another name, and as an earlier version wrote it.
  for (const auto& [file, model] : {std::pair("another.h5", "another"), {"earlier.h5", ""}}) {
    hdf5::File statistics = hdf5::File::create(folder_ / file);
    statistics.write_string("/", "format", "kvreplay-query-statistics");
    if (*model != '\0') statistics.write_string("/", "model", model);
    statistics.create_group("/layers");
    for (int layer = 0; layer < shape().num_layers; ++layer) {
      const std::string group = fmt::format("/layers/{}", layer);
      statistics.create_group(group);
      statistics.write(group + "/mean", std::vector<float>(4 * 8, 1.0f), {4, 8});
      if (*model != '\0') statistics.write(group + "/magnitude", std::vector<float>(4 * 4, 1.0f), {4, 4});
    }
  }
  EXPECT_THAT(note_of("another.h5"), HasSubstr("is of another, and the trace of random"));
  EXPECT_THAT(note_of("earlier.h5"), HasSubstr("/layers/0/magnitude: is missing, as in files of earlier versions"));
}

}  // namespace
}  // namespace kvreplay::test
