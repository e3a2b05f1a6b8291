// Results analyzed as a user does it, and everything that can be asked for wrongly.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <filesystem>
#include <sstream>

#include "cli/command.h"
#include "replay/results_reader.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"

namespace kvreplay {
namespace {

using test::Outcome;
using test::RandomTrace;
using testing::AllOf;
using testing::Contains;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;

class Analyze : public test::Commands {
 protected:
  Analyze() {
    RandomTrace{.num_layers = 2, .spans = {{10, 14, "needle"}}}.write(folder_ / "a.h5");
    RandomTrace{.spans = {{3, 9, "early"}}, .seed = 2}.write(folder_ / "b.h5");
    succeed(test::words(
        "replay a.h5 b.h5 --policy full --policy snapkv(window=8) --policy restkv(window=8) --policy recent "
        "--policy oracle-attention --capacity 16,32 --evict-at 50,60 --rank-agreement -o r.h5 --kept k.h5"));
    succeed(
        test::words("sweep a.h5 b.h5 --policy restkv(window=8,temporal={mean,last}) --capacity 16,32 --evict-at 50,60 "
                    "-o s.h5"));
  }

  Outcome analyze(const std::string& arguments) const { return succeed(test::words("analyze " + arguments)); }
  void refuse_words(const std::string& arguments, int exit_code, const std::vector<std::string>& reasons) const {
    refuse(test::words("analyze " + arguments), exit_code, reasons);
  }
};

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

std::size_t columns(const std::string& line) {
  return static_cast<std::size_t>(
      std::ranges::count_if(line, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

TEST_F(Analyze, AnswersWithAllThatTheFilesKnow) {
  const Outcome outcome = analyze("r.h5 s.h5 --kept k.h5");
  EXPECT_THAT(outcome.output, StartsWith("2 traces of random"));
  for (const char* part : {"Layer error by policy, capacity, best first.",
                           "Layer error: difference from snapkv(window=8), in pairs.",
                           "[ ] and p are of each comparison alone",
                           "p (Holm)",
                           "B/token",
                           "(ORACLE)",
                           "Layer error against capacity",
                           "What a single change does",
                           "temporal smoothing",
                           "temporal: ema → mean",
                           "Regret: layer error in excess of oracle-attention",
                           "Overlap of kept sets",
                           "How far the heads",
                           "Stability",
                           "Span recall beside chance",
                           "Span recall span by span",
                           "1 needle (a.h5), 2 early",
                           "Span recall by where",
                           "Rank agreement",
                           "95 % bootstrap intervals"}) {
    EXPECT_THAT(outcome.output, HasSubstr(part));
  }
  for (const std::string& line : lines_of(outcome.output)) {
    EXPECT_LE(columns(line), 118u) << line;
    EXPECT_FALSE(line.ends_with(' ')) << "'" << line << "'";
  }
  EXPECT_EQ(outcome.errors, "");
}

TEST_F(Analyze, TheSameComparisonHasTheSamePBesideWhatWasSweptAtAnotherCapacity) {
  succeed(
      test::words("sweep a.h5 b.h5 --policy restkv(window=8,alpha={0.05:0.95:0.05}) --policy snapkv(window=8) "
                  "--capacity 20 --evict-at 50,60 -o swept.h5"));
  const auto corrected = [this](const std::string& files) {
    analyze(files + " -c 16,20 --csv p.csv");
    std::string row;
    for (const std::string& line : lines_of(test::read_file(folder_ / "p.csv"))) {
      if (line.starts_with("comparison,recent,snapkv(window=8),layer_error,16,") &&
          line.find(",p corrected,") < line.size()) {
        row = line;
      }
    }
    return row;
  };
  analyze("r.h5 -c 16 --csv p.csv");
  const std::string together = corrected("r.h5 swept.h5");
  EXPECT_NE(together, "");
  EXPECT_THAT(lines_of(test::read_file(folder_ / "p.csv")), Contains(together));
  analyze("r.h5 -c 16 --csv p.csv");
  EXPECT_THAT(lines_of(test::read_file(folder_ / "p.csv")), Contains(together));
}

TEST_F(Analyze, OtherEvaluationQueriesAreNotCompared) {
  succeed(
      test::words("replay a.h5 --policy tova --policy snapkv(window=8) --capacity 16 --evict-at 50 --evaluate-from 50 "
                  "-o from-50.h5"));
  const Outcome outcome = analyze("r.h5 from-50.h5 --trace a");
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("note: a.h5: tova at 16"), HasSubstr("from 50 on"),
                                    HasSubstr("replay with --evaluate-from 60")));
  EXPECT_THAT(outcome.output, Not(HasSubstr("tova")));
  EXPECT_EQ(lines_of(outcome.output).front(), lines_of(analyze("r.h5 --trace a").output).front())
      << "whose queries count in no number";
  refuse_words("r.h5 from-50.h5 -p tova -p recent", 1,
               {"no two policies were evaluated on the same queries", "tova was", "--evaluate-from 60"});
  refuse_words("r.h5 from-50.h5 --baseline tova", 1, {"tova cannot be compared", "--evaluate-from 60"});
}

TEST_F(Analyze, TheFirstLineIsOfWhatMeansAreOver) {
  for (const char* position : {"50", "60"}) {
    succeed(
        test::words(fmt::format("replay a.h5 --policy tova --policy recent --capacity 16 --evict-at {0} "
                                "--evaluate-from {0} -o {0}.h5",
                                position)));
  }
  const auto first_line = [this](const std::string& arguments) { return lines_of(analyze(arguments).output).front(); };
  EXPECT_THAT(first_line("60.h5"), EndsWith("; evicted at 60, 10 evaluation queries"));
  EXPECT_EQ(first_line("50.h5 60.h5"), first_line("60.h5") + "; apart from these also evicted at 50");
  // An eviction at which only some were replayed is left out of means too.
  succeed(
      test::words("replay a.h5 --policy snapkv(window=8) --capacity 16 --evict-at 40 --evaluate-from 60 -o some.h5"));
  EXPECT_EQ(first_line("r.h5 some.h5 --trace a"),
            first_line("r.h5 --trace a") + "; apart from these also evicted at 40");
}

TEST_F(Analyze, EvictionsOfOtherQueriesAreNotAveraged) {
  for (const char* position : {"50", "60"}) {
    succeed(
        test::words(fmt::format("replay a.h5 --policy tova --policy recent --capacity 16 --evict-at {0} "
                                "--evaluate-from {0} -o {0}.h5",
                                position)));
  }
  EXPECT_THAT(analyze("50.h5 60.h5").errors, HasSubstr("evicted at 50, were evaluated on"));
  EXPECT_THAT(analyze("50.h5 60.h5 --by policy,evict-at").errors,
              HasSubstr("compare rows of one eviction position only"));
  refuse_words("50.h5 60.h5 --by policy --evict-at 50,60", 1, {"evaluated on other queries", "--by ...,evict-at"});
}

TEST_F(Analyze, WhatHadNothingToChooseIsMarked) {
  succeed(
      test::words("replay a.h5 --policy snapkv(window={8,16}) --policy recent --policy pyramidkv(window=8) "
                  "--capacity 16,32 -o n.h5"));
  const Outcome outcome = analyze("n.h5");
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("snapkv(window=16) †"), HasSubstr("\n† nothing to choose:")));
  EXPECT_THAT(outcome.errors, HasSubstr("snapkv(window=16) at 16 had nothing to choose"));
  EXPECT_THAT(outcome.output, Not(AllOf(HasSubstr("window: 8 → 16"), HasSubstr("observation window        16"))));
}

TEST_F(Analyze, BeginsWithTheModelsOwnLossWhereItRanOn) {
  std::filesystem::copy_file(folder_ / "r.h5", folder_ / "live.h5");
  const ResultsReader results(folder_ / "r.h5");
  test::edit(folder_ / "live.h5", [&](std::int64_t file) {
    for (std::size_t i = 0; i < results.results().size(); ++i) {
      const std::size_t queries = results.results()[i].evaluation_positions.size();
      const std::vector<float> losses(
          queries, results.results()[i].policy == "recent" ? 0.001F : 0.1F + 0.01F * static_cast<float>(i));
      test::replace_floats(file, fmt::format("/results/{}/kl", i), {static_cast<Index>(queries)}, losses);
    }
  });
  const Outcome outcome = analyze("live.h5 --csv live.csv");
  EXPECT_THAT(outcome.errors, HasSubstr("findings and rankings go by its KL divergence"));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("KL divergence by policy, capacity, best first."),
                                    HasSubstr("worst  layer error"), HasSubstr("recent has the smallest KL divergence"),
                                    HasSubstr("Do offline measures predict what the model loses?")));
  EXPECT_THAT(test::read_file(folder_ / "live.csv"),
              AllOf(HasSubstr("comparison,recent,,kl,16,"), HasSubstr("comparison,recent,,layer_error,16,"),
                    HasSubstr("prediction,,kl,layer_error,,")));
  for (const char* layers : {"--layer 1", "--measure layer_error", "--by policy,layer"}) {
    EXPECT_THAT(analyze(fmt::format("live.h5 {}", layers)).output, HasSubstr("Layer error by policy"));
  }
  EXPECT_THAT(analyze("live.h5 --layer 1 --measure kl").errors,
              HasSubstr("the KL divergence is of the whole model, whatever layers --layer chooses"));
  refuse_words("live.h5 --measure kl --by policy,layer", 2, {"KL divergence is of the whole model", "layer_error"});
  refuse_words("live.h5 --measure kl --by policy,head", 2, {"KL divergence is of the whole model", "head_error"});
  refuse_words("r.h5 --measure kl", 1, {"no result has a KL divergence", "kvreplay live"});
}

