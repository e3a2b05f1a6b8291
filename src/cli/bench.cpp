#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "kernels/kernels.h"
#include "notebooks-export/tables/tables.h"
#include "replay/roofline.h"
#include "tracer/synthetic/synthetic.h"

namespace kvreplay::cli {
namespace {

struct BenchOptions {
  std::string trace;
  int tokens = 8192;
  int capacity = 160;
  int runs = 5;
  std::string json;
  int threads = 0;
};

// A folder for the trace that is made for the occasion, gone with it.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvreplay-bench-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw Error(fmt::format("{}: cannot be made; set TMPDIR", name));
    path_ = name;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Two layers in the shape of Llama-3-8B.
std::filesystem::path write_trace(const std::filesystem::path& folder, const BenchOptions& options) {
  tracer::SyntheticTrace trace;
  trace.num_layers = 2;
  trace.later_tokens = 32;
  trace.prompt_tokens = options.tokens;
  trace.dtype = DType::float16;
  std::filesystem::path path = folder / "bench.h5";
  Progress progress;
  tracer::write_synthetic(trace, path, tracer::Execution(omp_get_max_threads()),
                          [&](double share) { progress.show("writing a synthetic trace", share); });
  return path;
}

std::string rate(double amount, double seconds) { return fmt::format("{:.1f}", amount / seconds / 1e9); }

std::string report(const TraceReader& trace, const Ceilings& ceilings, const std::vector<Stage>& stages) {
  const ModelInfo& model = trace.info().model;
  const int threads = omp_get_max_threads();
  std::string text = fmt::format(
      "{} positions, {} query heads on {} KV heads of {}, hidden size {}, {}; {} thread{}, {}\n\n",
      trace.info().prompt_length, model.num_attention_heads, model.num_key_value_heads, model.head_dim,
      model.hidden_size, name_of(trace.element_type()), threads, threads == 1 ? "" : "s", kernels::instruction_set());
  text +=
      aligned_table({{"ceiling", "measured"},
                     {"float32 products in cache", fmt::format("{:.0f} GFLOP/s", ceilings.products_by_kernel / 1e9)},
                     {"the same by Eigen", fmt::format("{:.0f} GFLOP/s", ceilings.products_by_eigen / 1e9)},
                     {"exponentials in cache", fmt::format("{:.2f} G/s", ceilings.exponentials / 1e9)},
                     {"reading memory", fmt::format("{:.1f} GB/s", ceilings.memory / 1e9)},
                     {"reading the file, one thread", fmt::format("{:.1f} GB/s", ceilings.file_by_one_thread / 1e9)},
                     {"reading the file, all threads", fmt::format("{:.1f} GB/s", ceilings.file / 1e9)}});
  std::vector<std::vector<std::string>> rows = {
      {"per layer", "settings", "ms", "GB/s", "GFLOP/s", "floor ms", "times floor"}};
  for (const Stage& stage : stages) {
    rows.push_back({stage.name, stage.settings == 0 ? "" : fmt::format("{}", stage.settings),
                    fmt::format("{:.2f}", 1e3 * stage.seconds), rate(stage.bytes, stage.seconds),
                    rate(stage.operations, stage.seconds), fmt::format("{:.2f}", 1e3 * stage.floor(ceilings)),
                    fmt::format("{:.2f}", stage.seconds / stage.floor(ceilings))});
  }
  text += "\n" + aligned_table(rows);
  return text +
         "\nfloor: what is read, multiplied and exponentiated, each at its ceiling, one after the other: the same "
         "cores\n"
         "do all of it. Of the two products the faster counts. Policies rank and select; only the last row measures\n"
         "what is lost.\n";
}

nlohmann::ordered_json document(const TraceReader& trace, const Ceilings& ceilings, const std::vector<Stage>& stages) {
  nlohmann::ordered_json json;
  json["prompt_length"] = trace.info().prompt_length;
  json["threads"] = omp_get_max_threads();
  json["instruction_set"] = kernels::instruction_set();
  json["ceilings"] = {{"products", ceilings.products},
                      {"products_by_kernel", ceilings.products_by_kernel},
                      {"products_by_eigen", ceilings.products_by_eigen},
                      {"exponentials", ceilings.exponentials},
                      {"memory", ceilings.memory},
                      {"file_by_one_thread", ceilings.file_by_one_thread},
                      {"file", ceilings.file}};
  for (const Stage& stage : stages) {
    json["stages"].push_back({{"name", stage.name},
                              {"settings", stage.settings},
                              {"seconds", stage.seconds},
                              {"bytes", stage.bytes},
                              {"operations", stage.operations},
                              {"exponentials", stage.exponentials},
                              {"floor", stage.floor(ceilings)}});
  }
  return json;
}

void run_bench(const BenchOptions& options) {
  omp_set_num_threads(threads_or_all(options.threads));
  if (!options.json.empty()) const OutputFile probe(options.json);
  const ScratchFolder folder;
  const TraceReader trace(options.trace.empty() ? write_trace(folder.path(), options)
                                                : std::filesystem::path(options.trace));
  if (options.capacity >= trace.info().prompt_length) {
    throw UsageError(
        fmt::format("--capacity {}: keeps all of the trace's {} prompt positions, which leaves nothing to rank",
                    options.capacity, trace.info().prompt_length));
  }
  const std::vector<Stage> stages = measure_stages(trace, options.capacity, options.runs);
  const Ceilings ceilings = measure_ceilings(trace);
  fmt::print("{}", report(trace, ceilings, stages));
  std::fflush(stdout);
  if (!options.json.empty()) {
    OutputFile::write_text(options.json, document(trace, ceilings, stages).dump(1) + "\n");
    fmt::print("wrote {}\n", printable(options.json));
  }
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command =
      app.add_subcommand("bench", "Measure what replay reaches here, against what this machine can do at best");
  command->add_option("trace", options->trace, "A trace to measure on (default: a synthetic one of two layers)")
      ->type_name("FILE");
  command->add_option("--tokens", options->tokens, "Prompt of the synthetic trace, in positions (default: 8192)")
      ->check(integer_in(1024, 1 << 20, "a number of positions"))
      ->type_name("N");
  command->add_option("--capacity", options->capacity, "Positions that a head keeps (default: 160)")
      ->check(integer_in(33, std::numeric_limits<int>::max(), "a capacity above ReST-KV's window of 32"))
      ->type_name("N");
  command->add_option("--runs", options->runs, "Runs over all layers, of which the median is shown (default: 5)")
      ->check(integer_in(1, 1000, "a number of runs"))
      ->type_name("N");
  command->add_option("--json", options->json, "The same numbers (JSON)")->check(names_a_file)->type_name("FILE");
  add_threads_option(*command, options->threads);
  command->callback([options]() { run_bench(*options); });
}

}  // namespace kvreplay::cli
