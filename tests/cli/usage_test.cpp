// How the command line explains itself, and what it says to those who mistype.
#include <gmock/gmock.h>

#include <sstream>

#include "base/file_text.h"
#include "cli/command.h"
#include "policy/policy.h"
#include "support/places.h"
#include "support/random_trace.h"

namespace kvreplay {
namespace {

using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class Usage : public test::Commands {
 protected:
  Usage() { test::RandomTrace{}.write(folder_ / "run.h5"); }

  void refuse_words(const std::string& arguments, const std::vector<std::string>& reasons) const {
    refuse(test::words(arguments), 2, reasons);
  }
};

TEST_F(Usage, HelpOfEveryCommandNamesItsOptions) {
  const struct {
    std::string command;
    std::vector<std::string> names;
  } commands[] = {
      {"capture",
       {"--model", "--prompt", "--tokens", "--generate", "--queries", "--dtype", "--no-projection", "--spans",
        "--threads", "--output", "run.h5"}},
      {"synth",
       {"--tokens", "--prompt-tokens", "--generate", "--layers", "--heads", "--kv-heads", "--head-dim", "--hidden",
        "--queries", "--dtype", "--no-projection", "--attention-mass", "--seed", "--threads", "--output",
        "synthetic.h5"}},
      {"inspect", {"--json", "--verify", "--threads"}},
      {"replay",
       {"--policy", "--capacity", "--evict-at", "--evaluate-from", "N|prompt", "--heads", "query|kv|layer", "--share",
        "mean|max|sum", "--output", "--csv", "--json", "--kept", "--threads", "traces"}},
      {"sweep",
       {"--policy", "--capacity", "--output", "--memory", "--config", "--print-config", "--dry-run", "--resume"}},
      {"policies", {"SPEC", "--markdown"}},
  };
  const test::Outcome all = succeed({"--help"});
  for (const auto& [command, names] : commands) {
    EXPECT_THAT(all.output, HasSubstr(command));
    const test::Outcome help = succeed({command, "--help"});
    EXPECT_EQ(help.errors, "");
    EXPECT_THAT(help.output, HasSubstr("Usage: kvreplay " + command));
    for (const std::string& name : names) EXPECT_THAT(help.output, HasSubstr(name)) << command;
  }
  EXPECT_THAT(all.output, HasSubstr("0 fine, 1 failed, 2 wrong usage"));
}

TEST_F(Usage, VersionIsOneLine) { EXPECT_THAT(succeed({"--version"}).output, StartsWith("kvreplay ")); }

TEST_F(Usage, UnknownCommandsAndOptionsAreNamedWithTheNearest) {
  refuse_words("", {"name a command: capture, synth, inspect, replay"});
  refuse_words("replai run.h5", {"unknown command 'replai'. Did you mean 'replay'?"});
  refuse_words("frobnicate", {"unknown command 'frobnicate'", "capture", "inspect", "replay", "policies"});
  refuse_words("--versoin", {"unknown option --versoin. Did you mean '--version'?"});
  refuse_words("replay run.h5 --policy full --capacity 8 --head kv",
               {"unknown option --head. Did you mean '--heads'?"});
  refuse_words("capture --model m --tokens t --generat 3", {"unknown option --generat. Did you mean '--generate'?"});
  refuse_words("inspect run.h5 --verfy", {"Did you mean '--verify'?", "See 'kvreplay inspect --help'"});
  refuse_words("inspect run.h5 other.h5", {"unexpected 'other.h5'"});
}

TEST_F(Usage, WhatIsMissingIsNamed) {
  refuse_words("capture", {"--model is required"});
  refuse_words("inspect", {"trace is required"});
  refuse_words("replay run.h5", {"--policy is required"});
  refuse_words("replay run.h5 --policy full", {"--capacity is required"});
  refuse_words("replay --policy full --capacity 8", {"no trace is named: kvreplay replay run.h5 --policy"});
}

TEST_F(Usage, TracesAndPoliciesThatChangedPlacesAreTold) {
  refuse_words("replay run.h5 --policy run.h5 full --capacity 8", {"run.h5 is a file, not a policy"});
  test::write_file(folder_ / "run", "");
  refuse_words("replay run.h5 --policy full run --capacity 8", {"run is a file, not a policy"});
  EXPECT_THAT(succeed(test::words("replay --capacity 8 run.h5 --policy recent")).output, HasSubstr("recent"));
  const std::string two = succeed(test::words("replay run.h5 --policy recent random --capacity 8,16")).output;
  EXPECT_THAT(two, AllOf(HasSubstr("recent"), HasSubstr("random")));
}

TEST_F(Usage, ListsMeanTheSameHoweverTheyAreWritten) {
  test::RandomTrace{.seed = 2}.write(folder_ / "2.h5");
  const auto csv = [this](const std::string& arguments) {
    succeed(test::words("replay --csv results.csv " + arguments));
    return test::read_file(folder_ / "results.csv");
  };
  const std::string expected = csv("run.h5 2.h5 -p recent -p random(seed=1) -c 8 -c 25% --evict-at 30 --evict-at 50");
  for (const char* arguments : {
           "run.h5 2.h5 --policy recent random(seed=1) --capacity 8 25% --evict-at 30 50",
           "run.h5 2.h5 -p recent,random(seed=1) -c 8,25% --evict-at 30,50",
           "-p recent random(seed=1) run.h5 2.h5 -c 8 25% --evict-at 30 50",
           "--evict-at 30 50 run.h5 -c 8 25% 2.h5 -p recent random(seed=1)",
           "--policy=recent random(seed=1) run.h5 ./2.h5 --capacity=8, 25% --evict-at=30 50",
           "-c8 25% run.h5 -p {recent,random(seed=1)} --evict-at 30,50 2.h5",
       }) {
    std::string found = csv(arguments);
    for (std::size_t at = found.find("./2.h5"); at != std::string::npos; at = found.find("./2.h5")) found.erase(at, 2);
    EXPECT_EQ(found, expected) << arguments;
  }
  // A file that is missing is missed as a trace.
  refuse(test::words("replay -p recent run.h5 -c 8 missing.h5"), 1, {"missing.h5: cannot be opened"});
  // And in a sweep, and where results are chosen.
  succeed(test::words("sweep -p recent random(seed=1) run.h5 -c 8 25% --evict-at 30 50 2.h5 -o s.h5 --csv s.csv"));
  EXPECT_EQ(test::read_file(folder_ / "s.csv"), expected);
  const std::string chosen =
      succeed(test::words("analyze s.h5 -p recent -p random -c 8 -c 25% --by policy,layer")).output;
  for (const char* arguments :
       {"-p recent random s.h5 -c 8 25%", "-p recent,random -c 8,25% s.h5", "-c 8 25% s.h5 -p recent random",
        "s.h5 -p recent random(seed={1}) -c 8 25% --layer 0 1"}) {
    EXPECT_EQ(succeed(test::words(std::string("analyze --by policy,layer ") + arguments)).output, chosen) << arguments;
  }
}

TEST_F(Usage, AFileOfAnotherKindIsSaidToBeWhatItIs) {
  succeed(test::words("replay run.h5 -p recent -c 8 -o results.h5 --kept kept.h5"));
  for (const std::string command :
       {"replay results.h5 -p recent -c 8", "sweep results.h5 -p recent -c 8 -o s.h5", "inspect results.h5"}) {
    refuse(test::words(command), 1,
           {"results.h5: /: is not a kvtrace file, but a file of results, as --output writes it", "kvreplay analyze"});
  }
  refuse(test::words("inspect kept.h5"), 1, {"kept.h5: /: is not a kvtrace file, but a file of kept sets"});
  refuse(test::words("analyze run.h5"), 1, {"run.h5: /: is not a file of results, but a trace"});
}

TEST_F(Usage, ValuesThatCannotBeAreNamed) {
  const std::string replay = "replay run.h5 --policy recent ";
  refuse_words(replay + "--capacity 0", {"capacity 0 keeps nothing"});
  for (const char* capacity : {"-3", "1e1", "12.5", "0.0%", "101%", "many", "99999999999", "25%%"}) {
    refuse_words(replay + "--capacity " + capacity, {std::string("capacity '") + capacity + "' is neither a count"});
  }
  refuse_words(replay + "--capacity 8 --evict-at 0", {"--evict-at: '0' is not a position to evict at"});
  refuse_words(replay + "--capacity 8 --evict-at 1x", {"--evict-at: '1x'"});
  refuse_words(replay + "--capacity 8 --heads querry", {"must be query, kv or layer", "Did you mean 'query'?"});
  refuse_words(replay + "--capacity 8 --share average", {"must be mean, max or sum"});
  refuse_words(replay + "--capacity 8 --threads 0", {"'0' is not a number of threads"});
  refuse({"replay", "run.h5", "--policy", "recent", "--capacity", "8", "--output", ""}, 2,
         {"--output: the file's name is empty"});
}

TEST_F(Usage, UnknownPoliciesAndParametersSuggestTheNearest) {
  const auto with = [](const std::string& policy) { return "replay run.h5 --capacity 40 --policy " + policy; };
  refuse_words(with("snapvk"), {"unknown policy 'snapvk'. Did you mean 'snapkv'?", "restkv", "--plugin"});
  refuse_words(with("snapkv(windw=8)"), {"snapkv has no parameter 'windw'. Did you mean 'window'?", "kernel"});
  refuse_words(with("snapkv(window=0)"), {"parameter 'window' is integer >= 1, not '0'"});
  refuse_words(with("snapkv(window=8"), {"expected ',' or ')'"});
  refuse_words(with("snapkv+piramid"), {"Did you mean 'pyramid'?"});
  refuse_words(with("pyramid"), {"write it after one, as in snapkv+pyramid"});
  refuse_words("policies snapvk", {"Did you mean 'snapkv'?"});
  refuse_words("policies +chunks(size=5)", {"write it after one, as in snapkv+chunks(size=5)"});
  refuse({"replay", "run.h5", "--capacity", "8", "--policy", ""}, 2, {"expected a name"});
  refuse({"replay", "run.h5", "--capacity", "8", "--policy", std::string(5000, 'x')}, 2, {"unknown policy 'xxx"});
}

TEST_F(Usage, PoliciesAreListedAndExplained) {
  const std::string list = succeed({"policies"}).output;
  for (const char* name : {"full", "h2o", "recent", "restkv(", "snapkv(", "streamingllm(", "tova(", "+pyramid("}) {
    EXPECT_THAT(list, HasSubstr(name));
  }
  EXPECT_THAT(succeed({"policies", "snapkv"}).output,
              AllOf(HasSubstr("window"), HasSubstr("32"), HasSubstr("2404.14469")));
  const std::string spec = succeed({"policies", "restkv( alpha = 0.50 , window=32 ) + pyramid"}).output;
  EXPECT_THAT(spec, AllOf(HasSubstr("canonical: restkv(alpha=0.5)+pyramid"), HasSubstr("smallest capacity 32")));
}

// Lines end anywhere in what is told.
std::string on_one_line(const std::string& text) {
  std::istringstream words(text);
  std::string line;
  for (std::string word; words >> word;) line += (line.empty() ? "" : " ") + word;
  return line;
}

TEST_F(Usage, VariantsTellWhichStateOfTheirCodeTheyDescribe) {
  int variants = 0;
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) continue;
    ++variants;
    const std::string told = "source: " + method->source + "; as of " + method->revision;
    EXPECT_THAT(on_one_line(succeed({"variants", method->variant_of}).output), HasSubstr(told)) << method->name;
    EXPECT_THAT(on_one_line(succeed({"policies", method->name}).output), HasSubstr(told)) << method->name;
  }
  EXPECT_GE(variants, 10);
  const std::string h2o = on_one_line(succeed({"variants", "h2o"}).output);
  EXPECT_THAT(h2o, AllOf(HasSubstr("commit c97f9d7 (2026-07-02)"), HasSubstr("the last one before 9f9aa2e"),
                         HasSubstr("release 0.5.5")));
  EXPECT_THAT(on_one_line(succeed({"policies", "h2o@h2o-mask"}).output),
              HasSubstr("hidden rows stay and may return, and memory does not fall"));
  for (const char* name : {"snapkv@kvpress", "tova@kvpress", "pyramidkv@kvpress", "criticalkv@kvpress"}) {
    EXPECT_THAT(on_one_line(succeed({"policies", name}).output), HasSubstr("as on kvpress's eager path. Under sdpa"));
  }
}