TEST_F(Analyze, SectionsAreOnlyOfWhatTheFilesHave) {
  const Outcome outcome = analyze("s.h5 --capacity 16");
  for (const char* part : {"against capacity", "Regret", "Overlap", "Stability", "Rank agreement"}) {
    EXPECT_THAT(outcome.output, Not(HasSubstr(part)));
  }
  EXPECT_THAT(outcome.output, HasSubstr("Layer error by policy, capacity"));
}

TEST_F(Analyze, ByOtherKeysItOnlyCompares) {
  const Outcome outcome = analyze(
      "r.h5 --by policy,trace,layer --capacity 16 --measure head_error --policy recent "
      "--policy snapkv");
  EXPECT_THAT(outcome.output, HasSubstr("Head error by policy, trace, layer, best first"));
  EXPECT_THAT(outcome.output, Not(HasSubstr("Regret")));
  const auto lines = lines_of(outcome.output);
  EXPECT_EQ(std::ranges::count_if(lines, [](const std::string& line) { return line.starts_with("recent"); }), 8)
      << "means and differences of two traces of two layers";
  const Outcome pooled = analyze("r.h5 --by capacity");
  EXPECT_THAT(pooled.output, Not(HasSubstr("wins  "))) << "over all policies there is no difference between them";
  EXPECT_THAT(pooled.errors, HasSubstr("over all policies but full and oracles"));
  EXPECT_THAT(analyze("r.h5 --by policy,head --measure cosine").output, HasSubstr("Cosine by policy, head"));
}

