#include "sweep/sweep.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include "analysis/parameter_effects.h"
#include "analysis/summary.h"
#include "base/buffer.h"
#include "base/error.h"
#include "base/file_text.h"
#include "base/memory.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "base/work.h"
#include "cli/commands.h"
#include "cli/interruption.h"
#include "cli/launched_ranks.h"
#include "cli/options.h"
#include "cli/plugins.h"
#include "cli/progress.h"
#include "cli/replay_options.h"
#include "cli/together.h"
#include "hdf5/cache.h"
#include "notebooks-export/tables/tables.h"
#include "policy/expansion.h"
#include "policy/parameter.h"
#include "policy/plugin_interface.h"
#include "replay/results_file.h"
#include "sweep/configuration.h"
#include "sweep/unit_store.h"

namespace kvreplay::cli {
namespace {

struct SweepOptions {
  ReplayOptions replay;
  std::vector<std::string> plugins;
  std::string memory;
  std::string config;
  bool print_config = false;
  bool dry_run = false;
  bool resume = false;
};

// What a configuration file may hold: options by their long names, and the traces.
const std::vector<std::string>& configuration_keys() {
  static const std::vector<std::string> keys = {
      "traces",      "policy", "capacity", "evict-at", "evaluate-from", "heads",  "share",   "rank-agreement", "strict",
      "full-layers", "output", "csv",      "json",     "kept",          "memory", "threads", "plugin"};
  return keys;
}

CLI::Option& option_of(CLI::App& command, const std::string& key) {
  return *command.get_option(key == "traces" ? key : "--" + key);
}

std::string configuration_text(const std::string& path) {
  try {
    return file_text(path);
  } catch (const Error& error) {
    throw UsageError(fmt::format("--config: {}", error.what()));
  }
}

// Gives the options what the file says, unless the command line says it already.
void read_configuration_file(CLI::App& command, const std::string& path) {
  for (ConfigurationEntry& entry : read_configuration(configuration_text(path), path)) {
    const std::vector<std::string>& keys = configuration_keys();
    if (std::ranges::find(keys, entry.key) == keys.end()) {
      throw UsageError(fmt::format("{}: line {}: unknown option '{}'.{} Known are: {}", path, entry.line,
                                   printable(entry.key), suggestion(entry.key, keys), fmt::join(keys, ", ")));
    }
    CLI::Option& option = option_of(command, entry.key);
    if (option.count() > 0 || entry.values.empty()) continue;
    try {
      option.add_result(std::move(entry.values));
      option.run_callback();
    } catch (const CLI::ParseError& error) {
      throw UsageError(fmt::format("{}: line {}: {}", path, entry.line, error.what()));
    }
  }
}

// The options as a configuration file that says the same.
std::string configuration_of(CLI::App& command) {
  std::vector<ConfigurationEntry> entries;
  for (const std::string& key : configuration_keys()) {
    const CLI::Option& option = option_of(command, key);
    if (option.count() == 0) continue;
    entries.push_back({key, option.results(), option.get_items_expected_max() > 1, 0});
  }
  return write_configuration(entries);
}

void require(bool given, const std::string& what) {
  if (!given) throw UsageError(fmt::format("{} is required, on the command line or in a --config file", what));
}

// What the process takes beside the engine and whole results, in bytes, as the system counts it.
struct TakenMemory {
  Index now = 0;      ///< program, libraries, traces, settings, and what the heap and threads need on top
  Index storing = 0;  ///< while units are done
  Index merging = 0;  ///< while all of them become the results
};

// Everything that is known before the work begins.
struct Preparation {
  ReplayRequest request;
  std::vector<std::string> notes;
  std::vector<TraceReader> traces;
  std::unique_ptr<ReplayEngine> engine;
  std::optional<UnitStore> store;
  std::vector<ReplayUnit> left;                ///< units that are not done yet
  std::vector<std::vector<ReplayUnit>> parts;  ///< of each process
  TakenMemory taken;                           ///< counted once the traces are open and before any work
  Index at_once = Index{64} << 20;             ///< bytes of whole results that are put together at a time
};

// Tensors of a trace that HDF5 has to unpack.
struct Packed {
  Index tensors = 0;
  Index largest_chunks = 0;  ///< bytes of a chunk, at most a whole tensor, as it is stored and as it is unpacked
};

Packed packed_tensors(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  const Index width = info.model.head_dim * static_cast<Index>(size_of(trace.element_type()));
  const Index heads = info.model.num_attention_heads;
  Packed packed;
  const auto count = [&packed](Index bytes) {
    ++packed.tensors;
    packed.largest_chunks = std::max(packed.largest_chunks, 2 * bytes);
  };
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values}) {
      if (!trace.reads_directly(layer, tensor)) count(info.model.num_key_value_heads * info.num_tokens() * width);
    }
    if (!trace.reads_directly(layer, HeadTensor::queries)) {
      count(heads * static_cast<Index>(info.query_positions.size()) * width);
    }
    if (trace.has_output_projection(layer) && !trace.reads_projection_directly(layer)) {
      count(info.model.hidden_size * heads * width);
    }
  }
  return packed;
}

