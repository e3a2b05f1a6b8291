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

// Kept sets alone, for programs that evict by them.
void draw_sets(const ReplayOptions& options, const ReplayEngine& engine, const std::vector<std::string>& notes,
               std::chrono::steady_clock::time_point started) {
  std::vector<TraceReplay> replays;
  {
    Progress progress;
    replays = decide(engine, [&](double share) { progress.show("deciding", share); });
  }
  std::vector<std::string> written;
  write_files(options, replays, {}, written);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  fmt::print("{}\nNothing was measured. {:.1f} s.\nwrote {}\n", headline(replays), seconds, options.kept);
  std::fflush(stdout);
  print_notes(notes, replays, engine.left_out());
}

void run_replay(const ReplayOptions& options, bool no_measures) {
  if (options.traces.empty()) {
    throw UsageError("no trace is named: kvreplay replay run.h5 --policy snapkv --capacity 25%");
  }
  if (no_measures && options.kept.empty()) {
    throw UsageError("--no-measures draws kept sets alone: say where to with --kept FILE");
  }
  if (no_measures && !(options.results.empty() && options.csv.empty() && options.json.empty())) {
    throw UsageError("--no-measures: -o, --csv and --json hold what is measured; leave them out, or measure");
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
    const std::vector<TraceReader> traces(files.begin(), files.end());
    check_full_layers(options, traces, request);
    const ReplayEngine engine(traces, request);
    if (no_measures) return draw_sets(options, engine, notes, started);
    left_out = engine.left_out();
    Progress progress;
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
  const auto no_measures = std::make_shared<bool>(false);
  command->add_flag("--no-measures", *no_measures, "Draw kept sets alone, for --kept, and measure nothing");
  command->callback([options, no_measures]() { run_replay(*options, *no_measures); });
}

}  // namespace kvreplay::cli