TEST_F(Analyze, ChoosesWhatIsAskedFor) {
  const Outcome outcome =
      analyze("r.h5 --policy snapkv --trace b --evict-at 60 --layer 1 --baseline recent --goal 0.5");
  EXPECT_THAT(outcome.output, StartsWith("1 trace of random"));
  EXPECT_THAT(outcome.output, HasSubstr("evicted at 60"));
  EXPECT_THAT(outcome.output, HasSubstr("difference from recent"));
  EXPECT_THAT(outcome.output, HasSubstr("kept for 0.5"));
  EXPECT_THAT(outcome.output, Not(HasSubstr("restkv")));
}

TEST_F(Analyze, SameInputSameBytesWhateverTheThreads) {
  const std::string arguments = "r.h5 s.h5 --kept k.h5 --seed 3 --csv ";
  const Outcome one = analyze(arguments + "x.csv -t 1");
  const std::string numbers = test::read_file(folder_ / "x.csv");
  const Outcome four = analyze(arguments + "x.csv -t 4");
  EXPECT_EQ(one.output, four.output);
  EXPECT_EQ(test::read_file(folder_ / "x.csv"), numbers);
  EXPECT_NE(analyze("r.h5 s.h5 --kept k.h5 --seed 4 --csv x.csv").output, one.output);
}

TEST_F(Analyze, WritesEveryNumber) {
  analyze("r.h5 s.h5 --kept k.h5 --csv all.csv");
  const auto lines = lines_of(test::read_file(folder_ / "all.csv"));
  EXPECT_EQ(lines.front(),
            "section,policy,other,detail,capacity_request,trace,evict_at,layer,head,quantity,value,low,high");
  for (const char* section : {"comparison,", "capacity,", "step,", "regret,", "overlap,", "overlap of heads,",
                              "stability,", "span recall,", "spans,", "rank agreement,"}) {
    EXPECT_THAT(lines, Contains(StartsWith(section)));
  }
  for (const std::string& line : lines) EXPECT_THAT(line, Not(HasSubstr("nan")));
}

TEST_F(Analyze, TellsHowSureItIsAsAsked) {
  EXPECT_THAT(analyze("r.h5 --confidence 0.8").output, HasSubstr("80 % bootstrap intervals"));
  EXPECT_THAT(analyze("r.h5 --resample traces").output, HasSubstr("traces and"));
  EXPECT_NE(analyze("r.h5 --block 1").output, analyze("r.h5 --block 4").output);
  EXPECT_NE(analyze("r.h5 --resamples 0").output, analyze("r.h5").output);
  EXPECT_THAT(analyze("r.h5 --resamples 0").output, AllOf(HasSubstr("closed form"), Not(HasSubstr("bootstrap"))));
  refuse_words("r.h5 --resamples 1", 2, {"--resamples", "'1'"});
}

TEST_F(Analyze, LongTablesSayWhatIsNotShown) {
  succeed(
      test::words("sweep a.h5 --policy restkv(alpha={0.01:0.8:0.01},window=8) --policy snapkv(window=8) --capacity "
                  "16 -o many.h5"));
  const Outcome outcome = analyze("many.h5");
  EXPECT_THAT(outcome.output, HasSubstr("more rows; --csv has all."));
  EXPECT_THAT(outcome.output, HasSubstr("\nsnapkv(window=8)")) << "the baseline is shown whatever its rank";
}

