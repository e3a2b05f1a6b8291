// Reports as folders: complete or absent, replaced only where that is meant, and told apart from everything else.
#include "notebooks-export/report.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>

#include "analysis/findings.h"
#include "base/error.h"
#include "base/file_text.h"
#include "export/sample_analysis.h"
#include "notebooks-export/figure.h"
#include "notebooks-export/page/page.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::SampleAnalysis;
using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;
using testing::StartsWith;

// What a call throws, and it must throw an Error.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

class Report : public testing::Test {
 protected:
  Report() { ::setenv("KVREPLAY_REPORT_PYTHON", (folder_ / "no-python").c_str(), 1); }
  ~Report() override { ::unsetenv("KVREPLAY_REPORT_PYTHON"); }

  ReportOutcome write(const ReportOptions& options = {}) const {
    return write_report(folder_ / "report", analysis_, options);
  }

  std::vector<std::string> names_in(const std::filesystem::path& folder) const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      names.push_back(entry.path().filename().string());
    }
    std::ranges::sort(names);
    return names;
  }

  // A program that stands where Python should.
  std::filesystem::path fake_python(const std::string& script) const {
    const std::filesystem::path path = folder_ / "fake-python";
    std::ofstream(path) << "#!/bin/sh\n" << script;
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    return path;
  }

  test::TemporaryFolder folder_;
  Analysis analysis_ = SampleAnalysis{}.make();
};

TEST_F(Report, HoldsFiguresTablesAPageAndANotebook) {
  const ReportOutcome outcome = write();
  EXPECT_THAT(names_in(folder_ / "report"), ElementsAre("figures", "index.html", "notebook.ipynb", "tables"));
  EXPECT_THAT(outcome.figures, SizeIs(figure_kinds().size())) << "the sample has something for each";
  EXPECT_THAT(outcome.left_out, IsEmpty());
  EXPECT_THAT(outcome.missing, AllOf(HasSubstr("make report-environment"), Not(HasSubstr("\n"))));
  for (const std::string& name : outcome.figures) {
    const auto spec = nlohmann::json::parse(file_text(folder_ / "report" / "figures" / (name + ".vl.json")));
    EXPECT_EQ(spec["data"]["url"], "../tables/" + name + ".csv");
    const std::string table = file_text(folder_ / "report" / "tables" / (name + ".csv"));
    for (const auto& [column, type] : spec["data"]["format"]["parse"].items()) EXPECT_THAT(table, HasSubstr(column));
  }
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), StartsWith(kReportMarker));
  const auto notebook = nlohmann::json::parse(file_text(folder_ / "report" / "notebook.ipynb"));
  EXPECT_EQ(notebook["nbformat"], 4);
  EXPECT_THAT(names_in(folder_.path()), ElementsAre("report")) << "nothing is left beside it";
}

TEST_F(Report, HoldsEveryFinding) {
  const std::vector<std::string> all = findings(analysis_, 1000);
  ASSERT_GT(all.size(), 3u);
  const ReportOutcome outcome = write();
  EXPECT_EQ(outcome.findings, all);
  const std::string page = file_text(folder_ / "report" / "index.html");
  for (const std::string& finding : all) EXPECT_THAT(page, HasSubstr(finding.substr(0, finding.find_first_of("<>&"))));
}

TEST_F(Report, WhatFiguresLeaveOutIsSaidByItsNotebookToo) {
  SampleAnalysis sample{.policies = {"snapkv"}};
  for (int i = 1; i <= 30; ++i) sample.policies.push_back(fmt::format("restkv(beta={})", i));
  analysis_ = sample.make();
  const ReportOutcome outcome = write();
  EXPECT_THAT(outcome.thinned, StartsWith("Figures show 16 of 32 policies: "));
  EXPECT_THAT(file_text(folder_ / "report" / "notebook.ipynb"), HasSubstr("Left out are restkv(beta="));
  EXPECT_EQ(write({.figures = {.policies = {"restkv", "snapkv"}}, .force = true}).thinned, "") << "asked for by name";
}

TEST_F(Report, TitlesCanBeLeftOutOfPictures) {
  const auto title_in = [&]() {
    return nlohmann::json::parse(file_text(folder_ / "report" / "figures" / "regret.vl.json")).contains("title");
  };
  write();
  EXPECT_TRUE(title_in());
  write({.figures = {.titles = false}, .force = true});
  EXPECT_FALSE(title_in());
  // Beside the pictures questions stay.
  const std::string question = "How much of the layer error could a better choice of positions avoid?";
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), HasSubstr(question));
  EXPECT_THAT(file_text(folder_ / "report" / "notebook.ipynb"), HasSubstr("## " + question));
}

TEST_F(Report, OfNothingMuchSaysWhatEachFigureNeeds) {
  SampleAnalysis sample;
  sample.oracle = "";
  sample.spans = false;
  sample.kept_sets = false;
  analysis_ = sample.make();
  const ReportOutcome outcome = write();
  EXPECT_THAT(outcome.left_out, Contains(StartsWith("regret: an oracle")));
  EXPECT_THAT(outcome.left_out, Contains(StartsWith("stability: kept sets")));
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), HasSubstr("It needs an oracle"));
}

