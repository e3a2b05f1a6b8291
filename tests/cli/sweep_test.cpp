// Sweeps as a user runs them: grids, configuration files, interruption and resumption, and all that can go wrong.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file_text.h"
#include "cli/sweep_commands.h"
#include "hdf5/hdf5.h"
#include "support/random_trace.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::Interrupted;
using test::RandomTrace;
using test::Sweep;
using testing::AllOf;
using testing::AnyOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

TEST_F(Sweep, GivesTheNumbersThatReplayGives) {
  succeed(
      test::words(std::string("sweep") + kGrid + "-o sweep.h5 --kept sweep-kept.h5 --csv sweep.csv --json sweep.json"));
  succeed(
      test::words("replay a.h5 b.h5 --policy full restkv(alpha=0.3,window=4) restkv(alpha=0.3,window=8) "
                  "restkv(alpha=0.6,window=4) restkv(alpha=0.6,window=8) snapkv(window=4) --capacity 20,50% --evict-at "
                  "40,60 -o replay.h5 --kept replay-kept.h5 --csv replay.csv --json replay.json"));
  const auto sweep = hdf5::File::open(folder_ / "sweep.h5");
  const auto replay = hdf5::File::open(folder_ / "replay.h5");
  ASSERT_EQ(sweep.list("/results"), replay.list("/results"));
  EXPECT_EQ(sweep.list("/results").size(), 4u * 11u);
  for (const std::string& index : replay.list("/results")) {
    const std::string group = "/results/" + index;
    for (const char* text : {"trace", "policy", "capacity_request", "heads", "share", "model"}) {
      EXPECT_EQ(sweep.read_string(group, text), replay.read_string(group, text)) << group << text;
    }
    for (const char* number : {"capacity", "evict_at", "oracle"}) {
      EXPECT_EQ(sweep.read_int(group, number), replay.read_int(group, number)) << group << number;
    }
    EXPECT_EQ(sweep.read_double(group, "kept"), replay.read_double(group, "kept"));
    ASSERT_EQ(sweep.list(group), replay.list(group));
    std::vector<std::string> names = replay.list(group);
    if (std::erase(names, "spans") > 0) names.insert(names.end(), {"spans/start", "spans/end", "spans/label"});
    for (const std::string& name : names) {
      const std::string path = group + "/" + name;
      EXPECT_EQ(sweep.dataset(path).shape(), replay.dataset(path).shape()) << path;
      EXPECT_EQ(sweep.dataset(path).compute_xxh64(), replay.dataset(path).compute_xxh64()) << path;
    }
  }
  EXPECT_TRUE(sweep.list("/overlap").empty()) << "sweeps hold none";
  EXPECT_TRUE(bytes("sweep-kept.h5") == bytes("replay-kept.h5"));
  EXPECT_EQ(bytes("sweep.csv"), bytes("replay.csv"));
  json with_overlap = json::parse(bytes("replay.json"));
  with_overlap.erase("overlap");
  EXPECT_EQ(json::parse(bytes("sweep.json")), with_overlap);
  EXPECT_FALSE(there("sweep.h5.units"));
}

TEST_F(Sweep, TakesNamesOfAnyLengthThatFilesHave) {
  const std::string name = std::string(250, 'n') + ".h5";
  const std::string other = std::string(249, 'n') + "m.h5";
  for (const std::string& output : {name, other}) {
    succeed(test::words("sweep a.h5 --policy recent --capacity 16 -o " + output));
    EXPECT_TRUE(there(output));
  }
  EXPECT_THAT(succeed(test::words("inspect a.h5")).output, HasSubstr("a.h5: kvtrace"));
}

TEST_F(Sweep, MeasuresRankAgreementAsReplayDoes) {
  const std::string grid = std::string(kGrid) + "--heads query --rank-agreement ";
  const test::Outcome outcome = succeed(test::words("sweep" + grid + "-o sweep.h5 --csv sweep.csv --memory 64M"));
  succeed(test::words("replay" + grid + "-o replay.h5 --csv replay.csv"));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("Spearman"), HasSubstr("Kendall")));
  EXPECT_EQ(bytes("sweep.csv"), bytes("replay.csv"));
  EXPECT_THAT(bytes("sweep.csv"), HasSubstr(",kendall,"));
  const auto sweep = hdf5::File::open(folder_ / "sweep.h5");
  const auto replay = hdf5::File::open(folder_ / "replay.h5");
  std::size_t measured = 0;
  for (const std::string& index : replay.list("/results")) {
    const std::string group = "/results/" + index;
    ASSERT_EQ(sweep.list(group), replay.list(group));
    const bool ranks = replay.read_string(group, "policy") != "full";
    for (const char* measure : {"/spearman", "/kendall"}) {
      ASSERT_EQ(sweep.exists(group + measure), ranks);
      if (!ranks) continue;
      ++measured;
      EXPECT_EQ(sweep.read_floats(group + measure), replay.read_floats(group + measure));
    }
  }
  EXPECT_EQ(measured, 2u * 40u);
}

