// Reports as a user makes them, without Python: what is drawn as pictures is checked where it is
// (scripts/check-report.py).
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "base/printable.h"
#include "cli/command.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"

namespace kvreplay {
namespace {

using test::Outcome;
using test::RandomTrace;
using testing::AllOf;
using testing::Contains;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class ReportCommand : public test::Commands {
 protected:
  ReportCommand() {
    ::setenv("KVREPLAY_REPORT_PYTHON", "/no/such/python", 1);
    RandomTrace{.num_layers = 2, .spans = {{10, 14, "needle"}}}.write(folder_ / "a.h5");
    RandomTrace{.spans = {{3, 9, "early"}}, .seed = 2}.write(folder_ / "b.h5");
    succeed(test::words(
        "replay a.h5 b.h5 --policy full --policy snapkv(window=8) --policy restkv(window=8) --policy recent "
        "--policy oracle-attention --capacity 16,32 --evict-at 50,60 --rank-agreement -o r.h5 --kept k.h5"));
  }
  ~ReportCommand() override { ::unsetenv("KVREPLAY_REPORT_PYTHON"); }

  Outcome report(const std::string& arguments) const { return succeed(test::words("report " + arguments)); }
  void refuse_words(const std::string& arguments, int exit_code, const std::vector<std::string>& reasons) const {
    refuse(test::words("report " + arguments), exit_code, reasons);
  }

  std::string file(const std::string& name) const { return test::read_file(folder_ / name); }

  // All files below the folder with their contents: files() looks at the names of folders only.
  std::map<std::string, std::string> everything() const {
    std::map<std::string, std::string> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_.path())) {
      const std::string name = std::filesystem::relative(entry.path(), folder_.path()).string();
      found[name] = entry.is_regular_file() ? test::read_file(entry.path()) : "";
    }
    return found;
  }

  // The names in `results` of the policy recent at one of its capacities become others.
  void rename_policy(const std::string& results, const std::string& name) const {
    test::edit(folder_ / results, [&](std::int64_t file) {
      for (const char* result : {"/results/7", "/results/16", "/results/25", "/results/34"}) {
        test::set_string(file, result, "policy", name);
      }
    });
  }
};

TEST_F(ReportCommand, SaysWhatWasFoundAndWhereItStands) {
  const Outcome outcome = report("r.h5 --kept k.h5 --trace a.h5 b.h5 -o out");
  EXPECT_THAT(outcome.output, AllOf(StartsWith("2 traces of random"), HasSubstr("  - "), HasSubstr(" figures"),
                                    HasSubstr("ablation: settings of one method"), HasSubstr("wrote out/index.html")));
  EXPECT_THAT(outcome.errors, HasSubstr("make report-environment"));
  EXPECT_THAT(file("out/index.html"), HasSubstr("snapkv(window=8)"));
  EXPECT_THAT(file("out/tables/kept-positions.csv"), HasSubstr("needle"));
  EXPECT_THAT(file("out/tables/stability.csv"), HasSubstr("restkv"));
  EXPECT_THAT(file("out/notebook.ipynb"), HasSubstr("error-against-capacity"));
}

TEST_F(ReportCommand, EvictionsThatNoMeanIsOverAreToldApart) {
  succeed(
      test::words("replay a.h5 --policy snapkv(window=8) --capacity 16 --evict-at 40 --evaluate-from 60 -o some.h5"));
  report("r.h5 some.h5 --trace a -o out");
  EXPECT_THAT(file("out/index.html"), AllOf(HasSubstr("evicted at position 50 to 60, and apart from that at 40."),
                                            HasSubstr("<td>50, 60; apart from that 40</td>")));
}

TEST_F(ReportCommand, TracesAddTextAndOthersAreTold) {
  RandomTrace{.seed = 9}.write(folder_ / "c.h5");
  refuse_words("r.h5 --trace c.h5 -o out", 2, {"no result is of trace c.h5", "a.h5, b.h5"});
  refuse_words("r.h5 --trace missing.h5 -o out", 2, {"no result is of trace missing.h5"});
  // Under another name and elsewhere it is the same capture; under its name another capture is not.
  std::filesystem::create_directory(folder_ / "elsewhere");
  std::filesystem::copy_file(folder_ / "a.h5", folder_ / "elsewhere/moved.h5");
  std::filesystem::rename(folder_ / "c.h5", folder_ / "b.h5");
  const Outcome outcome = report("r.h5 --kept k.h5 --trace elsewhere/moved.h5 b.h5 -o out");
  EXPECT_THAT(outcome.output, HasSubstr("2 traces of random"));
  EXPECT_THAT(outcome.errors, HasSubstr("note: b.h5: the results of that name are of another capture"));
  EXPECT_THAT(report("r.h5 --trace elsewhere/moved.h5 -o one").output, HasSubstr("1 trace of random"));
  refuse_words("r.h5 --trace r.h5 -o other", 1, {"r.h5", "is not a kvtrace file"});
}

