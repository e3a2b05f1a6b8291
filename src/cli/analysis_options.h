// What the commands that look at results have in common: their options, and what becomes of them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "analysis/analysis.h"
#include "trace/reader.h"

namespace CLI {
class App;
}

namespace kvreplay::cli {

/// Which results to look at and how, as it was given.
struct ResultOptions {
  std::vector<std::string> files;
  std::vector<std::string> kept;
  ResultFilter filter;
  std::string baseline;
  std::string measure;  ///< empty: none is named
  double goal = 0;      ///< 0: none is given
  double confidence = 0.95;
  int resamples = -1;  ///< −1: none is given
  std::uint64_t seed = 0;
  int block = 0;
  std::string resample = "queries";
  int threads = 0;
};

/// The options that name results and what is computed of them.
void add_result_options(CLI::App& command, ResultOptions& options);

/// Throws UsageError where a measure is named that there is not.
void check_measure(const ResultOptions& options);

/// What they stand for. Where no measure is named, that of the results goes by; with `of_layers` one that layers have.
/// `notes` receives what one may wonder about.
AnalysisOptions analysis_options(const ResultOptions& options, const ResultSet& results, bool of_layers,
                                 std::vector<std::string>& notes);

BootstrapOptions bootstrap_options(const ResultOptions& options);

/// The results and kept sets. Throws as ResultSet, RetentionSet and TraceReader do.
ResultSet open_results(const ResultOptions& options);

/// Those of the chosen traces that are named by their files: they know the tokens, and all that a replay began with.
/// One that only has the name of another capture is told in `notes`. Throws as TraceReader does.
std::vector<TraceReader> open_traces(const ResultOptions& options, const ResultSet& results,
                                     std::vector<std::string>& notes);

/// Throws UsageError where traces are to be drawn that one trace has no others of.
void check_resampling(const ResultOptions& options, const ResultSet& results);

RetentionSet open_kept(const ResultOptions& options, const ResultSet& results);

}  // namespace kvreplay::cli