TakenMemory taken_memory(const SweepOptions& options, const Preparation& sweep) {
  // Pages of the program that the work reaches, and what lies unused between small blocks of the heap.
  constexpr Index kProgram = Index{4} << 20;
  constexpr Index kThread = Index{1} << 20;
  constexpr Index kRow = 1024;  // of the tables at the end
  const std::vector<TraceReplay>& outlines = sweep.engine->outlines();
  TakenMemory taken;
  taken.now = resident_memory() + kProgram + omp_get_max_threads() * kThread;
  Index unpacking = 0;
  for (const TraceReader& trace : sweep.traces) {
    const Packed packed = packed_tensors(trace);
    unpacking = std::max(unpacking, packed.largest_chunks);
    if (options.memory.empty()) taken.now += packed.tensors * hdf5::kChunksKept;
  }
  taken.now += unpacking;
  taken.storing = memory_of_storing(outlines);
  Index settings = 0;
  for (const TraceReplay& outline : outlines) settings = std::max(settings, static_cast<Index>(outline.results.size()));
  taken.merging =
      memory_of_reading(outlines) + settings * kRow + hdf5::kFileMemory * (options.replay.kept.empty() ? 1 : 2);
  return taken;
}

// The most that the process takes, however the work went until now.
Index promised_memory(const Preparation& sweep) {
  const TakenMemory& taken = sweep.taken;
  const std::vector<TraceReplay>& outlines = sweep.engine->outlines();
  Index results = 0;
  for (const TraceReplay& outline : outlines) {
    results = std::max(results, memory_of_result({&outline, 1}) * static_cast<Index>(outline.results.size()));
  }
  results = std::max(std::min(results, sweep.at_once), memory_of_result(outlines));
  return std::max({peak_resident_memory(), taken.now + taken.storing + sweep.engine->memory(),
                   taken.now + taken.merging + results});
}

// Keeps the process to `limit` bytes. Throws Error where that cannot be.
void limit_memory(Index limit, Preparation& sweep) {
  const TakenMemory& taken = sweep.taken;
  const Index result = memory_of_result(sweep.engine->outlines());
  const Index least = std::max({peak_resident_memory(), taken.now + taken.storing + sweep.engine->least_memory(),
                                taken.now + taken.merging + result});
  if (limit < least) {
    // What is resident of the program and its libraries differs a little from one run to the next.
    constexpr Index kMiB = Index{1} << 20;
    throw Error(
        fmt::format("{} of memory are too little: the process takes {} at least, {} of them whatever it replays; "
                    "give --memory {}M, or replay fewer settings at once",
                    size_text(limit), enough_text(least), size_text(taken.now), least / kMiB + 2));
  }
  sweep.engine->limit_memory(limit - taken.now - taken.storing);
  sweep.at_once = std::clamp(limit - taken.now - taken.merging, result, sweep.at_once);
}

