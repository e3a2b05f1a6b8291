#include <fmt/format.h>
#include <fmt/ranges.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <system_error>

#include "base/error.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "cli/analysis_options.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "notebooks-export/tables/analysis_tables.h"
#include "notebooks-export/tables/tables.h"

namespace kvreplay::cli {
namespace {

struct AnalyzeOptions {
  ResultOptions results;
  std::vector<std::string> by;
  std::string csv;
};

// Before the work: that the table does not replace what is read, and that it can be written.
void check_csv(const AnalyzeOptions& options) {
  if (options.csv.empty()) return;
  for (const auto* files : {&options.results.files, &options.results.kept}) {
    for (const std::string& file : *files) {
      std::error_code absent;
      if (std::filesystem::equivalent(file, options.csv, absent)) {
        throw UsageError(fmt::format("{}: would overwrite what is read; name another file", options.csv));
      }
    }
  }
  const OutputFile probe(options.csv);
}

Grouping grouping_of(const AnalyzeOptions& options) {
  return Grouping::parse(fmt::format("{}", fmt::join(options.by, ",")));
}

// What is said, and what is written.
struct Answer {
  std::string text;
  DataTable numbers{{}};
  std::vector<std::string> notes;
};

// Means over eviction positions that were asked for are of all of them or not taken.
void require_evictions(const AnalyzeOptions& options, const Grouping& grouping, const ResultSet& results) {
  if (grouping.eviction_position) return;
  for (const int position : options.results.filter.eviction_positions) {
    const auto is_there = [position](const StoredResult& result) { return result.eviction_position == position; };
    if (std::ranges::any_of(results.results(), is_there)) continue;
    throw Error(
        fmt::format("evictions at {} were evaluated on other queries, and a mean over them would mix what cannot be "
                    "compared; tell them apart (--by ...,evict-at), or replay with --evaluate-from",
                    fmt::join(options.results.filter.eviction_positions, ", ")));
  }
}

// Rows of one trace that are of other queries.
void note_evaluations(const ResultSet& results, const Grouping& grouping, std::vector<std::string>& notes) {
  if (!grouping.eviction_position) return;
  std::map<std::string, const StoredResult*> first;
  for (const StoredResult& result : results.results()) {
    const StoredResult* of_trace = first.try_emplace(result.trace, &result).first->second;
    if (of_trace->evaluation_positions == result.evaluation_positions) continue;
    notes.push_back(
        fmt::format("{}: evictions at {} and {} were evaluated on other queries: compare rows of one eviction "
                    "position only, or replay with --evaluate-from",
                    printable(result.trace), of_trace->eviction_position, result.eviction_position));
    return;
  }
}

Answer compared_by(const AnalyzeOptions& options, const ResultSet& all) {
  ComparisonOptions comparison;
  comparison.grouping = grouping_of(options);
  ResultSet results = comparison.grouping.eviction_position ? all.comparable_at_each_eviction() : all.comparable();
  require_evictions(options, comparison.grouping, results);
  std::vector<std::string> notes;
  const bool of_layers = comparison.grouping.layer || comparison.grouping.head;
  AnalysisOptions analysis = analysis_options(options.results, results, of_layers, notes);
  comparison.measure = analysis.measure;
  const bool pooled = !comparison.grouping.policy;
  if (pooled) {
    // A mean over policies is about those that may be used.
    const auto may_be_used = [](const StoredResult& result) {
      return !result.oracle && result.capacity_request != kAllPositions;
    };
    results = results.only(may_be_used);
    if (results.results().empty())
      throw UsageError("--by without policy leaves out full and oracles: there is no other");
    // What had nothing to choose says nothing of what is averaged.
    const ResultSet chose = results.only([](const StoredResult& result) { return !*result.nothing_to_choose; });
    if (chose.results().size() < results.results().size() && !chose.results().empty()) {
      notes.push_back(fmt::format("{} results are left out in which a policy had nothing to choose",
                                  results.results().size() - chose.results().size()));
      results = chose;
    }
  }
  results = over_the_same_others(results, comparison.grouping, notes);
  if (analysis.baseline.empty() && !pooled) analysis.baseline = default_baseline(results, analysis.measure);
  if (!analysis.baseline.empty()) analysis.baseline = results.policy_named(analysis.baseline);
  comparison.baseline = analysis.baseline;
  comparison.bootstrap = analysis.bootstrap;
  // There may be hundreds of thousands of heads.
  if (comparison.grouping.head && options.results.resamples < 0) comparison.bootstrap.resamples = 0;
  const std::vector<ComparisonRow> rows = compare(results, comparison);
  Answer answer{comparison_text(rows, comparison.grouping, analysis), comparison_numbers(rows, analysis),
                results.notes()};
  for (std::string& note : notes) answer.notes.push_back(std::move(note));
  note_evaluations(results, comparison.grouping, answer.notes);
  if (pooled)
    answer.notes.emplace_back("means are over all policies but full and oracles; --by policy,... tells them apart");
  if (!options.results.kept.empty()) answer.notes.emplace_back("--kept is not looked at with --by");
  return answer;
}

Answer analyzed(const AnalyzeOptions& options, ResultSet results) {
  RetentionSet kept = open_kept(options.results, results);
  std::vector<std::string> notes;
  AnalysisOptions analysis_of = analysis_options(options.results, results.comparable(), false, notes);
  analysis_of.details = false;
  const AnalysisInput input{std::move(results), std::move(kept), {}};
  const Analysis analysis = analyze(input, analysis_of);
  notes.insert(notes.end(), analysis.notes.begin(), analysis.notes.end());
  return {analysis_text(analysis), analysis_numbers(analysis), std::move(notes)};
}

std::string legend(const AnalyzeOptions& options) {
  const BootstrapOptions bootstrap = bootstrap_options(options.results);
  std::string by = bootstrap.resampling == Resampling::traces
                       ? "bootstrap intervals over traces and blocks of their queries"
                       : "bootstrap intervals over blocks of queries";
  if (bootstrap.resamples == 0) by = "intervals in closed form";
  return wrapped(fmt::format("Means weigh every trace and eviction position the same. ± and [ ]: {:.4g} % {}; wins: "
                             "share of the pairs that are better than the baseline's. docs/analysis.md.",
                             100 * bootstrap.confidence, by),
                 0, 110);
}

void run_analyze(const AnalyzeOptions& options) {
  check_measure(options.results);
  if (!options.by.empty()) static_cast<void>(grouping_of(options));
  omp_set_num_threads(threads_or_all(options.results.threads));
  ResultSet results = open_results(options.results);
  check_csv(options);
  const std::string headline = analysis_headline(results.results());
  check_resampling(options.results, results);
  Answer answer = options.by.empty() ? analyzed(options, std::move(results)) : compared_by(options, results);

  // The answer is shown even where the file cannot be written.
  std::exception_ptr failure;
  try {
    if (!options.csv.empty()) OutputFile::write_text(options.csv, answer.numbers.csv());
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  fmt::print("{}\n\n{}{}", headline, answer.text, legend(options));
  if (!options.csv.empty() && !failure) fmt::print("wrote {}\n", options.csv);
  std::fflush(stdout);
  for (const std::string& note : answer.notes) fmt::print(stderr, "note: {}\n", note);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void add_analyze_command(CLI::App& app) {
  auto options = std::make_shared<AnalyzeOptions>();
  CLI::App* command =
      app.add_subcommand("analyze", "Say which policy is best where, by how much, and how sure that is");
  add_result_options(*command, options->results);
  CLI::Option* const by =
      command
          ->add_option(
              "--by", options->by,
              "Only compare, by these: policy, capacity, trace, evict-at, layer, head (default: policy,capacity)")
          ->delimiter(',')
          ->type_name("KEY,...");
  take_several(*by, looks_like_names);
  offer_values(*by, {"policy", "capacity", "trace", "evict-at", "layer", "head"});
  command->add_option("--csv", options->csv, "All numbers (CSV); replaced if it exists")
      ->check(names_a_file)
      ->type_name("FILE");
  command->callback([options]() { run_analyze(*options); });
}

}  // namespace kvreplay::cli
