#include "cli/analysis_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iterator>
#include <limits>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "cli/options.h"
#include "hdf5/hdf5.h"
#include "policy/expansion.h"
#include "trace/identity.h"

namespace kvreplay::cli {
namespace {

// A number between the two, ends apart.
Check number_between(double low, double high, std::string what) {
  return number_that([low, high](double number) { return number > low && number < high; }, std::move(what));
}

// Few resamples have no tails, and their intervals would be of chance.
std::string resample_count(const std::string& value) {
  constexpr int kFewest = 100;
  constexpr int kMost = 10'000'000;
  return value == "0" ? "" : integer_in(kFewest, kMost, "a number of resamples")(value);
}

bool is_file(const std::string& path) {
  std::error_code ignored;  // what cannot be asked is a name
  return std::filesystem::is_regular_file(path, ignored);
}

// Names, which are no files, and traces: a file of results may follow.
bool looks_like_traces(const std::string& value) {
  if (!is_file(value)) return true;
  try {
    const hdf5::File file = hdf5::File::open(value);
    return file.has_attribute("/", "format") && file.read_string("/", "format") == "kvtrace";
  } catch (const Error&) {
    return false;  // whoever it is for says what is wrong with it
  }
}

std::vector<std::filesystem::path> paths(const std::vector<std::string>& files) { return {files.begin(), files.end()}; }

}  // namespace

void add_result_options(CLI::App& command, ResultOptions& options) {
  constexpr int kAny = std::numeric_limits<int>::max();
  command.add_option("results", options.files, "Files of results, as replay and sweep write them with --output")
      ->type_name("FILE");
  CLI::Option* const policies = command
                                    .add_option("-p,--policy", options.filter.policies,
                                                "Only these policies: specs, or methods with all their settings")
                                    ->type_name("SPEC,...");
  CLI::Option* const capacities =
      command.add_option("-c,--capacity", options.filter.capacities, "Only these capacities, as they were asked for")
          ->delimiter(',')
          ->type_name("N|P%,...");
  take_several(*policies, looks_like_policies);
  take_several(*capacities, looks_like_capacities);
  CLI::Option* const traces =
      command
          .add_option("--trace", options.filter.traces,
                      "Only these traces: names as the results have them, or the files wherever they lie now")
          ->delimiter(',')
          ->type_name("NAME|FILE,...");
  CLI::Option* const evictions =
      command.add_option("--evict-at", options.filter.eviction_positions, "Only these eviction positions")
          ->delimiter(',')
          ->check(integer_in(1, kAny, "a position"))
          ->type_name("N,...");
  CLI::Option* const layers = command.add_option("--layer", options.filter.layers, "Only these layers")
                                  ->delimiter(',')
                                  ->check(integer_in(0, kAny, "a layer"))
                                  ->type_name("N,...");
  take_several(*traces, looks_like_traces);
  take_several(*evictions, looks_like_counts);
  take_several(*layers, looks_like_counts);
  command.add_flag("--full-layers", options.filter.full_layers,
                   "Only layers that held the whole prompt, without those with a sliding window");
  command.add_option("--kept", options.kept, "Files of kept sets, as --kept writes them")
      ->allow_extra_args(false)
      ->type_name("FILE");
  command
      .add_option(
          "--baseline", options.baseline,
          "Policy to compare with (default: snapkv, else in the middle; of its settings the nearest to the defaults)")
      ->type_name("SPEC");
  CLI::Option* const measure =
      command
          .add_option("--measure", options.measure,
                      "What to compare (default: kl where the model ran on, else layer_error); see docs/measures.md")
          ->type_name("NAME");
  std::vector<std::string> measure_names;
  for (const MeasureTraits& traits : measures()) measure_names.emplace_back(traits.name);
  offer_values(*measure, std::move(measure_names));
  command.add_option("--goal", options.goal, "Value of the measure whose capacity to find (default: the baseline's)")
      ->check(number_between(0, std::numeric_limits<double>::infinity(), "a goal: a number above 0"))
      ->type_name("X");
  command.add_option("--confidence", options.confidence, "Of the intervals (default: 0.95)")
      ->check(number_between(0, 1, "a confidence: a number between 0 and 1, such as 0.95"))
      ->type_name("SHARE");
  command
      .add_option("--resamples", options.resamples,
                  "Bootstrap resamples per interval, 100 or more (default: 10000); 0: intervals in closed form")
      ->check(resample_count)
      ->type_name("N");
  command.add_option("--seed", options.seed, "Of what is drawn (default: 0)")
      ->check(integer_in(0, kAny, "a seed"))
      ->type_name("N");
  command.add_option("--block", options.block, "Neighbouring queries drawn together (default: by the data)")
      ->check(integer_in(1, kAny, "a number of queries"))
      ->type_name("N");
  command
      .add_option("--resample", options.resample,
                  "Draw queries: an answer about these traces; or traces: about others like them (default: queries)")
      ->check(one_of({"queries", "traces"}))
      ->type_name("queries|traces");
  add_threads_option(command, options.threads);
}

void check_measure(const ResultOptions& options) {
  if (!options.measure.empty()) static_cast<void>(measure_named(options.measure));
}

AnalysisOptions analysis_options(const ResultOptions& options, const ResultSet& results, bool of_layers,
                                 std::vector<std::string>& notes) {
  AnalysisOptions analysis;
  analysis.measure = options.measure.empty()
                         ? default_measure(results, of_layers || !options.filter.layers.empty(), notes)
                         : measure_named(options.measure);
  const bool layers_chosen = !options.filter.layers.empty() || options.filter.full_layers;
  if (layers_chosen && !traits_of(analysis.measure).is_of_layers()) {
    notes.push_back(fmt::format("the {} is of the whole model, whatever layers {} chooses",
                                traits_of(analysis.measure).noun,
                                options.filter.layers.empty() ? "--full-layers" : "--layer"));
  }
  analysis.baseline = options.baseline;
  if (options.goal > 0) analysis.goal = options.goal;
  analysis.bootstrap = bootstrap_options(options);
  return analysis;
}

BootstrapOptions bootstrap_options(const ResultOptions& options) {
  BootstrapOptions bootstrap;
  if (options.resamples >= 0) bootstrap.resamples = options.resamples;
  bootstrap.seed = options.seed;
  bootstrap.confidence = options.confidence;
  bootstrap.block = options.block;
  bootstrap.resampling = options.resample == "traces" ? Resampling::traces : Resampling::queries;
  return bootstrap;
}

ResultSet open_results(const ResultOptions& options) {
  if (options.files.empty()) {
    throw UsageError("no file of results is named; make one with 'kvreplay replay ... -o results.h5'");
  }
  ResultFilter filter = options.filter;
  filter.policies.clear();
  for (const std::string& list : options.filter.policies) {
    for (const std::string& text : split_specs(list)) {
      std::ranges::move(expand_spec(text), std::back_inserter(filter.policies));
    }
  }
  for (const std::string& trace : filter.traces) {
    if (is_file(trace)) filter.trace_digests[trace] = trace_digest(TraceReader(trace));
  }
  // What they are compared with is meant as well.
  if (!filter.policies.empty() && !options.baseline.empty()) filter.policies.push_back(options.baseline);
  return ResultSet::open(paths(options.files), filter);
}

void check_resampling(const ResultOptions& options, const ResultSet& results) {
  if (options.resample != "traces") return;
  const std::vector<StoredResult>& all = results.results();
  const auto another = [&](const StoredResult& result) { return result.trace != all.front().trace; };
  if (std::ranges::any_of(all, another)) return;
  throw UsageError(
      "--resample traces needs two traces at least, and there is one; --resample queries says how sure one trace "
      "makes");
}

std::vector<TraceReader> open_traces(const ResultOptions& options, const ResultSet& results,
                                     std::vector<std::string>& notes) {
  std::vector<TraceReader> traces;
  for (const std::string& file : options.filter.traces) {
    if (!is_file(file)) continue;
    TraceReader trace(file);
    const std::string digest = trace_digest(trace);
    const auto is_of = [&](const StoredResult& result) { return result.trace_digest == digest; };
    if (std::ranges::any_of(results.results(), is_of)) {
      traces.push_back(std::move(trace));
    } else {
      notes.push_back(
          fmt::format("{}: the results of that name are of another capture, so the file adds nothing", file));
    }
  }
  return traces;
}

RetentionSet open_kept(const ResultOptions& options, const ResultSet& results) {
  return RetentionSet::open(paths(options.kept), results);
}

}  // namespace kvreplay::cli