void prepare(const SweepOptions& options, Preparation& sweep) {
  for (const std::string& plugin : options.plugins) load_plugin(plugin);
  require(!options.replay.traces.empty(), "a trace");
  require(!options.replay.policies.empty(), "--policy");
  require(!options.replay.capacities.empty(), "--capacity");
  require(options.dry_run || !options.replay.results.empty(), "--output");
  sweep.request = request_from(options.replay, sweep.notes);
  if (sweep.request.policies.size() > kMostSpecs / sweep.request.capacities.size()) {
    throw UsageError(fmt::format("more than {} settings: {}, each at {}", kMostSpecs,
                                 counted(sweep.request.policies.size(), "policy"),
                                 counted(sweep.request.capacities.size(), "capacity")));
  }
  if (!options.memory.empty()) {
    give_memory_back();
    hdf5::keep_little();
  }
  const std::vector<std::string> files = distinct_traces(options.replay, sweep.notes);
  for (const std::string& file : files) sweep.traces.emplace_back(file);
  check_full_layers(options.replay, sweep.traces, sweep.request);
  sweep.engine = std::make_unique<ReplayEngine>(sweep.traces, sweep.request);
  sweep.taken = taken_memory(options, sweep);
  if (!options.memory.empty()) limit_memory(memory_size(options.memory), sweep);
  sweep.left = sweep.engine->units();
}

std::vector<std::filesystem::path> files_of(const SweepOptions& options, const ReplayRequest& request) {
  std::vector<std::filesystem::path> files(options.plugins.begin(), options.plugins.end());
  for (const std::string& file : policy_files(request)) files.emplace_back(file);
  return files;
}

// How much there is to do.
void print_plan(const Preparation& sweep, const Ranks& ranks, const Speed& speed, std::size_t finished) {
  std::size_t settings = 0;
  const std::vector<TraceReplay>& outlines = sweep.engine->outlines();
  for (const TraceReplay& outline : outlines) settings += outline.results.size();
  const std::size_t units = sweep.engine->units().size();
  fmt::print(stderr, "sweep: {}: {}, {}, {}, {}\n", counted(settings, "setting"),
             counted(sweep.request.policies.size(), "policy"), counted(sweep.request.capacities.size(), "capacity"),
             counted(std::max<std::size_t>(1, sweep.request.eviction_positions.size()), "eviction position"),
             counted(sweep.traces.size(), "trace"));
  double seconds = 0;
  for (const std::vector<ReplayUnit>& part : sweep.parts) {
    seconds = std::max(seconds, speed.seconds(cost_of(*sweep.engine, part)));
  }
  fmt::print(stderr, "sweep: {}, one per layer, trace and eviction position{}{}\n", counted(units, "unit"),
             finished == 0 ? "" : fmt::format("; {} finished already", finished),
             ranks.size() == 1
                 ? fmt::format("; {}", counted(static_cast<std::size_t>(omp_get_max_threads()), "thread"))
                 : fmt::format("; {} with {} each", counted(static_cast<std::size_t>(ranks.size()), "process"),
                               counted(static_cast<std::size_t>(omp_get_max_threads()), "thread")));
  fmt::print(stderr, "sweep: about {} (a guess, until the first units are done), at most {} of memory{}\n",
             duration_text(std::max(1.0, seconds)), enough_text(promised_memory(sweep)),
             ranks.size() == 1 ? "" : " per process");
}

// Units as text, for the other processes.
std::string text_of(const std::vector<ReplayUnit>& units) {
  std::string text;
  for (const ReplayUnit& unit : units) text += fmt::format("{} {}\n", unit.replay, unit.layer);
  return text;
}

std::vector<ReplayUnit> units_from(const std::string& text) {
  std::istringstream stream(text);
  std::vector<ReplayUnit> units;
  for (ReplayUnit unit; stream >> unit.replay >> unit.layer;) units.push_back(unit);
  return units;
}