TEST_F(ReportCommand, WrongUsageIsTold) {
  refuse_words("r.h5", 2, {"--output"});
  refuse_words("-o out", 2, {"no file of results"});
  refuse_words("r.h5 -o out --only error-by-haed", 2, {"error-by-haed", "error-by-head", "stability"});
  refuse_words("r.h5 -o out --theme pink", 2, {"pink", "paper", "screen"});
  refuse_words("r.h5 -o out --policy h2o", 2, {"h2o", "snapkv(window=8)", "recent"});
  refuse_words("r.h5 -o out --capacity 64", 2, {"64", "16", "32"});
  refuse_words("r.h5 -o out --measure speed", 2, {"speed", "layer_error"});
  refuse_words("missing.h5 -o out", 1, {"missing.h5"});
  refuse_words("a.h5 -o out", 1, {"a.h5"});
  refuse_words("r.h5 -o out --python /no/such/python", 1, {"/no/such/python"});
  refuse_words("r.h5 -o no/such/out", 1, {"no/such"});
}

TEST_F(ReportCommand, WhatCannotBeComparedIsRefused) {
  RandomTrace{.num_layers = 2, .seed = 5}.write(folder_ / "a.h5");
  succeed(test::words("replay a.h5 --policy recent --capacity 16 --evict-at 50 -o t.h5"));
  refuse_words("r.h5 t.h5 -o out", 1, {"a.h5", "not the same capture"});
}

TEST_F(ReportCommand, IsReplacedOnlyByForce) {
  report("r.h5 -o out --title first");
  refuse_words("r.h5 -o out --title second", 1, {"out", "exists", "--force"});
  report("r.h5 -o out --title second --force");
  EXPECT_THAT(file("out/index.html"), HasSubstr("<title>second</title>"));
  test::write_file(folder_ / "out" / "thesis.tex", "years");
  refuse_words("r.h5 -o out --force", 1, {"thesis.tex"});
}

TEST_F(ReportCommand, ATitleIsText) {
  succeed({"report", "r.h5", "-o", "out", "--title", "<script>alert(1)</script> & co"});
  EXPECT_THAT(file("out/index.html"), HasSubstr("&lt;script&gt;alert(1)&lt;/script&gt; &amp; co"));
  EXPECT_THAT(file("out/index.html"), Not(HasSubstr("<script>alert")));
}

TEST_F(ReportCommand, OnlyTheFiguresAskedFor) {
  const Outcome outcome = report("r.h5 --only regret,error-by-layer --theme paper -o out");
  EXPECT_THAT(outcome.output, HasSubstr("2 figures"));
  EXPECT_TRUE(std::filesystem::exists(folder_ / "out" / "tables" / "regret.csv"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out" / "tables" / "error-by-head.csv"));
}

TEST_F(ReportCommand, FiguresCanBeNamedWithSpaces) {
  report("r.h5 --only error-by-layer error-by-head -o out");
  EXPECT_TRUE(std::filesystem::exists(folder_ / "out/figures/error-by-layer.vl.json"));
  EXPECT_TRUE(std::filesystem::exists(folder_ / "out/figures/error-by-head.vl.json"));
}

TEST_F(ReportCommand, ShowsThePoliciesThatAreNamedInTheirOrder) {
  report("r.h5 -p recent -p snapkv(window=8) -o out");
  const auto spec = nlohmann::json::parse(file("out/figures/error-against-capacity.vl.json"));
  EXPECT_EQ(spec["encoding"]["color"]["scale"]["domain"], nlohmann::json({"recent", "snapkv(window=8)"}));
  report("r.h5 -p snapkv(window=8) -p recent -o other");
  const auto other = nlohmann::json::parse(file("other/figures/error-against-capacity.vl.json"));
  EXPECT_EQ(other["encoding"]["color"]["scale"]["domain"], nlohmann::json({"snapkv(window=8)", "recent"}));
}

TEST_F(ReportCommand, PicturesHaveTitlesUnlessTheyAreLeftOut) {
  const auto title_in = [&](const std::string& folder) {
    return nlohmann::json::parse(file(folder + "/figures/error-by-layer.vl.json")).contains("title");
  };
  report("r.h5 -o out --only error-by-layer");
  EXPECT_TRUE(title_in("out"));
  report("r.h5 -o bare --only error-by-layer --no-titles");
  EXPECT_FALSE(title_in("bare"));
}

TEST_F(ReportCommand, SameInputSameBytesWhateverTheThreads) {
  report("r.h5 --kept k.h5 --trace a.h5 b.h5 -o one -t 1");
  report("r.h5 --kept k.h5 --trace a.h5 b.h5 -o four -t 4");
  std::size_t files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_ / "one")) {
    if (!entry.is_regular_file()) continue;
    const std::filesystem::path name = std::filesystem::relative(entry.path(), folder_ / "one");
    EXPECT_EQ(test::read_file(entry.path()), test::read_file(folder_ / "four" / name)) << name;
    ++files;
  }
  EXPECT_GT(files, 20u);
}