TEST_F(Report, SpeaksOfStepsWhereThereAreSome) {
  SampleAnalysis sample;
  analysis_ = sample.make();
  EXPECT_THAT(write().figures,
              AllOf(Contains("error-over-steps"), Contains("cache-size-over-steps"), Contains("late-hits-over-steps"),
                    Contains("residency-raster"), Contains("span-survival")));
  sample.steps = 0;
  analysis_ = sample.make();
  const ReportOutcome without = write({.force = true});
  EXPECT_THAT(without.figures, Not(Contains("error-over-steps")));
  EXPECT_THAT(without.left_out, Not(Contains(HasSubstr("schedule"))));
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), Not(HasSubstr("while tokens come")));
  EXPECT_THAT(write({.only = {"error-over-steps", "ablation"}, .force = true}).left_out,
              ElementsAre(StartsWith("error-over-steps: policies with a schedule")));
}

TEST_F(Report, OnlyWhatIsAskedFor) {
  const ReportOutcome outcome = write({.only = {"ablation", "error-by-layer"}});
  EXPECT_THAT(outcome.figures, ElementsAre("error-by-layer", "ablation"));
  EXPECT_THAT(names_in(folder_ / "report" / "tables"), ElementsAre("ablation.csv", "error-by-layer.csv"));
  const auto unknown = [&]() { write({.only = {"ablatoin"}, .force = true}); };
  EXPECT_THROW(unknown(), UsageError);
  EXPECT_THAT(error_of(unknown), AllOf(HasSubstr("ablatoin"), HasSubstr("ablation"), HasSubstr("error-by-layer")));
}

TEST_F(Report, IsReplacedOnlyWhereThatIsMeant) {
  write({.title = "first"});
  EXPECT_THAT(error_of([&]() { write({.title = "second"}); }), AllOf(HasSubstr("exists"), HasSubstr("--force")));
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), HasSubstr("<title>first"));
  write({.title = "second", .force = true});
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), HasSubstr("<title>second"));
}

TEST_F(Report, ReplacesNothingButReports) {
  const auto refused = [&]() { return error_of([&]() { write({.force = true}); }); };
  std::filesystem::create_directory(folder_ / "report");
  std::ofstream(folder_ / "report" / "thesis.tex") << "years of work";
  EXPECT_THAT(refused(), HasSubstr("is no report"));
  std::filesystem::remove_all(folder_ / "report");
  write();
  std::ofstream(folder_ / "report" / "thesis.tex") << "years of work";
  EXPECT_THAT(refused(), HasSubstr("holds thesis.tex beside a report"));
  EXPECT_EQ(file_text(folder_ / "report" / "thesis.tex"), "years of work");
  std::filesystem::remove_all(folder_ / "report");
  std::ofstream(folder_ / "report") << "a file";
  EXPECT_NE(refused(), "");
  EXPECT_EQ(file_text(folder_ / "report"), "a file");
  std::filesystem::remove(folder_ / "report");
  std::filesystem::create_symlink(folder_ / "nowhere", folder_ / "report");
  EXPECT_THAT(refused(), HasSubstr("leads nowhere"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "nowhere"));
}

TEST_F(Report, AnEmptyFolderIsFilled) {
  std::filesystem::create_directory(folder_ / "report");
  write();
  EXPECT_THAT(names_in(folder_ / "report"), Contains("index.html"));
}

TEST_F(Report, ThatCannotBeDrawnLeavesNothing) {
  // Answers the question for its version, and then nonsense.
  const std::filesystem::path python =
      fake_python("read line; case $line in *version*) printf '{\"version\": 3}\\n6.1';; *) echo 'no json';; esac\n");
  const std::string message = error_of([&]() { write({.only = {"ablation"}, .python = python}); });
  EXPECT_THAT(message, HasSubstr("figure ablation"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "report"));
  EXPECT_THAT(names_in(folder_.path()), ElementsAre("fake-python"));
}

// Whatever happens while pictures are drawn: the figure is named, and what stood there stays as it was.
TEST_F(Report, ThatCannotBeDrawnKeepsWhatWas) {
  write({.title = "first"});
  const std::string page = file_text(folder_ / "report" / "index.html");
  for (const auto& [answer, reason] : std::vector<std::pair<std::string, std::string>>{
           {"echo 'ValueError: no such font' >&2; exit 3", "no such font"},
           {"exit 0", "ended unexpectedly"},
           {"kill -9 $$", "ended unexpectedly"},
           {"echo '{\"error\": \"no such mark\"}'", "no such mark"},
           {"echo '{\"error\": 5}'", "an answer that is none"},
           {"echo '[1, 2]'", "an answer that is none"},
           {"echo '{\"svg\": -1, \"png\": 1, \"pdf\": 1}'", "an answer that is none"},
           {"echo '{\"svg\": 1}'; printf S", "without p"},
           {"echo '{\"svg\": 4000000000}'; printf S", "ended unexpectedly"},
       }) {
    SCOPED_TRACE(answer);
    const std::filesystem::path python =
        fake_python("read line\ncase $line in *version*) " +
                    ("printf '{\"version\": 3}\\n6.1'; exit;; *) " + answer + ";; esac\n"));
    const std::string message =
        error_of([&]() { write({.title = "second", .only = {"ablation"}, .python = python, .force = true}); });
    EXPECT_THAT(message, AllOf(HasSubstr("figure ablation: "), HasSubstr(reason), Not(HasSubstr("\n"))));
    EXPECT_EQ(file_text(folder_ / "report" / "index.html"), page);
    EXPECT_THAT(names_in(folder_.path()), ElementsAre("fake-python", "report"));
  }
}