TEST_F(Usage, ThePageOfPoliciesIsWhatTheProgramPrints) {
  const std::string page = file_text(test::project_folder() / "docs/policies.md");
  EXPECT_TRUE(page == succeed({"policies", "--markdown"}).output)
      << "docs/policies.md is out of date; run: " << test::kvreplay_executable().string()
      << " policies --markdown > docs/policies.md";
  refuse_words("policies snapkv --markdown", {"spec excludes --markdown"});
}

TEST_F(Usage, LongSpecsDoNotStretchTheTable) {
  const std::string spec = "restkv(window=4,alpha=0.5,beta=100,kernel=7,temporal=mean)+adakv(floor=0.5)+chunks(size=5)";
  const std::string output = succeed({"replay", "run.h5", "--policy", spec, "--capacity", "20"}).output;
  std::string joined;
  for (std::size_t at = 0; at < output.size();) {
    const std::size_t end = output.find('\n', at);
    const std::string line = output.substr(at, end - at);
    const auto width =
        std::ranges::count_if(line, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
    EXPECT_LE(width, 115) << line;
    const std::size_t first = line.find_first_not_of(' ');
    if (first != std::string::npos) joined += line.substr(first, line.find(' ', first) - first);
    at = end + 1;
  }
  EXPECT_THAT(joined, HasSubstr(spec)) << output;
}

}  // namespace
}  // namespace kvreplay
