#include "replay/query_statistics.h"

#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "base/printable.h"
#include "cli/commands.h"
#include "cli/options.h"

namespace kvreplay::cli {
namespace {

struct QueryStatisticsOptions {
  std::vector<std::string> traces;
  std::string output;
  int sinks = 4;
  int threads = 0;
};

void run_query_statistics(const QueryStatisticsOptions& options) {
  omp_set_num_threads(threads_or_all(options.threads));
  const std::vector<TraceReader> traces(options.traces.begin(), options.traces.end());
  write_query_statistics(options.output, traces, options.sinks);
  fmt::print("wrote {}\n", printable(options.output));
}

}  // namespace

void add_query_statistics_command(CLI::App& app) {
  auto options = std::make_shared<QueryStatisticsOptions>();
  CLI::App* command = app.add_subcommand(
      "query-statistics",
      "Write what a model's queries are like over several traces, for expected-attention and triattention");
  command->add_option("traces", options->traces, "Traces of one model, with all prompt queries or a window of them")
      ->required()
      ->type_name("TRACE");
  command->add_option("-o,--output", options->output, "Means, covariances and magnitudes of every query head (HDF5)")
      ->required()
      ->check(names_a_file)
      ->type_name("FILE");
  command->add_option("--sinks", options->sinks, "First positions whose queries do not count (default: 4)")
      ->check(integer_in(0, 1 << 20, "a number of positions"))
      ->type_name("N");
  add_threads_option(*command, options->threads);
  command->callback([options]() { run_query_statistics(*options); });
}

}  // namespace kvreplay::cli
