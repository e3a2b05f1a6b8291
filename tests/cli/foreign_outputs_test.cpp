// A capture whose outputs are not the attention of its queries, keys and values is told of wherever it is used.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "hdf5/hdf5.h"
#include "support/random_trace.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using test::words;
using testing::Contains;
using testing::HasSubstr;
using testing::Not;

class ForeignOutputs : public test::Commands {
 protected:
  ForeignOutputs() {
    RandomTrace{}.write(folder_ / "own.h5");
    RandomTrace{.own_outputs = false}.write(folder_ / "foreign.h5");
  }

  const std::string warning_ =
      "the stored outputs of 2 of 2 layers (the first is layer 0) are not the attention of the stored queries, keys "
      "and "
      "values; check softmax_scale, sliding_window, attn_logit_softcapping and how the run was captured";
};

TEST_F(ForeignOutputs, ReplaysAndSweepsRepeatTheWarningOfInspect) {
  EXPECT_THAT(succeed(words("inspect foreign.h5")).output, HasSubstr("warning: " + warning_));
  for (const std::string command : {"replay", "sweep"}) {
    SCOPED_TRACE(command);
    const test::Outcome outcome = succeed(words(command + " own.h5 foreign.h5 -p snapkv(window=4) -c 15 -o " + command +
                                                ".h5 --json " + command + ".json"));
    EXPECT_THAT(outcome.errors, HasSubstr("note: foreign.h5: " + warning_));
    EXPECT_THAT(outcome.errors, Not(HasSubstr("own.h5")));
    const auto file = hdf5::File::open(folder_ / (command + ".h5"));
    EXPECT_FALSE(file.exists("/results/0/notes"));
    EXPECT_THAT(file.read_strings("/results/1/notes"), Contains(warning_));
    const auto document = nlohmann::json::parse(test::read_file(folder_ / (command + ".json")));
    EXPECT_EQ(document["traces"][1]["notes"], nlohmann::json::array({warning_}));
  }
}

}  // namespace
}  // namespace kvreplay