// Does this process's part, with a line on the terminal.
void run_part(const Preparation& sweep, Ranks& ranks) {
  const std::vector<ReplayUnit>& part = sweep.parts[static_cast<std::size_t>(ranks.rank())];
  const std::size_t all = sweep.engine->units().size();
  const std::size_t before = all - sweep.left.size();
  const auto tell_interruption = [&](std::size_t done) {
    if (!ranks.is_first()) {
      say_when_interrupted("");
      return;
    }
    const std::string folder = sweep.store->folder().string();
    say_when_interrupted(ranks.size() == 1 ? fmt::format("{} of {} are finished and kept in {}; go on with --resume",
                                                         before + done, counted(all, "unit"), folder)
                                           : fmt::format("finished units are kept in {}; go on with --resume", folder));
  };
  tell_interruption(0);

  const double total = std::max(1.0, cost_of(*sweep.engine, part).operations);
  const std::size_t settings = sweep.engine->outlines().front().results.size();
  const auto started = std::chrono::steady_clock::now();
  const Work work_before = work_done();
  std::atomic<std::size_t> done = 0;
  std::atomic<double> done_cost = 0;
  std::atomic<double> counted_when_done = 0;
  std::optional<Progress> progress;
  if (ranks.is_first()) {
    progress.emplace();
    progress->follow([&]() {
      const Work work = work_done();
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      const double operations = work.operations - work_before.operations;
      // Finished units say how what is counted relates to what a unit takes; until then it is taken as it is.
      double share = done_cost / total;
      if (counted_when_done > 0) {
        share *= operations / counted_when_done;
      } else if (done == 0) {
        share = operations / total;
      }
      return Progress::State{
          fmt::format("settings {}, layers {}/{}, {:.1f} GB/s, {:.1f} GFLOP/s", settings, before + done, all,
                      (work.bytes - work_before.bytes) / seconds / 1e9, operations / seconds / 1e9),
          std::clamp(share, 0.0, 0.999)};
    });
  }
  run_units(*sweep.engine, part, *sweep.store, [&](const ReplayUnit& unit) {
    ++done;
    done_cost = done_cost + sweep.engine->cost(unit).operations;
    counted_when_done = work_done().operations - work_before.operations;
    tell_interruption(done);
    return !ranks.others_stopped();
  });
}

// Reads the finished units, one setting at a time, into all that was asked for. Returns the files written.
// `outlines` are the engine's with all their notes.
std::vector<std::string> write_outputs(const SweepOptions& options, const Preparation& sweep,
                                       const std::vector<TraceReplay>& outlines, PolicyRanking& ranking) {
  const ReplayOptions& files = options.replay;
  ResultsWriter results(files.results, outlines);
  std::optional<KeptSetsWriter> kept;
  std::optional<TextOutput> csv;
  std::optional<TextOutput> json;
  if (!files.kept.empty()) kept.emplace(files.kept);
  if (!files.csv.empty()) csv.emplace(files.csv).add(summary_csv_head());
  if (!files.json.empty()) json.emplace(files.json).add(summary_json_head(outlines));
  bool first = true;
  // What units were done with is not needed any more.
  Buffer::give_back();
  trim_memory();
  for_each_result(outlines, *sweep.store, sweep.at_once, [&](const TraceReplay& replay, const ReplayResult& result) {
    results.add(replay, result);
    ranking.add(replay, result);
    if (kept) kept->add(replay, result);
    if (!csv && !json) return;
    const std::vector<MeasureSummary> rows = summarize(replay, result, files.full_layers);
    if (csv) csv->add(summary_csv_rows(rows));
    if (json) json->add(summary_json_rows(rows, first));
    first = false;
  });
  if (kept) kept->finish();
  if (csv) csv->finish();
  if (json) {
    json->add(summary_json_foot());
    json->finish();
  }
  results.finish();
  std::vector<std::string> written;
  for (const std::string& file : {files.results, files.kept, files.csv, files.json}) {
    if (!file.empty()) written.push_back(file);
  }
  return written;
}

void print_tables(const SweepOptions& options, const Preparation& sweep, const PolicyRanking& ranking, double seconds) {
  constexpr std::size_t kMostRows = 40;
  constexpr std::size_t kBest = 10;
  const std::vector<PolicyRow> rows = ranking.rows();
  const RankingExcerpt shown = excerpt(rows, kMostRows, kBest);
  fmt::print("{}\n\n{}", headline(sweep.engine->outlines()), policy_table(shown.rows));
  if (shown.left_out > 0) {
    fmt::print("Not shown: {} behind the best {} of their capacity; all are in {}.\n",
               counted(shown.left_out, "setting"), kBest,
               options.replay.csv.empty() ? options.replay.results : options.replay.csv);
  }
  const std::vector<ParameterEffect> effects = parameter_effects(rows);
  if (!effects.empty()) {
    fmt::print("\nWhat each parameter changes, on average over all settings that differ in nothing else:\n\n{}",
               parameter_table(effects));
  }
  fmt::print("\n{}", legend(sweep.engine->outlines(), options.replay.full_layers, seconds));
}