TEST_F(Sweep, RankAgreementStandsInConfigurationsAndIsPartOfASweep) {
  const std::string sweep = std::string("sweep") + kGrid + "-o sweep.h5 ";
  const test::Outcome printed = succeed(test::words(sweep + "--rank-agreement --print-config"));
  EXPECT_THAT(printed.output, HasSubstr("rank-agreement = "));
  test::write_file(folder_ / "sweep.toml", printed.output);
  EXPECT_EQ(succeed(test::words("sweep --config sweep.toml --print-config")).output, printed.output);
  succeed(test::words("sweep --config sweep.toml"));
  EXPECT_TRUE(hdf5::File::open(folder_ / "sweep.h5").exists("/results/1/spearman"));
  test::write_file(folder_ / "sweep.toml", "rank-agreement = true\n");
  succeed(test::words(sweep + "--config sweep.toml"));
  EXPECT_TRUE(hdf5::File::open(folder_ / "sweep.h5").exists("/results/1/spearman"));
  test::write_file(folder_ / "sweep.toml", "rank-agreement = false\n");
  succeed(test::words(sweep + "--config sweep.toml"));
  EXPECT_FALSE(hdf5::File::open(folder_ / "sweep.h5").exists("/results/1/spearman"));
}

TEST_F(Sweep, EvaluatesWhereItIsToldAndThatIsPartOfASweep) {
  const std::string sweep = "sweep a.h5 --policy recent --capacity 20 --evict-at 40,50 -o sweep.h5 ";
  const auto first_positions = [this]() {
    std::vector<int> positions;
    const auto file = hdf5::File::open(folder_ / "sweep.h5");
    for (const char* result : {"0", "1"}) {
      positions.push_back(file.read_int32s(fmt::format("/results/{}/evaluation_positions", result)).front());
    }
    return positions;
  };
  succeed(test::words(sweep));
  EXPECT_THAT(first_positions(), ElementsAre(50, 50));
  const test::Outcome printed = succeed(test::words(sweep + "--evaluate-from prompt --print-config"));
  EXPECT_THAT(printed.output, HasSubstr("evaluate-from = \"prompt\""));
  test::write_file(folder_ / "sweep.toml", printed.output);
  succeed(test::words("sweep --config sweep.toml"));
  EXPECT_THAT(first_positions(), ElementsAre(60, 60));
  test::write_file(folder_ / "sweep.toml", "evaluate-from = 1\n");
  EXPECT_THAT(succeed(test::words(sweep + "--config sweep.toml")).errors,
              HasSubstr("are evaluated on different queries"));
  EXPECT_THAT(first_positions(), ElementsAre(40, 50));
}

TEST_F(Sweep, ImpossibleAndDegenerateSettingsDoNotEndOrDecideIt) {
  const std::string sweep = "sweep a.h5 b.h5 --policy snapkv(window={8,16,32}) h2o(window=40) --capacity 16,32 ";
  const std::string left_out =
      "note: a.h5 and 1 more trace: left out: snapkv at 16; h2o(window=40) at 16, 32: the capacity is below the "
      "positions that they always keep; ask for a larger capacity or protect fewer\n";
  const test::Outcome planned = succeed(test::words(sweep + "--dry-run"));
  EXPECT_THAT(planned.errors, AllOf(HasSubstr("sweep: 10 settings: "), HasSubstr(left_out)));
  const test::Outcome outcome = succeed(test::words(sweep + "-o sweep.h5"));
  EXPECT_THAT(
      outcome.errors,
      AllOf(HasSubstr(left_out), HasSubstr("note: a.h5 and 1 more trace: nothing to choose: snapkv(window=16) at 16; "
                                           "snapkv at 32: ")));
  // At 16 there are two windows, of which one is recent positions alone, and at 32 such a third.
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("snapkv: window"), HasSubstr("16"), Not(HasSubstr("not balanced"))));
  const auto file = hdf5::File::open(folder_ / "sweep.h5");
  ASSERT_EQ(file.list("/results").size(), 10u);
  EXPECT_EQ(file.read_string("/results/2", "policy"), "snapkv(window=16)");
  EXPECT_EQ(file.read_int("/results/2", "nothing_to_choose"), 1);
  EXPECT_EQ(file.read_int("/results/3", "nothing_to_choose"), 0);
  refuse_words(sweep + "--strict -o strict.h5", 1, {"a.h5: capacity 16 is below the 32 positions that snapkv always"});
  refuse_words("sweep a.h5 b.h5 --policy snapkv h2o(window=40) --capacity 16 -o none.h5", 1,
               {"a.h5: capacity 16 is below the 32 positions that snapkv always"});
}

