// What a policy with a schedule cannot do is left out, in one line each, and the rest of the grid goes on.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "hdf5/hdf5.h"
#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;

class ScheduledBadInput : public testing::Test {
 protected:
  // The notes on what was left out of a grid whose other cell is replayed.
  std::vector<std::string> left_out(const RandomTrace& shape, const std::string& spec, const std::string& capacity,
                                    int eviction = 60) const {
    shape.write(folder_ / "t.h5");
    const TraceReader trace(folder_ / "t.h5");
    ReplayRequest request = make_request({spec, "knorm+every"}, {capacity});
    request.eviction_positions = {eviction};
    const TraceReplay found = replay({&trace, 1}, request).at(0);
    EXPECT_THAT(found.results, SizeIs(1)) << spec;
    EXPECT_EQ(found.results.at(0).policy, "knorm+every");
    std::vector<std::string> notes;
    for (const std::string& note : found.notes) {
      EXPECT_EQ(note.find('\n'), std::string::npos);
      if (note.starts_with("left out: ")) notes.push_back(note);
    }
    return notes;
  }

  TemporaryFolder folder_;
  RandomTrace usual_{.prompt_length = 60, .num_tokens = 90};
};

TEST_F(ScheduledBadInput, QueriesThatAreMissingAfterThePrompt) {
  RandomTrace from_50_on = usual_;
  from_50_on.captured_prompt_queries = 10;
  for (const std::string spec : {"h2o(window=4)+every", "rkv(window=4,interval=8)", "gkv(window=4,interval=8)",
                                 "rpc(recent=4)", "raas+pin(prompt,counted=false)", "h2o@h2o-mask(recent=4)"}) {
    EXPECT_THAT(left_out(from_50_on, spec, "16", 40),
                ElementsAre(AllOf(HasSubstr(spec.substr(0, spec.find('('))), HasSubstr("capture with --queries"))))
        << spec;
  }
}

TEST_F(ScheduledBadInput, CapacityBelowWhatIsProtectedAndPinned) {
  EXPECT_THAT(left_out(usual_, "rkv(interval=8)+protect(first=8,last=16)", "20"),
              ElementsAre(AllOf(HasSubstr("is below the 24 positions"), HasSubstr("ask for a larger capacity"))));
  EXPECT_THAT(left_out(usual_, "knorm+every+pin(prompt)", "20"),
              ElementsAre(AllOf(HasSubstr("is below the 61 positions"), HasSubstr("ask for a larger capacity"))));
  EXPECT_THAT(left_out(usual_, "raas", "60"), ElementsAre(HasSubstr("is below the 62 positions")));
  EXPECT_THAT(left_out(usual_, "rpc(recent=16)", "16"), ElementsAre(HasSubstr("is below the 17 positions")));
  EXPECT_THAT(left_out(usual_, "h2o@h2o-mask(recent=24)", "20"), ElementsAre(HasSubstr("is below the 24 positions")));
  EXPECT_THAT(left_out(usual_, "keyformer(recent=24)", "20"), ElementsAre(HasSubstr("is below the 24 positions")));
}

TEST_F(ScheduledBadInput, AnIntervalAboveTheStepsThereAre) {
  for (const std::string spec : {"snapkv(window=4)+every(31)", "rkv(window=4,interval=64)", "gkv(window=4,interval=31)",
                                 "lazyeviction(window=31)"}) {
    EXPECT_THAT(left_out(usual_, spec, "40"), ElementsAre(AllOf(HasSubstr("evicts every"), HasSubstr("and 30 come"),
                                                                HasSubstr("choose a shorter interval"))))
        << spec;
  }
  // Rows that a cache waits for are steps as well.
  for (const auto& [spec, capacity] : {std::pair("triattention(interval=64,prompt=evicted)", "40"),
                                       {"knorm+every(slack=64)", "40"},
                                       {"scissorhands(history=8)", "50"},
                                       {"rpc(recent=4,compression=4)", "12"}}) {
    EXPECT_THAT(left_out(usual_, spec, capacity),
                ElementsAre(AllOf(HasSubstr(fmt::format("at capacity {} waits for more rows than the 90", capacity)),
                                  HasSubstr("ask for a smaller capacity or capture a longer run"))))
        << spec;
  }
}

TEST_F(ScheduledBadInput, NoiseOfAnotherTrace) {
  const auto write_noise = [&](const std::string& file, const hdf5::Shape& shape) {
    const std::vector<float> noise(static_cast<std::size_t>(hdf5::elements(shape)), 0.5f);
    hdf5::File::create(folder_ / file).write("/gumbel_noise", noise, shape);
    return fmt::format("keyformer(recent=4,file=\"{}\")", (folder_ / file).string());
  };
  EXPECT_THAT(left_out(usual_, write_noise("heads.h5", {2, 2, 90, 90}), "16"),
              ElementsAre(HasSubstr("is of 2 layers of 2 query heads, and the trace has 2 of 4")));
  EXPECT_THAT(left_out(usual_, write_noise("tokens.h5", {2, 4, 80, 80}), "16"),
              ElementsAre(HasSubstr("is of 80 tokens, and the trace has 90")));
}

}  // namespace
}  // namespace kvreplay::test