// The units of a finished or failed part are kept: says how to go on.
template <class Action>
void with_advice(const Preparation& sweep, const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    throw Error(fmt::format("{}; finished units are kept in {}, go on with --resume", error.what(),
                            sweep.store->folder().string()));
  }
}

void run_sweep(CLI::App& command, const SweepOptions& options) {
  const std::unique_ptr<Ranks> ranks = launched_ranks();
  Preparation sweep;
  const auto started = std::chrono::steady_clock::now();
  together(*ranks, [&]() {
    if (!options.config.empty()) read_configuration_file(command, options.config);
    if (options.print_config) return;
    omp_set_num_threads(threads_of(options.replay.threads, *ranks));
    prepare(options, sweep);
    // Not before the plug-ins are loaded, and by one process: they would see each other's probes.
    if (ranks->is_first()) check_outputs(options.replay, sweep.request);
  });
  if (options.print_config) {
    if (ranks->is_first()) fmt::print("{}", configuration_of(command));
    return;
  }

  std::size_t finished = 0;
  together(*ranks, [&]() {
    if (options.dry_run) return;
    const SweepIdentity identity(sweep.request, sweep.traces, files_of(options, sweep.request));
    sweep.store.emplace(options.replay.results, sweep.engine->outlines(), identity);
    if (!ranks->is_first()) return;
    sweep.store->open(options.resume);
    const std::vector<ReplayUnit> done = sweep.store->finished(sweep.notes);
    const std::set<ReplayUnit> is_done(done.begin(), done.end());
    std::erase_if(sweep.left, [&](const ReplayUnit& unit) { return is_done.contains(unit); });
    finished = done.size();
  });
  sweep.left = units_from(ranks->from_first(text_of(sweep.left)));
  sweep.parts = divide_units(*sweep.engine, sweep.left, ranks->size());
  if (ranks->is_first()) print_plan(sweep, *ranks, guess_speed(), finished);
  if (options.dry_run) {
    if (ranks->is_first()) print_notes(sweep.notes, sweep.engine->outlines(), sweep.engine->left_out());
    return;
  }

  together(*ranks, [&]() {
    with_advice(sweep, [&]() { survey_layers(*sweep.engine, sweep.left, *sweep.store, ranks->rank(), ranks->size()); });
  });
  together(*ranks, [&]() {
    with_advice(sweep, [&]() {
      give_surveys(*sweep.engine, sweep.parts[static_cast<std::size_t>(ranks->rank())], *sweep.store);
      try {
        run_part(sweep, *ranks);
      } catch (...) {
        ranks->announce_stop();
        throw;
      }
    });
  });
  together(*ranks, [&]() {
    if (!ranks->is_first()) return;
    PolicyRanking ranking(options.replay.full_layers);
    std::vector<std::string> written;
    std::vector<TraceReplay> outlines = sweep.engine->outlines();
    with_advice(sweep, [&]() {
      note_stored_outputs(outlines, *sweep.store);
      note_stored_frozen_caches(outlines, *sweep.store);
      written = write_outputs(options, sweep, outlines, ranking);
    });
    sweep.store->remove();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    print_tables(options, sweep, ranking, seconds);
    for (const std::string& file : written) fmt::print("wrote {}\n", file);
    std::fflush(stdout);
    print_notes(sweep.notes, outlines, sweep.engine->left_out());
  });
}

}  // namespace

void add_sweep_command(CLI::App& app) {
  auto options = std::make_shared<SweepOptions>();
  CLI::App* command =
      app.add_subcommand("sweep", "Replay grids of settings, resumably, and say what each parameter changes");
  add_request_options(*command, options->replay, false);
  add_plugin_option(*command, options->plugins);
  add_output_options(*command, options->replay);
  command->add_option("--memory", options->memory, "Most memory of a process, as in 8G; smaller pieces where needed")
      ->check(is_memory_size)
      ->type_name("SIZE");
  command->add_option("--config", options->config, "TOML file with these options; the command line wins over it")
      ->check(names_a_file)
      ->type_name("FILE");
  command->add_flag("--print-config", options->print_config, "Print such a file for these options, and end");
  command->add_flag("--dry-run", options->dry_run, "Say how much there is to do, and end");
  command->add_flag("--resume", options->resume, "Go on with a sweep that was interrupted");
  command->callback([command, options]() { run_sweep(*command, *options); });
}

}  // namespace kvreplay::cli