TEST_F(Sweep, SaysWhereACacheFrozeAsAReplayDoes) {
  const std::string policies = " a.h5 --policy knorm+protect(first=16)+every knorm+every --capacity 16 ";
  const std::string note =
      "note: a.h5: frozen on the prompt: knorm+protect(first=16)+every at 16: no position of the prompt ever went";
  EXPECT_THAT(succeed(test::words("replay" + policies)).errors, HasSubstr(note));
  EXPECT_THAT(succeed(test::words("sweep" + policies + "-o sweep.h5 --json sweep.json")).errors, HasSubstr(note));
  EXPECT_THAT(file_text(folder_ / "sweep.json"), HasSubstr("frozen on the prompt"));
  EXPECT_THAT(hdf5::File::open(folder_ / "sweep.h5").read_strings("/results/0/notes"),
              Contains(HasSubstr("frozen on the prompt: knorm+protect(first=16)+every at 16")));
}

TEST_F(Sweep, SaysWhatEachParameterChanges) {
  const test::Outcome outcome = succeed(test::words(std::string("sweep") + kGrid + "-o sweep.h5"));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("2 traces of"), HasSubstr("restkv: alpha"), HasSubstr("restkv: window"),
                                    HasSubstr("best"), HasSubstr("wrote sweep.h5"), Not(HasSubstr("snapkv: "))));
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("44 settings: 6 policies, 2 capacities, 2 eviction positions, 2 traces"),
                                    HasSubstr("10 units"), HasSubstr("of memory"), Not(HasSubstr("\r"))))
      << "no progress where standard error is no terminal";
}

TEST_F(Sweep, ManySettingsAreShownInPart) {
  const test::Outcome outcome =
      succeed(test::words("sweep b.h5 --policy random(seed={1:45}) recent --capacity 20 -o sweep.h5"));
  EXPECT_THAT(outcome.output,
              AllOf(HasSubstr("Not shown: 35 settings"), HasSubstr("all are in sweep.h5"), HasSubstr("\nrecent ")));
}

TEST_F(Sweep, ShowsProgressOnATerminal) {
  RandomTrace{.num_layers = 6, .head_dim = 64, .prompt_length = 900, .num_tokens = 1000}.write(folder_ / "long.h5");
  const test::Outcome outcome =
      run({.arguments =
               test::words("sweep long.h5 --policy restkv(window={8,16,32,64}) h2o --capacity 100,200 -o s.h5 -t 1"),
           .terminal = true});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("settings 10, layers "), HasSubstr("/6"), HasSubstr("GFLOP/s")));
}

TEST_F(Sweep, DryRunSaysHowMuchThereIsAndWritesNothing) {
  const auto before = files();
  const test::Outcome outcome = succeed(test::words(std::string("sweep") + kGrid + "--dry-run --memory 2G"));
  EXPECT_EQ(outcome.output, "");
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("44 settings"), HasSubstr("10 units"), HasSubstr("about ")));
  EXPECT_EQ(files(), before);
  EXPECT_EQ(succeed(test::words(std::string("sweep") + kGrid + "--dry-run -o sweep.h5")).output, "");
  EXPECT_EQ(files(), before);
}

TEST_F(Sweep, PrintedConfigurationDoesTheSame) {
  const std::string options = "--heads query --share max --csv one.csv --memory 1G --threads 2 -o one.h5";
  const test::Outcome printed = succeed(test::words(std::string("sweep") + kGrid + options + " --print-config"));
  EXPECT_EQ(printed.errors, "");
  EXPECT_FALSE(there("one.h5"));
  test::write_file(folder_ / "sweep.toml", printed.output);
  EXPECT_EQ(succeed(test::words("sweep --config sweep.toml --print-config")).output, printed.output);
  succeed(test::words("sweep --config sweep.toml"));
  const std::string from_file = bytes("one.h5");
  std::filesystem::remove(folder_ / "one.h5");
  succeed(test::words(std::string("sweep") + kGrid + options));
  EXPECT_TRUE(bytes("one.h5") == from_file);
}