TEST_F(Report, APageThatCannotBeMadeLeavesNothing) {
  const std::filesystem::path python = fake_python(
      "while read line; do case $line in\n"
      "  *version*) printf '{\"version\": 3}\\n6.1';;\n"
      "  *javascript*) echo '{\"error\": \"no bundle\"}';;\n"
      "  *) printf '{\"svg\": 3, \"png\": 3, \"pdf\": 3}\\nSVGPNGPDF';;\n"
      "esac; done\n");
  EXPECT_THAT(error_of([&]() { write({.only = {"ablation"}, .python = python}); }), HasSubstr("no bundle"));
  EXPECT_THAT(names_in(folder_.path()), ElementsAre("fake-python"));
}

// An answer to the question for the version that is of the wrong kind is a Python that cannot draw, and no more.
TEST_F(Report, APythonThatAnswersNonsenseIsNone) {
  for (const char* answer : {"echo nonsense", "echo '{\"error\": 5}'", "echo '{}'", "echo 5", "true"}) {
    SCOPED_TRACE(answer);
    const std::filesystem::path python = fake_python(std::string("read line; ") + answer + "\n");
    ::setenv("KVREPLAY_REPORT_PYTHON", python.c_str(), 1);
    const ReportOutcome outcome = write({.only = {"ablation"}, .force = true});
    EXPECT_THAT(outcome.missing, AllOf(HasSubstr("make report-environment"), Not(HasSubstr("\n"))));
    EXPECT_THAT(names_in(folder_ / "report" / "figures"), ElementsAre("ablation.vl.json"));
  }
}

TEST_F(Report, EveryPartHoldsTheSameFigures) {
  const ReportOutcome outcome = write({.figures = {.theme = Theme::paper}});
  const std::string page = file_text(folder_ / "report" / "index.html");
  const auto notebook = nlohmann::json::parse(file_text(folder_ / "report" / "notebook.ipynb"));
  EXPECT_THAT(notebook["cells"], SizeIs(2 + 2 * outcome.figures.size()));
  EXPECT_THAT(names_in(folder_ / "report" / "figures"), SizeIs(outcome.figures.size()))
      << "no pictures, no stray files";
  EXPECT_THAT(names_in(folder_ / "report" / "tables"), SizeIs(outcome.figures.size()));
  for (const std::string& name : outcome.figures) EXPECT_THAT(page, HasSubstr("id=\"" + name + "\""));
  // What the page links to is there, also where pictures are missing.
  const std::regex beside(R"lit(href="((?:figures|tables)/[^"]+|notebook\.ipynb)")lit");
  std::size_t links = 0;
  for (std::sregex_iterator match(page.begin(), page.end(), beside), end; match != end; ++match, ++links) {
    EXPECT_TRUE(std::filesystem::exists(folder_ / "report" / (*match)[1].str())) << (*match)[1];
  }
  EXPECT_GT(links, outcome.figures.size());
}

TEST_F(Report, APythonThatIsNamedMustDraw) {
  const auto check = [&](const std::filesystem::path& python) {
    return error_of([&]() { check_report(folder_ / "report", {.python = python}); });
  };
  EXPECT_THAT(check(folder_ / "none"), HasSubstr("none"));
  EXPECT_THAT(check(fake_python("echo 'ModuleNotFoundError: No module named vl_convert' >&2; exit 1\n")),
              HasSubstr("No module named vl_convert"));
  check_report(folder_ / "report", {});  // the default's absence is told by the outcome
}

TEST_F(Report, PicturesAreWhatTheRendererAnswers) {
  const std::filesystem::path python = fake_python(
      "while read line; do case $line in\n"
      "  *version*) printf '{\"version\": 3}\\n6.1';;\n"
      "  *javascript*) printf '{\"javascript\": 5}\\nvar x';;\n"
      "  *) printf '{\"svg\": 3, \"png\": 3, \"pdf\": 3}\\nSVGPNGPDF';;\n"
      "esac; done\n");
  const ReportOutcome outcome = write({.only = {"ablation"}, .python = python});
  EXPECT_EQ(outcome.missing, "");
  EXPECT_EQ(file_text(folder_ / "report" / "figures" / "ablation.svg"), "SVG");
  EXPECT_EQ(file_text(folder_ / "report" / "figures" / "ablation.pdf"), "PDF");
  EXPECT_THAT(file_text(folder_ / "report" / "index.html"), HasSubstr("<script>var x</script>"));
}

}  // namespace
}  // namespace kvreplay
