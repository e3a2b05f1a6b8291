// What shells offer, what the manual page says, and that both follow the command line's own description.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cstdlib>
#include <regex>
#include <set>
#include <sstream>

#include "cli/command.h"
#include "support/places.h"

namespace kvreplay {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsSupersetOf;
using testing::Not;
using testing::StartsWith;

class Completion : public test::Commands {
 protected:
  // The candidates for the last of these words.
  std::vector<std::string> offered(const std::vector<std::string>& words) const {
    std::vector<std::string> arguments = {"complete", "--"};
    arguments.insert(arguments.end(), words.begin(), words.end());
    std::istringstream lines(succeed(arguments).output);
    std::vector<std::string> found;
    for (std::string line; std::getline(lines, line);) found.push_back(line.substr(0, line.find('\t')));
    return found;
  }

  // Every long option that a command's help names.
  std::set<std::string> options_in_help(const std::string& command) const {
    const std::string help = succeed({command, "--help"}).output;
    const std::regex option("(^|[ ,])(--[a-z][a-z-]+)");
    std::set<std::string> found;
    std::istringstream lines(help);
    for (std::string line; std::getline(lines, line);) {
      std::smatch match;
      if (line.starts_with("  -") && std::regex_search(line, match, option)) found.insert(match[2]);
    }
    return found;
  }

  std::vector<std::string> commands() const { return offered({""}); }
};

TEST_F(Completion, OffersCommandsAndTheirOptions) {
  EXPECT_THAT(commands(),
              AllOf(IsSupersetOf({"capture", "replay", "sweep", "analyze", "policies"}), Not(Contains("complete"))));
  for (const std::string& command : commands()) {
    SCOPED_TRACE(command);
    const std::set<std::string> options = options_in_help(command);
    EXPECT_THAT(options, Contains("--help"));
    EXPECT_THAT(offered({command, "--"}), IsSupersetOf(options));
  }
  EXPECT_THAT(offered({"replay", "-"}), IsSupersetOf({"-p", "--policy", "-c", "--capacity"}));
}

TEST_F(Completion, OffersWhatAnOptionTakes) {
  EXPECT_THAT(offered({"replay", "a.h5", "--policy", ""}), IsSupersetOf({"full", "snapkv", "restkv", "h2o@kvpress"}));
  EXPECT_THAT(offered({"replay", "a.h5", "-p", "snapkv", "res"}), Contains("restkv")) << "it takes several";
  EXPECT_THAT(offered({"sweep", "-p", "restkv(alpha=0.5)+"}),
              AllOf(Contains("restkv(alpha=0.5)+pyramid"), Each(StartsWith("restkv(alpha=0.5)+"))));
  EXPECT_THAT(offered({"sweep", "-p", "snapkv,res"}), Contains("snapkv,restkv")) << "of several the last is typed";
  EXPECT_THAT(offered({"analyze", "--trace", ""}), ElementsAre(":files"));
  EXPECT_THAT(offered({"analyze", "--measure", ""}), IsSupersetOf({"layer_error", "span_recall"}));
  EXPECT_THAT(offered({"analyze", "--by", "policy,"}), Contains("policy,layer"));
  EXPECT_THAT(offered({"report", "--only", "regret", "er"}), Contains("error-by-head"));
  EXPECT_THAT(offered({"sweep", "-p", "criticalkv(base="}), IsEmpty()) << "between parentheses nobody can know";
  EXPECT_THAT(offered({"replay", "--heads", ""}), ElementsAre("query", "kv", "layer"));
  EXPECT_THAT(offered({"replay", "--heads=k"}), Contains("--heads=kv"));
  EXPECT_THAT(offered({"replay", "--heads", "=", "k"}), Contains("kv")) << "as bash breaks words";
  EXPECT_THAT(offered({"variants", ""}), AllOf(Contains("snapkv"), Not(Contains("full"))));
  EXPECT_THAT(offered({"policies", ""}), Contains("snapkv"));
  EXPECT_THAT(offered({"completion", ""}), ElementsAre("bash", "zsh", "fish"));
  EXPECT_THAT(offered({"report", "-o", ""}), ElementsAre(":folders"));
  EXPECT_THAT(offered({"replay", "--csv", "a"}), ElementsAre(":files"));
  EXPECT_THAT(offered({"replay", ""}), ElementsAre(":files"));
  EXPECT_THAT(offered({"inspect", "a.h5", ""}), IsEmpty()) << "it takes one trace";
  EXPECT_THAT(offered({"replay", "--threads", ""}), IsEmpty());
}

TEST_F(Completion, PassesOverWhatCannotBe) {
  EXPECT_THAT(offered({"frobnicate", ""}), Contains("replay"));
  EXPECT_THAT(offered({"replay", "--frobnicate", ""}), ElementsAre(":files"));
  EXPECT_THAT(offered({"replay", "--frobnicate=x"}), IsEmpty());
  EXPECT_THAT(offered({}), IsEmpty());
}

TEST_F(Completion, BashAsksTheProgram) {
  test::write_file(folder_ / "kvreplay.bash", succeed({"completion", "bash"}).output);
  test::write_file(folder_ / "trace.h5", "");
  const auto completed = [this](const std::string& words, const std::string& expected) {
    const std::string script = fmt::format(
        "cd '{}' && . ./kvreplay.bash && COMP_WORDS=(kvreplay {}) && COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) && "
        "_kvreplay '{}' && echo \"${{COMPREPLY[*]}}\" >reply",
        folder_.path().string(), words, test::kvreplay_executable().string());
    test::write_file(folder_ / "complete.bash", script);
    EXPECT_EQ(std::system(fmt::format("bash '{}'", (folder_ / "complete.bash").string()).c_str()), 0) << words;
    EXPECT_EQ(test::read_file(folder_ / "reply"), expected + "\n") << words;
  };
  completed("repl", "replay");
  completed("replay tr", "trace.h5");
  completed("replay trace.h5 --pol", "--policy");
  completed("replay trace.h5 -p snapk",
            "snapkv snapkv@kvcache-factory snapkv@kvpress snapkv@kvpress-decoding snapkv@r-kv snapkv@rest-kv");
  completed("replay trace.h5 --heads = q", "query");
  completed("replay trace.h5 --heads =", "query kv layer");
}

TEST_F(Completion, TheManualNamesEveryCommandAndOption) {
  std::string page = succeed({"manual"}).output;
  EXPECT_THAT(page, StartsWith(".\\\" Printed by"));
  for (std::size_t at = 0; (at = page.find("\\-", at)) != std::string::npos;) page.erase(at, 1);
  for (const std::string& command : commands()) {
    EXPECT_THAT(page, HasSubstr(".SS \"kvreplay " + command + " "));
    for (const std::string& option : options_in_help(command)) EXPECT_THAT(page, HasSubstr(option)) << command;
  }
  EXPECT_THAT(page, AllOf(HasSubstr(".SH EXIT STATUS"), Not(HasSubstr(".SS \"kvreplay complete "))));
}

}  // namespace
}  // namespace kvreplay