TEST_F(Sweep, TheCommandLineWinsOverTheConfiguration) {
  test::write_file(folder_ / "sweep.toml", R"(
# what the group agreed on
traces = ["a.h5", "b.h5"]
policy = 'snapkv(window={4,8})'
capacity = [20, "50%"]
evict-at = 60
heads = "query"
output = "file.h5"
)");
  succeed(test::words("sweep --config sweep.toml b.h5 --capacity 30 -o line.h5"));
  EXPECT_FALSE(there("file.h5"));
  const auto file = hdf5::File::open(folder_ / "line.h5");
  ASSERT_THAT(file.list("/results"), ElementsAre("0", "1"));
  EXPECT_EQ(file.read_string("/results/1", "trace"), "b.h5");
  EXPECT_EQ(file.read_string("/results/1", "policy"), "snapkv(window=8)");
  EXPECT_EQ(file.read_int("/results/1", "capacity"), 30);
  EXPECT_EQ(file.read_string("/results/1", "heads"), "query");
}

TEST_F(Sweep, WrongConfigurationsAreNamedWithTheirLine) {
  const auto refuse_file = [&](const std::string& text, const std::string& reason) {
    test::write_file(folder_ / "sweep.toml", text);
    refuse_words("sweep --config sweep.toml", 2, {reason});
  };
  refuse_file("traces = 'a.h5'\npolcy = 'full'", "sweep.toml: line 2: unknown option 'polcy'. Did you mean 'policy'?");
  refuse_file("resume = true", "line 1: unknown option 'resume'");
  refuse_file("heads = 'all'", "line 1: --heads: must be query, kv or layer");
  refuse_file("heads = ['kv', 'query']", "line 1: --heads");
  refuse_file("evict-at = ['x']", "line 1: --evict-at");
  refuse_file("memory = 'much'", "line 1: --memory");
  refuse_file("threads = 0", "line 1: --threads");
  refuse_file("rank-agreement = 'maybe'", "line 1: ");
  refuse_file("policy 'full'", "line 1: Error while parsing key-value pair: expected '='");
  refuse_file("traces = 'a.h5'\npolicy = full", "line 2: Error while parsing boolean");
  refuse_file("capacity = 25%", "; text goes in quotes");
  refuse_file("[policy]\nname = 'full'", "line 1: 'policy' is a table");
  refuse_file("policy = 'full'\ncapacity = 9\noutput = 'x.h5'", "a trace is required");
  refuse_words("sweep --config nowhere.toml", 2, {"nowhere.toml: cannot be read"});
  refuse_words("sweep --config .", 2, {".: is a folder, not a file"});
}

TEST_F(Sweep, WrongOptionsAreNamed) {
  refuse_words("sweep", 2, {"a trace is required"});
  refuse_words("sweep a.h5 --capacity 20 -o s.h5", 2,
               {"--policy is required, on the command line or in a --config file"});
  refuse_words("sweep a.h5 --policy full -o s.h5", 2, {"--capacity is required"});
  refuse_words("sweep a.h5 --policy full --capacity 20", 2, {"--output is required"});
  for (const std::string memory : {"much", "0", "-1G", "1X", "1GB", "", "nan"}) {
    refuse({"sweep", "a.h5", "--policy", "full", "--capacity", "20", "-o", "s.h5", "--memory", memory}, 2,
           {"--memory: '" + memory + "' is not an amount of memory"});
  }
  refuse_words("sweep a.h5 --policy snapkv(window={}) --capacity 20 -o s.h5", 2, {"braces with nothing in them"});
  refuse_words("sweep a.h5 --policy snapkv(windw={4,8}) --capacity 20 -o s.h5", 2, {"Did you mean 'window'?"});
  refuse_words("sweep a.h5 --policy random(seed={1:60000}) --capacity 20,30 -o s.h5", 2, {"more than 100000 settings"});
  refuse_words("sweep a.h5 --policy full --capacity 20 -o a.h5", 2, {"would overwrite"});
  refuse_words("sweep a.h5 --policy snapkv --capacity 20 -o s.h5", 1, {"below the 32 positions"});
  refuse_words("sweep c.h5 --policy full --capacity 20 -o s.h5 --resume", 1, {"c.h5: cannot be opened"});
}

