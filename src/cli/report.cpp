#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cli/analysis_options.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "notebooks-export/figure.h"
#include "notebooks-export/report.h"
#include "notebooks-export/tables/analysis_tables.h"
#include "notebooks-export/tables/tables.h"

namespace kvreplay::cli {
namespace {

struct ReportCommandOptions {
  ResultOptions results;
  std::string folder;
  std::vector<std::string> only;
  std::string title;
  std::string theme = "screen";
  bool no_titles = false;
  std::string python;
  bool force = false;
};

ReportOptions report_options(const ReportCommandOptions& options) {
  return {.title = options.title,
          .figures = {.theme = options.theme == "paper" ? Theme::paper : Theme::screen,
                      .titles = !options.no_titles,
                      .policies = options.results.filter.policies},
          .only = options.only,
          .python = options.python,
          .force = options.force};
}

void print_item(const std::string& text) {
  std::string lines = wrapped(text, 4, 110);
  lines.replace(2, 1, "-");
  fmt::print("{}", lines);
}

void run_report(const ReportCommandOptions& options) {
  if (options.folder.empty()) throw UsageError("name the folder to write: --output report");
  check_measure(options.results);
  const ReportOptions report = report_options(options);
  omp_set_num_threads(threads_or_all(options.results.threads));
  ResultSet results = open_results(options.results);
  check_resampling(options.results, results);
  check_report(options.folder, report);
  const std::string headline = analysis_headline(results.results());

  RetentionSet kept = open_kept(options.results, results);
  std::vector<std::string> notes;
  std::vector<TraceReader> traces = open_traces(options.results, results, notes);
  const AnalysisOptions analysis_of = analysis_options(options.results, results.comparable(), false, notes);
  const AnalysisInput input{std::move(results), std::move(kept), std::move(traces)};
  const Analysis analysis = analyze(input, analysis_of);
  notes.insert(notes.end(), analysis.notes.begin(), analysis.notes.end());
  const ReportOutcome outcome = write_report(options.folder, analysis, report);

  fmt::print("{}\n\n", headline);
  for (const std::string& finding : outcome.findings) print_item(finding);
  if (!outcome.findings.empty()) fmt::print("\n");
  fmt::print("{} {}", outcome.figures.size(), outcome.figures.size() == 1 ? "figure" : "figures");
  if (!outcome.left_out.empty()) {
    fmt::print("; there are no data for {} more:\n", outcome.left_out.size());
    for (const std::string& line : outcome.left_out) print_item(line);
  } else {
    fmt::print("\n");
  }
  fmt::print("wrote {}\n", (std::filesystem::path(options.folder) / "index.html").string());
  std::fflush(stdout);
  for (const std::string& note : notes) fmt::print(stderr, "note: {}\n", note);
  if (!outcome.thinned.empty()) fmt::print(stderr, "note: {} The page lists the others.\n", outcome.thinned);
  if (!outcome.missing.empty()) fmt::print(stderr, "note: {}\n", outcome.missing);
}

}  // namespace

void add_report_command(CLI::App& app) {
  auto options = std::make_shared<ReportCommandOptions>();
  CLI::App* command =
      app.add_subcommand("report", "Make a page, figures, tables and a notebook of results (docs/report.md)");
  command->add_option("-o,--output", options->folder, "Folder to write")->check(names_a_file)->type_name("DIR");
  command->add_flag("--force", options->force, "Replace the report that stands there");
  CLI::Option* const only = command
                                ->add_option("--only", options->only,
                                             "Only these figures (default: all that the results say something about)")
                                ->delimiter(',')
                                ->type_name("NAME,...");
  take_several(*only, looks_like_names);
  std::vector<std::string> figures;
  for (const FigureKind* kind : figure_kinds()) figures.push_back(kind->name);
  offer_values(*only, std::move(figures));
  command->add_option("--title", options->title, "Of the page (default: by the models)")->type_name("TEXT");
  command
      ->add_option("--theme", options->theme,
                   "Of the pictures: paper draws for a column of 84 mm, screen for slides and pages (default: screen)")
      ->check(one_of({"paper", "screen"}))
      ->type_name("paper|screen");
  command->add_flag("--no-titles", options->no_titles, "Pictures without their titles, for text that has captions");
  command
      ->add_option("--python", options->python,
                   "Python with vl-convert, which draws (default: KVREPLAY_REPORT_PYTHON, else the environment that "
                   "'make report-environment' makes)")
      ->check(names_a_file)
      ->type_name("FILE");
  add_result_options(*command, options->results);
  command->footer("A trace that --trace names by its file adds the text of tokens and importance over time.");
  command->callback([options]() { run_report(*options); });
}

}  // namespace kvreplay::cli