TEST_F(Analyze, OtherFilesAreCalledWhatTheyAre) {
  refuse_words("k.h5", 1, {"k.h5", "not a file of results, but a file of kept sets"});
  refuse_words("a.h5", 1, {"a.h5", "not a file of results, but a trace"});
  refuse_words("r.h5 --kept r.h5", 1, {"r.h5", "not a file of kept sets, but a file of results"});
  refuse_words("absent.h5", 1, {"absent.h5"});
  refuse_words("", 2, {"no file of results is named", "kvreplay replay"});
  test::write_file(folder_ / "notes.txt", "text");
  refuse_words("notes.txt", 1, {"notes.txt"});
}

TEST_F(Analyze, OldAndUnfinishedFilesAreRefused) {
  std::filesystem::copy_file(folder_ / "r.h5", folder_ / "old.h5");
  test::edit(folder_ / "old.h5", [](std::int64_t file) { test::set_int(file, "/", "format_version", 1); });
  refuse_words("old.h5", 1, {"old.h5", "version 1", "replay again"});
  test::edit(folder_ / "old.h5", [](std::int64_t file) {
    test::set_int(file, "/", "format_version", 3);
    test::set_int(file, "/", "complete", 0);
  });
  refuse_words("old.h5", 1, {"unfinished"});
}

TEST_F(Analyze, ResultsThatCannotBeComparedAreRefused) {
  RandomTrace{.seed = 9}.write(folder_ / "a.h5");  // another capture under the same name
  succeed(test::words("replay a.h5 --policy recent --capacity 16 -o other.h5"));
  refuse_words("r.h5 other.h5", 1, {"r.h5 and other.h5", "a.h5 is not the same capture"});
  succeed(test::words("replay b.h5 --policy snapkv(window=8) --capacity 16 --heads query --evict-at 60 -o query.h5"));
  refuse_words("r.h5 query.h5", 1, {"with heads kv", "with heads query"});
}

TEST_F(Analyze, SelectionsSayWhatThereIs) {
  refuse_words("r.h5 --policy tova", 2, {"no result is of policy tova", "recent"});
  refuse_words("r.h5 --capacity 99", 2, {"capacity 99", "16, 32"});
  refuse_words("r.h5 --trace c", 2, {"trace c", "a.h5, b.h5"});
  std::filesystem::copy_file(folder_ / "b.h5", folder_ / "moved.h5");
  EXPECT_EQ(analyze("r.h5 --trace moved.h5").output, analyze("r.h5 --trace b").output);
  EXPECT_EQ(analyze("r.h5 --trace a moved.h5").output, analyze("r.h5").output);
  refuse_words("r.h5 --evict-at 7", 2, {"eviction position 7", "50, 60"});
  refuse_words("r.h5 --layer 5", 2, {"layer 5", "0, 1"});
  refuse_words("r.h5 --baseline restkvv(window=8)", 2, {"no result is of policy restkvv(window=8)", "Did you mean"});
  refuse_words("r.h5 --measure layer_eror", 2, {"unknown measure 'layer_eror'", "Did you mean 'layer_error'?"});
  refuse_words("r.h5 --by policy,layers", 2, {"Did you mean 'layer'?"});
  refuse_words("r.h5 --by policy,head", 2, {"layer error has no heads"});
  refuse_words("s.h5 --measure spearman", 1, {"--rank-agreement"});
  refuse_words("r.h5 --confidence 1", 2, {"between 0 and 1"});
  refuse_words("r.h5 --resamples -1", 2, {"a number of resamples"});
  refuse_words("r.h5 --resample heads", 2, {"queries or traces"});
  refuse_words("r.h5 --resample traces --trace a", 2, {"needs two traces"});
}

TEST_F(Analyze, NothingIsOverwrittenThatIsRead) {
  refuse_words("r.h5 --csv r.h5", 2, {"would overwrite what is read"});
  refuse_words("r.h5 --csv no/such/x.csv", 1, {"no/such"});
  refuse({"analyze", "r.h5", "--csv", ""}, 2, {"empty"});
}

TEST_F(Analyze, PoliciesOfPlugInsNeedNoPlugIn) {
  test::edit(folder_ / "r.h5", [](std::int64_t file) {
    for (const char* result : {"/results/7", "/results/16", "/results/25", "/results/34"}) {
      test::set_string(file, result, "policy", "from-a-plug-in(strength=3)");
    }
  });
  EXPECT_THAT(analyze("r.h5").output, HasSubstr("from-a-plug-in("));
}

}  // namespace
}  // namespace kvreplay
