#include "cli/replay_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <system_error>
#include <utility>

#include "analysis/summary.h"
#include "base/error.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "cli/options.h"
#include "notebooks-export/tables/tables.h"
#include "policy/expansion.h"
#include "policy/spec.h"
#include "replay/results_file.h"
#include "replay/trace_source.h"

namespace kvreplay::cli {
namespace {

// A policy's spec, or a file that was meant as a trace.
Policy policy_from(const std::string& spec) {
  try {
    return make_policy(spec);
  } catch (const UsageError&) {
    std::error_code ignored;  // a spec may be no possible name of a file
    if (!std::filesystem::exists(spec, ignored)) throw;
    throw UsageError(fmt::format(
        "--policy: {} is a file, not a policy; name a policy after --policy, traces before it or after", spec));
  }
}

std::string range_of(const std::set<int>& positions) {
  return positions.size() == 1 ? fmt::format("{}", *positions.begin())
                               : fmt::format("{} to {}", *positions.begin(), *positions.rbegin());
}

// Policies that several specs stand for. A grid may hold very many.
void note_repeated(const std::set<std::string>& repeated, std::vector<std::string>& notes) {
  constexpr std::size_t kTold = 5;
  std::size_t told = 0;
  for (const std::string& policy : repeated) {
    if (told++ == kTold) {
      notes.push_back(fmt::format("so are {} more", counted(repeated.size() - kTold, "policy")));
      return;
    }
    notes.push_back(fmt::format("policy {} is given more than once and replayed once", policy));
  }
}

// One name for a file, however it is written; also for what does not exist yet or cannot be looked at.
std::filesystem::path place_of(const std::string& path) {
  std::error_code failure;
  const auto place = std::filesystem::weakly_canonical(path, failure);
  return failure ? std::filesystem::absolute(path).lexically_normal() : place;
}

// Files that a policy reads: an output must not replace them.
void add_input_files(const std::string& spec, std::set<std::string>& files) {
  bool first = true;
  for (const SpecPart& part : parse_spec(spec)) {
    const Method& method = *find_method(fmt::format("{}{}", std::exchange(first, false) ? "" : "+", part.name));
    const Arguments arguments(part, method.parameters);
    for (const Parameter& parameter : method.parameters) {
      const std::string& value = arguments.text(parameter.name);
      if (value.empty()) continue;
      if (parameter.kind == Parameter::Kind::file) files.insert(value);
      if (parameter.kind == Parameter::Kind::spec) add_input_files(value, files);
    }
  }
}

constexpr std::string_view kFromPromptEnd = "prompt";

std::string is_evaluation_start(const std::string& value) {
  const std::string wrong = integer_in(1, std::numeric_limits<int>::max(), "a position to evaluate from")(value);
  return value == kFromPromptEnd || wrong.empty() ? "" : wrong + ", or prompt";
}

// What such a value stands for in a request.
int evaluation_start(const std::string& value) { return value == kFromPromptEnd ? kPromptEnd : std::stoi(value); }

std::string shape_of(const ModelInfo& model) {
  const auto count = [](int number) { return static_cast<std::size_t>(number); };
  return fmt::format("{}, {} on {}", counted(count(model.num_layers), "layer"),
                     counted(count(model.num_attention_heads), "query head"),
                     counted(count(model.num_key_value_heads), "KV head"));
}

}  // namespace

void add_request_options(CLI::App& command, ReplayOptions& options, bool required) {
  command.add_option("traces", options.traces, "kvtrace files")->type_name("FILE");
  add_setting_options(command, options, required);
  command
      .add_option("--evaluate-from", options.evaluate_from,
                  "First position that is evaluated, or prompt: the prompt's end (default: the last of --evict-at)")
      ->check(is_evaluation_start)
      ->type_name("N|prompt");
  command.add_flag("--full-layers", options.full_layers,
                   "Means over the layers alone that hold the whole prompt, without those with a sliding window");
  command.add_flag("--rank-agreement", options.rank_agreement,
                   "Also measure how far scores rank positions as oracle-attention does (Spearman, Kendall)");
}

void add_setting_options(CLI::App& command, ReplayOptions& options, bool required) {
  const auto any_position = integer_in(1, std::numeric_limits<int>::max(), "a position to evict at");
  CLI::Option* const policies =
      command
          .add_option("-p,--policy", options.policies,
                      "Policies, as in restkv(alpha=0.5); {0.1:0.9:0.1} and {a,b} stand for many; see 'kvreplay "
                      "policies'")
          ->required(required)
          ->type_name("SPEC,...");
  CLI::Option* const capacities =
      command
          .add_option(
              "-c,--capacity", options.capacities,
              "Positions that a head keeps: counts, or shares of what a layer holds of the prompt, as in 64,128,25%")
          ->required(required)
          ->delimiter(',')
          ->type_name("N|P%,...");
  CLI::Option* const evictions = command
                                     .add_option("--evict-at", options.eviction_positions,
                                                 "Positions at which to evict (default: the prompt's end)")
                                     ->delimiter(',')
                                     ->check(any_position)
                                     ->type_name("N,...");
  take_several(*policies, looks_like_policies);
  take_several(*capacities, looks_like_capacities);
  take_several(*evictions, looks_like_counts);
  command.add_option("--heads", options.heads, "Who shares a kept set (default: the policy's own, or kv)")
      ->check(one_of({"query", "kv", "layer"}))
      ->type_name("query|kv|layer");
  command.add_option("--share", options.share, "How shared scores are combined (default: the policy's own, or mean)")
      ->check(one_of({"mean", "max", "sum"}))
      ->type_name("mean|max|sum");
  command.add_flag("--strict", options.strict,
                   "Refuse what cannot be replayed; without it that is left out with a note");
}

void add_output_options(CLI::App& command, ReplayOptions& options) {
  command.add_option("-o,--output", options.results, "Results at full resolution (HDF5); replaced if it exists")
      ->check(names_a_file)
      ->type_name("FILE");
  command.add_option("--csv", options.csv, "Summaries per layer and measure (CSV)")
      ->check(names_a_file)
      ->type_name("FILE");
  command.add_option("--json", options.json, "The same and overlaps (JSON)")->check(names_a_file)->type_name("FILE");
  command.add_option("--kept", options.kept, "Kept sets (HDF5)")->check(names_a_file)->type_name("FILE");
  add_threads_option(command, options.threads);
}

ReplayRequest request_from(const ReplayOptions& options, std::vector<std::string>& notes) {
  ReplayRequest request;
  std::set<std::string> seen;
  std::set<std::string> repeated;
  std::vector<std::string> texts;
  for (const std::string& list : options.policies) std::ranges::move(split_specs(list), std::back_inserter(texts));
  for (const std::string& text : texts) {
    for (const std::string& spec : expand_spec(text)) {
      Policy policy = policy_from(spec);
      if (!seen.insert(policy.canonical).second) {
        repeated.insert(policy.canonical);
        continue;
      }
      request.policies.push_back(std::move(policy));
      if (request.policies.size() > kMostSpecs) {
        throw UsageError(fmt::format("--policy: more than {} policies", kMostSpecs));
      }
    }
  }
  note_repeated(repeated, notes);
  seen.clear();
  for (const std::string& text : options.capacities) {
    CapacityRequest capacity = CapacityRequest::parse(text);
    if (seen.insert(capacity.text).second) request.capacities.push_back(std::move(capacity));
  }
  for (const int position : options.eviction_positions) {
    if (std::ranges::find(request.eviction_positions, position) == request.eviction_positions.end()) {
      request.eviction_positions.push_back(position);
    }
  }
  if (!options.evaluate_from.empty()) request.evaluate_from = evaluation_start(options.evaluate_from);
  request.granularity = granularity_named(options.heads);
  request.share = share_named(options.share);
  request.rank_agreement = options.rank_agreement;
  request.strict = options.strict;
  return request;
}

void check_full_layers(const ReplayOptions& options, std::span<const TraceReader> traces,
                       const ReplayRequest& request) {
  if (!options.full_layers) return;
  for (const TraceReader& trace : traces) {
    const TraceInfo& info = trace.info();
    std::vector<int> evictions = request.eviction_positions;
    if (evictions.empty()) evictions.push_back(info.prompt_length);
    for (const int eviction : evictions) {
      if (std::ranges::count(held_positions(info, eviction), eviction) > 0) continue;
      throw UsageError(
          fmt::format("--full-layers: {}: no layer holds all {} positions before the eviction: all have a smaller "
                      "sliding window; leave it out",
                      trace.path().string(), eviction));
    }
  }
}

std::vector<std::string> distinct_traces(const ReplayOptions& options, std::vector<std::string>& notes) {
  std::vector<std::string> traces;
  std::set<std::filesystem::path> seen;
  for (const std::string& trace : options.traces) {
    if (seen.insert(place_of(trace)).second) {
      traces.push_back(trace);
    } else {
      notes.push_back(fmt::format("{}: is given more than once and replayed once", trace));
    }
  }
  return traces;
}

std::set<std::string> policy_files(const ReplayRequest& request) {
  std::set<std::string> files;
  for (const Policy& policy : request.policies) add_input_files(policy.canonical, files);
  return files;
}

void check_outputs(const ReplayOptions& options, const ReplayRequest& request) {
  std::set<std::filesystem::path> taken;
  for (const std::string& trace : options.traces) taken.insert(place_of(trace));
  for (const std::string& file : policy_files(request)) taken.insert(place_of(file));
  for (const std::string& output : {options.results, options.csv, options.json, options.kept}) {
    if (output.empty()) continue;
    if (!taken.insert(place_of(output)).second) {
      throw UsageError(fmt::format("{}: would overwrite what is read, or another result; name another file", output));
    }
    // Tells now, not after the work, that a place cannot be written to.
    const OutputFile probe(output);
  }
}

void write_files(const ReplayOptions& options, const std::vector<TraceReplay>& replays,
                 const std::vector<OverlapTable>& overlap_tables, std::vector<std::string>& written) {
  if (!options.results.empty()) {
    write_results(options.results, replays, overlap_tables);
    written.push_back(options.results);
  }
  if (!options.kept.empty()) {
    write_kept_sets(options.kept, replays);
    written.push_back(options.kept);
  }
  if (options.csv.empty() && options.json.empty()) return;
  const std::vector<MeasureSummary> summaries = summarize(replays, options.full_layers);
  if (!options.csv.empty()) {
    OutputFile::write_text(options.csv, summary_csv(summaries));
    written.push_back(options.csv);
  }
  if (!options.json.empty()) {
    OutputFile::write_text(options.json, summary_json(replays, summaries, overlap_tables));
    written.push_back(options.json);
  }
}

std::string headline(const std::vector<TraceReplay>& replays, const std::string& noun) {
  std::set<std::string> traces;
  std::set<int> evictions;
  std::set<int> later;  // where evaluation begins after the eviction
  std::vector<std::string> models;
  std::set<std::pair<std::string, int>> queries;  // which traces' evictions may share
  for (const TraceReplay& replay : replays) {
    traces.insert(replay.trace);
    evictions.insert(replay.eviction_position);
    if (replay.evaluate_from > replay.eviction_position) later.insert(replay.evaluate_from);
    for (const int position : replay.evaluation_positions) queries.emplace(replay.trace, position);
    std::string model = fmt::format("{}: {}", printable(replay.model.name), shape_of(replay.model));
    if (std::ranges::find(models, model) == models.end()) models.push_back(std::move(model));
  }
  const std::string work =
      fmt::format("evicted at {}{}, {}", range_of(evictions),
                  later.empty() ? "" : fmt::format(", evaluated from {} on", range_of(later)),
                  queries.size() == 1 ? "1 evaluation query" : fmt::format("{} evaluation queries", queries.size()));
  if (models.size() == 1) return fmt::format("{} of {}; {}", counted(traces.size(), noun), models.front(), work);
  std::string text = fmt::format("{} of {}; {}", counted(traces.size(), noun), counted(models.size(), "model"), work);
  for (const std::string& model : models) text += fmt::format("\n  {}", model);
  return text;
}

std::string legend(const std::vector<TraceReplay>& replays, bool full_layers, double seconds) {
  std::set<std::string> traces;
  std::set<int> evictions_of_one;
  bool spans = false;
  bool ranks = false;
  std::map<std::pair<std::string, std::string>, std::size_t> places;  // of each policy and capacity
  bool windowed = false;
  bool residuals = false;
  for (const TraceReplay& replay : replays) {
    residuals = residuals || std::ranges::any_of(replay.results, &ReplayResult::residual_norms);
    for (const ReplayResult& result : replay.results) ++places[{result.policy, result.capacity_request}];
    traces.insert(replay.trace);
    if (replay.trace == replays.front().trace) evictions_of_one.insert(replay.eviction_position);
    spans = spans || !replay.spans.empty();
    windowed = windowed || std::ranges::min(replay.held) < replay.eviction_position;
    ranks = ranks || std::ranges::any_of(replay.results, &ReplayResult::rank_agreement);
  }
  const bool nothing_to_choose = std::ranges::any_of(replays, [](const TraceReplay& replay) {
    return std::ranges::any_of(replay.results, &ReplayResult::nothing_to_choose);
  });
  const bool scheduled = std::ranges::any_of(
      replays, [](const TraceReplay& replay) { return std::ranges::any_of(replay.results, &ReplayResult::scheduled); });
  std::string over;
  if (traces.size() > 1) over = "; every trace weighs the same";
  if (evictions_of_one.size() > 1) {
    over = traces.size() > 1 ? "; every trace and eviction position weighs the same"
                             : "; every eviction position weighs the same";
  }
  std::string partial;
  if (std::ranges::any_of(places, [&](const auto& setting) { return setting.second < replays.size(); })) {
    partial =
        "on: how many traces and eviction positions a row is of; compare rows of the same, those of most stand "
        "first;\n";
  }
  return fmt::format(
      "{}layer error, head error: ‖ô−o‖/‖o‖ after and before the output projection; recall: attention mass still "
      "cached;\nB/token (KiB): keys and values of the kept sets per token of the prompt, 2 bytes a number; *: more or "
      "less than\nthe capacity costs in every KV head, so not an equal budget;\n{}{}{}{}{}{}means over {}layers, heads "
      "and evaluation queries{}.\nBest first at each capacity{}. Replayed in {:.1f} s.\n",
      residuals ? "residual error: by how much what a layer adds to the residual stream changes, over the stream's "
                  "length; root of\nthe mean square over the last two thirds of the layers;\n"
                : "",
      !windowed ? ""
      : full_layers
          ? "means, kept and its share are of full layers, B/token is of all layers;\n"
          : "of held: share of the positions that a layer's sliding window leaves it (--full-layers leaves such\n"
            "layers out of means);\n",
      nothing_to_choose ? "†: nothing to choose at that capacity, so it says nothing of the policy's choice;\n" : "",
      partial,
      spans ? "spans kept: share of the annotated spans' positions that is kept, mean over layers and heads;\n" : "",
      ranks ? "Spearman, Kendall: how far scores rank positions as oracle-attention does;\n" : "",
      scheduled
          ? "peak: the most positions that a query sees; turnover: of what an eviction leaves, the share that the "
            "next one takes;\n"
          : "",
      full_layers ? "full " : "", over, residuals ? ", by the residual error" : "", seconds);
}

void print_notes(const std::vector<std::string>& notes, const std::vector<TraceReplay>& replays,
                 const std::vector<TraceNote>& left_out) {
  for (const std::string& note : notes) fmt::print(stderr, "note: {}\n", note);
  struct About {
    std::string note;
    std::vector<std::string> traces = {};
    std::vector<int> evictions = {};  // of the first of them
  };
  std::vector<About> about;
  std::map<std::string, std::size_t> place;  // a grid may bring a note for each of its policies
  const auto add = [&](const std::string& trace, const std::string& note) -> About& {
    const auto [found, is_new] = place.try_emplace(note, about.size());
    if (is_new) about.push_back({.note = note});
    About& of_note = about[found->second];
    // Replays of a trace follow each other.
    if (of_note.traces.empty() || of_note.traces.back() != trace) of_note.traces.push_back(trace);
    return of_note;
  };
  std::map<std::string, std::size_t> evictions;
  for (const TraceReplay& replay : replays) {
    ++evictions[replay.trace];
    for (const std::string& note : replay.notes) {
      About& of_note = add(replay.trace, note);
      if (of_note.traces.size() == 1) of_note.evictions.push_back(replay.eviction_position);
    }
  }
  for (const TraceNote& about_trace : left_out) add(about_trace.trace, about_trace.note);
  for (const About& each : about) {
    const std::size_t others = each.traces.size() - 1;
    // What is true of some evictions alone says of which.
    const bool of_some = !each.evictions.empty() && each.evictions.size() < evictions[each.traces.front()];
    fmt::print(stderr, "note: {}{}{}: {}\n", each.traces.front(),
               of_some ? fmt::format(" evicted at {}", fmt::join(each.evictions, ", ")) : "",
               others == 0 ? "" : fmt::format(" and {} more trace{}", others, others == 1 ? "" : "s"), each.note);
  }
}

}  // namespace kvreplay::cli