TEST_F(Sweep, BracesStandForManyInAReplayToo) {
  const test::Outcome outcome =
      succeed(test::words("replay a.h5 --policy snapkv(window={4,8}) snapkv(window=8) --capacity 20 -o results.h5"));
  EXPECT_EQ(hdf5::File::open(folder_ / "results.h5").list("/results").size(), 2u);
  EXPECT_EQ(outcome.errors, "note: policy snapkv(window=8) is given more than once and replayed once\n");
}

TEST_F(Interrupted, KilledAtAnyMomentItGoesOnToTheSameBytes) {
  int killed = 0;
  for (const std::string moment :
       {"sweep.toml.tmp-", "sweep.toml", "unit-0-0.h5", "unit-1-0.h5", "unit-1-3.h5", "unit-1-5.h5", "s.h5.tmp-"}) {
    SCOPED_TRACE(moment);
    std::filesystem::remove_all(folder_ / "s.h5.units");
    std::filesystem::remove(folder_ / "s.h5");
    for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
      if (entry.path().filename().string().starts_with("s.h5.tmp-")) std::filesystem::remove(entry.path());
    }
    if (kill_when(moment, SIGKILL)) {
      ++killed;
      if (there("s.h5")) {
        EXPECT_TRUE(bytes("s.h5") == whole_);
      } else {
        // The first that stands under the output's temporary name is a probe, before there is a folder.
        EXPECT_TRUE(moment == "s.h5.tmp-" || there("s.h5.units"));
      }
    }
    succeed(test::words(command_ + "s.h5 --resume"));
    EXPECT_TRUE(bytes("s.h5") == whole_);
    EXPECT_FALSE(there("s.h5.units"));
  }
  EXPECT_GT(killed, 2);
}

TEST_F(Interrupted, KeepsWhatIsFinishedAndSaysHowToGoOn) {
  ASSERT_TRUE(kill_when("unit-1-1.h5", SIGINT, "s.h5"));
  EXPECT_THAT(last_.errors,
              AllOf(HasSubstr("kvreplay: interrupted; "), HasSubstr(" of 9 units are finished and kept in "),
                    HasSubstr("s.h5.units; go on with --resume\n")));
  refuse_words(command_ + "s.h5", 1, {"s.h5.units: holds ", "--resume"});
  refuse_words(command_ + "s.h5 --resume --capacity 60", 1, {"--capacity was 50, 100, is 50, 100, 60"});
  refuse_words(command_ + "s.h5 --resume --evaluate-from 62", 1, {"--evaluate-from was not given, is 62"});
  refuse_words(command_ + "s.h5 --resume --heads query", 1, {"--heads was not given, is query"});
  const test::Outcome resumed = succeed(test::words(command_ + "s.h5 --resume --threads 1"));
  EXPECT_THAT(resumed.errors, HasSubstr(" finished already"));
  EXPECT_TRUE(bytes("s.h5") == whole_);
}

TEST_F(Interrupted, DamagedUnitsAreDoneAgainWithANote) {
  ASSERT_TRUE(kill_when("unit-1-1.h5", SIGKILL, "s.h5"));
  std::string unit;
  for (const auto& entry : std::filesystem::directory_iterator(folder_ / "s.h5.units")) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("unit-") && name.ends_with(".h5")) unit = name;
  }
  ASSERT_FALSE(unit.empty());
  std::filesystem::resize_file(folder_ / "s.h5.units" / unit, 600);
  EXPECT_THAT(succeed(test::words(command_ + "s.h5 --resume")).errors,
              AllOf(HasSubstr("note: s.h5.units/" + unit), HasSubstr("done again")));
  EXPECT_TRUE(bytes("s.h5") == whole_);
}

TEST_F(Interrupted, AFullDiskLosesNothing) {
  const test::Outcome outcome =
      run({.arguments = test::words(command_ + "s.h5"), .largest_file = std::uint64_t{whole_.size() / 2}});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("s.h5"), HasSubstr("go on with --resume")));
  EXPECT_FALSE(there("s.h5"));
  succeed(test::words(command_ + "s.h5 --resume"));
  EXPECT_TRUE(bytes("s.h5") == whole_);
}

TEST_F(Interrupted, ResumingNothingBegins) {
  succeed(test::words(command_ + "s.h5 --resume"));
  EXPECT_TRUE(bytes("s.h5") == whole_);
}

}  // namespace
}  // namespace kvreplay