TEST_F(ReportCommand, AFullDiskLeavesNothingAndKeepsWhatWas) {
  const auto before = everything();
  const Outcome outcome = run({.arguments = test::words("report r.h5 -o out"), .largest_file = 3000});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("File too large"), Not(HasSubstr("tmp-"))));
  EXPECT_EQ(everything(), before);
  report("r.h5 -o out --title first");
  const auto with_report = everything();
  EXPECT_EQ(
      run({.arguments = test::words("report r.h5 -o out --title second --force"), .largest_file = 3000}).exit_code, 1);
  EXPECT_EQ(everything(), with_report);
}

TEST_F(ReportCommand, APlaceThatCannotBeWrittenIsNamed) {
  std::filesystem::create_directory(folder_ / "locked");
  std::filesystem::permissions(folder_ / "locked",
                               std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec |
                                   std::filesystem::perms::others_read | std::filesystem::perms::others_exec);
  std::filesystem::permissions(folder_.path(),
                               std::filesystem::perms::others_read | std::filesystem::perms::others_exec,
                               std::filesystem::perm_options::add);
  const auto before = everything();
  const Outcome outcome = run({.arguments = test::words("report r.h5 -o locked/out"), .unprivileged = true});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(StartsWith("kvreplay: "), HasSubstr("locked"), HasSubstr("Permission denied")));
  EXPECT_EQ(std::ranges::count(outcome.errors, '\n'), 1) << outcome.errors;
  EXPECT_EQ(everything(), before);
  test::write_file(folder_ / "taken", "a file");
  refuse_words("r.h5 -o taken --force", 1, {"taken"});
}

TEST_F(ReportCommand, NamesInResultsAreText) {
  rename_policy("r.h5", "</script><b>re\ncent \x1b[31m\"'&");
  const Outcome outcome = report("r.h5 -o out");
  EXPECT_THAT(outcome.output + outcome.errors, Not(HasSubstr("\x1b")));
  EXPECT_THAT(file("out/index.html"), AllOf(Not(HasSubstr("</script><b>")), Not(HasSubstr("\x1b"))));
  // The scale of colours and the table call it the same.
  const auto spec = nlohmann::json::parse(file("out/figures/error-against-capacity.vl.json"));
  EXPECT_THAT(file("out/tables/error-against-capacity.csv"), HasSubstr("</script><b>re\\ncent"));
  EXPECT_THAT(spec.dump(), AllOf(HasSubstr("re\\\\ncent"), Not(HasSubstr("\\u001b"))));
}

TEST_F(ReportCommand, NamesThatAreNoUTF8AreText) {
  rename_policy("r.h5",
                "re\xff"
                "cent");
  report("r.h5 -o out");
  EXPECT_THAT(file("out/tables/error-against-capacity.csv"), HasSubstr("re\\xffcent"));
  for (const char* name : {"out/index.html", "out/notebook.ipynb", "out/figures/error-against-capacity.vl.json"}) {
    EXPECT_EQ(find_invalid_utf8(file(name)), std::nullopt) << name;
  }
}

TEST_F(ReportCommand, ThemesArePicturesOnly) {
  report("r.h5 -o screen --theme screen");
  report("r.h5 -o paper --theme paper");
  for (const auto& [name, content] : everything()) {
    if (!name.starts_with("paper/tables/") && name != "paper/index.html") continue;
    EXPECT_EQ(content, file("screen" + name.substr(5))) << name;
  }
  const auto size_of = [&](const std::string& theme) {
    return nlohmann::json::parse(
               file(theme + "/figures/error-against-capacity.vl.json"))["config"]["axis"]["labelFontSize"]
        .get<double>();
  };
  EXPECT_EQ(size_of("paper"), 7) << "points";
  EXPECT_GT(size_of("screen"), 7);
}

TEST_F(ReportCommand, AnInterruptedOneLeavesNothing) {
  const Outcome outcome =
      interrupt({.arguments = test::words("report r.h5 --kept k.h5 -o out"), .interrupt_when = "figures"}, "out");
  ASSERT_EQ(outcome.signal, SIGINT);
  EXPECT_THAT(folder_.names(), Not(Contains(HasSubstr("out"))));
}

}  // namespace
}  // namespace kvreplay
