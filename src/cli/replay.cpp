#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <iterator>
#include <memory>

#include "analysis/summary.h"
#include "base/error.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/plugins.h"
#include "cli/progress.h"
#include "cli/replay_options.h"
#include "notebooks-export/tables/tables.h"
#include "replay/overlap.h"
#include "replay/replay.h"

namespace kvreplay::cli {
namespace {

void run_replay(const ReplayOptions& options) {
  if (options.traces.empty()) {
    throw UsageError("no trace is named: kvreplay replay run.h5 --policy snapkv --capacity 25%");
  }
  std::vector<std::string> notes;
  ReplayRequest request = request_from(options, notes);
  request.residual_sum = true;
  const std::vector<std::string> files = distinct_traces(options, notes);
  check_outputs(options, request);
  omp_set_num_threads(threads_or_all(options.threads));

  const auto started = std::chrono::steady_clock::now();
  std::vector<TraceReplay> replays;
  std::vector<TraceNote> left_out;
  std::vector<OverlapTable> overlap_tables;
  {
    Progress progress;
    const std::vector<TraceReader> traces(files.begin(), files.end());
    check_full_layers(options, traces, request);
    const ReplayEngine engine(traces, request);
    left_out = engine.left_out();
    replays = replay(engine, [&](double share) { progress.show("replaying", share); });
  }
  for (const TraceReplay& replay : replays) std::ranges::move(overlaps(replay), std::back_inserter(overlap_tables));
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();

  // The table is shown even where a file cannot be written: it is what the work was for.
  std::vector<std::string> written;
  std::exception_ptr failure;
  try {
    write_files(options, replays, overlap_tables, written);
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  fmt::print("{}\n\n{}\n{}", headline(replays), policy_table(rank_policies(replays, options.full_layers)),
             legend(replays, options.full_layers, seconds));
  for (const std::string& file : written) fmt::print("wrote {}\n", file);
  std::fflush(stdout);
  print_notes(notes, replays, left_out);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void add_replay_command(CLI::App& app) {
  auto options = std::make_shared<ReplayOptions>();
  CLI::App* command = app.add_subcommand("replay", "Replay eviction policies over traces and measure what they lose");
  add_request_options(*command, *options, true);
  add_plugin_option(*command);
  add_output_options(*command, *options);
  command->callback([options]() { run_replay(*options); });
}

}  // namespace kvreplay::cli
