#include <fmt/format.h>
#include <fmt/ranges.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <set>

#include "analysis/summary.h"
#include "base/error.h"
#include "base/output_file.h"
#include "cli/commands.h"
#include "cli/plugins.h"
#include "cli/progress.h"
#include "notebooks-export/tables.h"
#include "replay/overlap.h"
#include "replay/replay.h"
#include "replay/results_file.h"

namespace kvreplay::cli {
namespace {

struct ReplayOptions {
  std::vector<std::string> traces;
  std::vector<std::string> policies;
  std::vector<std::string> capacities;
  std::vector<int> eviction_positions;
  std::string heads;
  std::string share;
  std::string results;
  std::string csv;
  std::string json;
  std::string kept;
  int threads = 0;
};

ReplayRequest request_from(const ReplayOptions& options, std::vector<std::string>& notes) {
  ReplayRequest request;
  std::set<std::string> seen;
  for (const std::string& spec : options.policies) {
    Policy policy = make_policy(spec);
    if (!seen.insert(policy.canonical).second) {
      notes.push_back(fmt::format("policy {} is given more than once and replayed once", policy.canonical));
      continue;
    }
    request.policies.push_back(std::move(policy));
  }
  seen.clear();
  for (const std::string& text : options.capacities) {
    CapacityRequest capacity = CapacityRequest::parse(text);
    if (seen.insert(capacity.text).second) request.capacities.push_back(std::move(capacity));
  }
  request.eviction_positions = options.eviction_positions;
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    if (options.heads == name_of(granularity)) request.granularity = granularity;
  }
  for (const Share share : {Share::mean, Share::max, Share::sum}) {
    if (options.share == name_of(share)) request.share = share;
  }
  return request;
}

// A results file that is also a trace to be read, or another result, would be lost.
void check_outputs(const ReplayOptions& options) {
  std::set<std::filesystem::path> taken;
  for (const std::string& trace : options.traces) taken.insert(std::filesystem::weakly_canonical(trace));
  for (const std::string& output : {options.results, options.csv, options.json, options.kept}) {
    if (output.empty()) continue;
    if (!taken.insert(std::filesystem::weakly_canonical(output)).second) {
      throw UsageError(fmt::format("{}: would overwrite a trace or another result; name another file", output));
    }
    // Tells now, not after the work, that a place cannot be written to.
    const OutputFile probe(output);
  }
}

std::string headline(const std::vector<TraceReplay>& replays) {
  const TraceReplay& first = replays.front();
  std::set<std::string> traces;
  std::size_t queries = 0;
  int shortest = first.eviction_position;
  int longest = first.eviction_position;
  for (const TraceReplay& replay : replays) {
    traces.insert(replay.trace);
    queries += replay.evaluation_positions.size();
    shortest = std::min(shortest, replay.eviction_position);
    longest = std::max(longest, replay.eviction_position);
  }
  return fmt::format("{} trace{} of {}, {} layers, {} query heads on {} KV heads; evicted at {}, {} evaluation queries",
                     traces.size(), traces.size() == 1 ? "" : "s", first.model.name, first.model.num_layers,
                     first.model.num_attention_heads, first.model.num_key_value_heads,
                     shortest == longest ? fmt::format("{}", shortest) : fmt::format("{} to {}", shortest, longest),
                     queries);
}

void run_replay(const ReplayOptions& options) {
  std::vector<std::string> notes;
  const ReplayRequest request = request_from(options, notes);
  check_outputs(options);
  if (options.threads > 0) omp_set_num_threads(options.threads);

  const auto started = std::chrono::steady_clock::now();
  std::vector<TraceReplay> replays;
  std::vector<OverlapTable> overlap_tables;
  {
    Progress progress;
    std::vector<TraceReader> traces(options.traces.begin(), options.traces.end());
    for (std::size_t i = 0; i < traces.size(); ++i) {
      const auto total = static_cast<double>(traces.size());
      auto results = replay(traces[i], request, [&](double share) {
        progress.show(options.traces[i], (static_cast<double>(i) + share) / total);
      });
      for (TraceReplay& result : results) {
        for (const std::string& note : result.notes) notes.push_back(fmt::format("{}: {}", result.trace, note));
        std::ranges::move(overlaps(result), std::back_inserter(overlap_tables));
        replays.push_back(std::move(result));
      }
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();

  std::vector<std::string> written;
  if (!options.results.empty()) {
    write_results(options.results, replays, overlap_tables);
    written.push_back(options.results);
  }
  if (!options.kept.empty()) {
    write_kept_sets(options.kept, replays);
    written.push_back(options.kept);
  }
  if (!options.csv.empty() || !options.json.empty()) {
    const std::vector<MeasureSummary> summaries = summarize(replays);
    if (!options.csv.empty()) {
      OutputFile::write_text(options.csv, summary_csv(summaries));
      written.push_back(options.csv);
    }
    if (!options.json.empty()) {
      OutputFile::write_text(options.json, summary_json(replays, summaries, overlap_tables));
      written.push_back(options.json);
    }
  }

  fmt::print("{}\n\n{}\n", headline(replays), policy_table(rank_policies(replays)));
  fmt::print("layer error, head error: ‖ô−o‖/‖o‖ after and before the output projection; recall: attention mass still "
             "cached;\nmeans over layers, heads and evaluation queries, best first. Replayed in {:.1f} s.\n",
             seconds);
  for (const std::string& file : written) fmt::print("wrote {}\n", file);
  std::fflush(stdout);
  for (const std::string& note : notes) fmt::print(stderr, "note: {}\n", note);
}

}  // namespace

void add_replay_command(CLI::App& app) {
  auto options = std::make_shared<ReplayOptions>();
  CLI::App* command = app.add_subcommand("replay", "Replay eviction policies over traces and measure what they lose");
  command->add_option("traces", options->traces, "kvtrace files")->required()->type_name("FILE");
  command->add_option("--policy,-p", options->policies, "Policies, as in restkv(alpha=0.5); see 'kvreplay policies'")
      ->required()
      ->type_name("SPEC");
  add_plugin_option(*command);
  command->add_option("--capacity,-c", options->capacities, "Positions that a head keeps: counts, or shares of the prompt")
      ->required()
      ->delimiter(',')
      ->type_name("N|P%");
  command->add_option("--evict-at", options->eviction_positions, "Positions at which to evict (default: the prompt's end)")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--heads", options->heads, "Who shares a kept set (default: the policy's own, or kv)")
      ->check(CLI::IsMember({"query", "kv", "layer"}));
  command->add_option("--share", options->share, "How shared scores are combined (default: mean)")
      ->check(CLI::IsMember({"mean", "max", "sum"}));
  command->add_option("--output,-o", options->results, "Results at full resolution (HDF5)")->type_name("FILE");
  command->add_option("--csv", options->csv, "Summaries per layer and measure (CSV)")->type_name("FILE");
  command->add_option("--json", options->json, "The same and overlaps (JSON)")->type_name("FILE");
  command->add_option("--kept", options->kept, "Kept sets (HDF5)")->type_name("FILE");
  command->add_option("--threads", options->threads, "Threads (default: all cores); results do not depend on it")
      ->check(CLI::Range(1, 4096));
  command->callback([options]() { run_replay(*options); });
}

}  // namespace kvreplay::cli
