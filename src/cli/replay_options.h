// What the commands that replay policies have in common: their options, what becomes of them, and what is said about
// the results.
#pragma once

#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "replay/engine.h"
#include "replay/overlap.h"
#include "replay/replay.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace kvreplay::cli {

/// What to replay, as it was given.
struct ReplayOptions {
  std::vector<std::string> traces;
  std::vector<std::string> policies;  ///< with braces
  std::vector<std::string> capacities;
  std::vector<int> eviction_positions;
  std::string evaluate_from;  ///< a position or "prompt"; empty: not given
  std::string heads;
  std::string share;
  bool rank_agreement = false;
  bool strict = false;
  bool full_layers = false;
  std::string results;
  std::string csv;
  std::string json;
  std::string kept;
  int threads = 0;
};

/// The options that name traces, policies and capacities; where they are required, CLI11 says so.
void add_request_options(CLI::App& command, ReplayOptions& options, bool required);

/// Of them those that say what is decided, without what is evaluated and what traces are read.
void add_setting_options(CLI::App& command, ReplayOptions& options, bool required);

/// The options that name what is written, and the number of threads.
void add_output_options(CLI::App& command, ReplayOptions& options);

/// The request that the options stand for; what was left out is told in `notes`. Throws UsageError.
ReplayRequest request_from(const ReplayOptions& options, std::vector<std::string>& notes);

/// With `full_layers`, throws UsageError where no layer of a trace holds the whole prompt at one of the evictions.
void check_full_layers(const ReplayOptions& options, std::span<const TraceReader> traces, const ReplayRequest& request);

/// The traces without those that are given twice, which would count twice in every mean.
std::vector<std::string> distinct_traces(const ReplayOptions& options, std::vector<std::string>& notes);

/// The files that the policies of a request read, as they name them.
std::set<std::string> policy_files(const ReplayRequest& request);

/// Throws UsageError where an output would replace what is read, or another output, and Error where one cannot be
/// written to: now, not after the work.
void check_outputs(const ReplayOptions& options, const ReplayRequest& request);

/// Writes the outputs that were asked for; `written` tells how far it came where it throws Error.
void write_files(const ReplayOptions& options, const std::vector<TraceReplay>& replays,
                 const std::vector<OverlapTable>& overlap_tables, std::vector<std::string>& written);

/// What was replayed: a line, and where models differ another one for each.
/// `noun`: what each was a run of.
std::string headline(const std::vector<TraceReplay>& replays, const std::string& noun = "trace");

/// What the table's numbers are.
std::string legend(const std::vector<TraceReplay>& replays, bool full_layers, double seconds);

/// Tells notes on standard error, those of replays and of what was left out too; the same note about several traces is
/// one line.
void print_notes(const std::vector<std::string>& notes, const std::vector<TraceReplay>& replays,
                 const std::vector<TraceNote>& left_out);

}  // namespace kvreplay::cli
