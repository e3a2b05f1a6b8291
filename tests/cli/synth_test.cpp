// The synth command as a user types it.
#include <gmock/gmock.h>

#include <csignal>

#include "cli/command.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

class Synth : public test::Commands {
 protected:
  void refuse_words(const std::string& arguments, const std::vector<std::string>& reasons) const {
    refuse(test::words("synth " + arguments), 2, reasons);
  }
};

TEST_F(Synth, WritesATraceThatTheOtherCommandsTake) {
  const test::Outcome outcome = succeed(test::words(
      "synth --layers 2 --heads 8 --kv-heads 2 --head-dim 32 --tokens 1040 --prompt-tokens 1000 --dtype float16"));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("synthetic.h5: "), HasSubstr("2 layers, 1000 prompt tokens, 104 captured "
                                                                           "queries")));
  EXPECT_THAT(outcome.errors, Not(HasSubstr("\r"))) << "no progress line where there is no terminal";
  EXPECT_THAT(folder_.names(), ElementsAre("synthetic.h5"));
  const TraceReader reader(folder_ / "synthetic.h5");
  EXPECT_EQ(reader.info().model.hidden_size, 256);
  EXPECT_EQ(reader.stored_tensors().front().type, DType::float16);
  EXPECT_TRUE(reader.has_output_projection(1));
  EXPECT_FALSE(reader.has_attention_mass(0));
  EXPECT_THAT(succeed({"inspect", "--verify", "synthetic.h5"}).output,
              AllOf(HasSubstr("synthetic, seed 0"), HasSubstr("hinted-evidence-0"), HasSubstr("late-evidence-1")));
  const std::string table =
      succeed(test::words("replay synthetic.h5 --policy full recent snapkv random oracle-attention --capacity 100"))
          .output;
  const auto at = [&](const char* name) { return table.find(std::string("\n") + name); };
  ASSERT_NE(at("random"), std::string::npos) << table;
  EXPECT_LT(at("full"), at("oracle-attention")) << table;
  EXPECT_LT(at("oracle-attention"), at("snapkv")) << table;
  EXPECT_LT(at("snapkv"), at("random")) << table;
}

TEST_F(Synth, OptionsSayWhatIsInTheFile) {
  succeed(
      test::words("synth --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --hidden 10 --tokens 50 --generate 5 "
                  "--queries all --no-projection --attention-mass --seed 7 -t 1 -o a.h5"));
  const TraceReader reader(folder_ / "a.h5");
  EXPECT_EQ(reader.info().prompt_length, 45);
  EXPECT_EQ(reader.info().num_queries(), 50);
  EXPECT_EQ(reader.info().model.hidden_size, 10);
  EXPECT_FALSE(reader.has_output_projection(0));
  EXPECT_TRUE(reader.has_attention_mass(0));
  EXPECT_THAT(reader.info().source, HasSubstr("seed 7"));
  EXPECT_EQ(reader.stored_tensors().front().type, DType::float32);

  succeed(test::words("synth --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --tokens 40 --queries window:8 -o b.h5"));
  EXPECT_EQ(TraceReader(folder_ / "b.h5").info().prompt_length, 20) << "32 after the prompt, but at most half";
  EXPECT_EQ(TraceReader(folder_ / "b.h5").info().query_positions.front(), 12);

  EXPECT_THAT(succeed(test::words("synth --layers 1 --heads 2 --kv-heads 1 --tokens 40 --generate 0 -o c.h5")).errors,
              HasSubstr("note: the trace has no query after the prompt"));
}

TEST_F(Synth, RefusesWrongUsage) {
  refuse_words("", {"--tokens is required"});
  refuse_words("--tokens 1", {"--tokens: '1' is not a number of tokens: an integer, 2 to"});
  refuse_words("--tokens many", {"--tokens: 'many'"});
  refuse_words("--tokens 100 --heads 6 --kv-heads 4", {"--heads 6: not a multiple of the 4 KV heads (--kv-heads)"});
  refuse_words("--tokens 100 --kv-heads 0", {"--kv-heads: '0' is not a size"});
  refuse_words("--tokens 100 --layers -1", {"--layers: '-1'"});
  refuse_words("--tokens 100 --head-dim 7", {"--head-dim: '7' is not a head dimension: an integer, 8 to"});
  refuse_words("--tokens 100 --generate 100", {"--generate 100: leaves no prompt of 100 tokens"});
  refuse_words("--tokens 100 --generate -1", {"--generate: '-1'"});
  refuse_words("--tokens 100 --prompt-tokens 101", {"--prompt-tokens 101: there are only 100 tokens"});
  refuse_words("--tokens 100 --prompt-tokens 9 --generate 91", {"--prompt-tokens excludes --generate"});
  refuse_words("--tokens 100 --queries window:0", {"--queries window:0: must be \"all\" or \"window:N\""});
  refuse_words("--tokens 100 --dtype half", {"--dtype", "must be float32, float16 or bfloat16, not 'half'"});
  refuse_words("--tokens 100 --seed -1", {"--seed: '-1' is not a seed"});
  refuse_words("--tokens 100 --threads 0", {"'0' is not a number of threads"});
  refuse_words("--tokens 100 --head 3", {"unknown option --head. Did you mean '--heads'?"});
  refuse({"synth", "--tokens", "100", "-o", ""}, 2, {"--output: the file's name is empty"});
  refuse(test::words("synth --tokens 100 -o none/a.h5"), 1, {"none/a.h5: cannot be written"});
}

TEST_F(Synth, WhatFailsLeavesTheEarlierFileAlone) {
  test::write_file(folder_ / "synthetic.h5", "precious");
  const test::Outcome outcome = run({.arguments = test::words("synth --layers 2 --tokens 4000 --no-projection"),
                                     .largest_file = std::uint64_t{20} << 20});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("kvreplay: synthetic.h5: "), HasSubstr("cannot be written")));
  EXPECT_THAT(folder_.names(), ElementsAre("synthetic.h5"));
  EXPECT_EQ(test::read_file(folder_ / "synthetic.h5"), "precious");
}

TEST_F(Synth, InterruptedItLeavesNothing) {
  const test::Outcome outcome = interrupt(
      {.arguments = test::words("synth --tokens 16384 --dtype float16"), .interrupt_when = ".tmp-"}, "synthetic.h5");
  EXPECT_EQ(outcome.signal, SIGINT);
  EXPECT_THAT(outcome.errors, HasSubstr("kvreplay: interrupted"));
  EXPECT_TRUE(folder_.names().empty());
}

}  // namespace
}  // namespace kvreplay
