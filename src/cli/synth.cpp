#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/printable.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "tracer/synthetic/synthetic.h"

namespace kvreplay::cli {

namespace {

// More would overflow what positions are counted in, in some place or other, long after the disk.
constexpr int kMost = 1 << 28;

struct SynthArguments {
  tracer::SyntheticTrace trace;
  int tokens = 0;
  int prompt_tokens = 0;  // 0: not given
  int generate = -1;      // -1: not given
  int hidden = 0;         // 0: not given
  std::string queries = "window:64";
  std::string dtype = "float32";
  bool no_projection = false;
  int threads = 0;
  std::string output = "synthetic.h5";
};

// How many of all tokens come after the prompt.
int later_tokens(const SynthArguments& arguments) {
  constexpr int kUsual = 32;
  if (arguments.prompt_tokens > arguments.tokens) {
    throw UsageError(fmt::format("--prompt-tokens {}: there are only {} tokens (--tokens)", arguments.prompt_tokens,
                                 arguments.tokens));
  }
  if (arguments.generate >= arguments.tokens) {
    throw UsageError(
        fmt::format("--generate {}: leaves no prompt of {} tokens (--tokens)", arguments.generate, arguments.tokens));
  }
  if (arguments.prompt_tokens > 0) return arguments.tokens - arguments.prompt_tokens;
  if (arguments.generate >= 0) return arguments.generate;
  return std::min(kUsual, arguments.tokens / 2);
}

void run_synth(const SynthArguments& arguments) {
  tracer::SyntheticTrace trace = arguments.trace;
  trace.later_tokens = later_tokens(arguments);
  trace.prompt_tokens = arguments.tokens - trace.later_tokens;
  if (trace.num_attention_heads % trace.num_key_value_heads != 0) {
    throw UsageError(
        fmt::format("--heads {}: not a multiple of the {} KV heads (--kv-heads), which they must share evenly",
                    trace.num_attention_heads, trace.num_key_value_heads));
  }
  const Index width = Index{trace.num_attention_heads} * trace.head_dim;
  if (arguments.hidden == 0 && width > kMost) {
    throw UsageError(fmt::format("--heads {} of --head-dim {}: more than a hidden size can be",
                                 trace.num_attention_heads, trace.head_dim));
  }
  trace.hidden_size = arguments.hidden > 0 ? arguments.hidden : static_cast<int>(width);
  trace.query_window = parse_queries(arguments.queries);
  trace.dtype = dtype_named(arguments.dtype).value();
  trace.output_projection = !arguments.no_projection;

  const auto start = std::chrono::steady_clock::now();
  {
    const tracer::Execution execution(threads_or_all(arguments.threads));
    Progress line;
    tracer::write_synthetic(trace, arguments.output, execution, [&](double share) { line.show("write", share); });
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const auto bytes = static_cast<Index>(std::filesystem::file_size(arguments.output));
  fmt::print(stderr, "written in {:.2f} s ({}/s)\n", seconds,
             size_text(static_cast<Index>(static_cast<double>(bytes) / std::max(seconds, 1e-3))));

  const TraceInfo info = tracer::describe(trace);
  fmt::print("{}: {}, {} layers, {} prompt tokens, {} captured queries\n", arguments.output, size_text(bytes),
             trace.num_layers, trace.prompt_tokens, info.num_queries());
  if (trace.later_tokens == 0) {
    fmt::print(stderr,
               "note: the trace has no query after the prompt, so eviction at its end cannot be measured; --generate 1 "
               "or more adds some\n");
  }
}

}  // namespace

void add_synth_command(CLI::App& app) {
  const auto arguments = std::make_shared<SynthArguments>();
  CLI::App* command =
      app.add_subcommand("synth", "Write a synthetic trace of any size, with the structures of real attention");
  const auto count = [&](const char* name, int& value, const char* help) {
    return command->add_option(name, value, help)->check(integer_in(1, kMost, "a size"))->type_name("N");
  };
  tracer::SyntheticTrace& trace = arguments->trace;
  command->add_option("--tokens", arguments->tokens, "Tokens in all, at least 2")
      ->required()
      ->check(integer_in(2, kMost, "a number of tokens"))
      ->type_name("N");
  CLI::Option* prompt = count("--prompt-tokens", arguments->prompt_tokens, "How many of them are the prompt");
  command
      ->add_option("-n,--generate", arguments->generate,
                   "Or how many come after the prompt (default: 32, at most half of all)")
      ->check(integer_in(0, kMost, "a number of tokens"))
      ->type_name("N")
      ->excludes(prompt);
  count("--layers", trace.num_layers, "Layers (default: 32)");
  count("--heads", trace.num_attention_heads, "Query heads (default: 32)");
  count("--kv-heads", trace.num_key_value_heads, "KV heads, which the query heads share evenly (default: 8)");
  command->add_option("--head-dim", trace.head_dim, "Dimensions of a head, at least 8 (default: 128)")
      ->check(integer_in(8, 1 << 16, "a head dimension"))
      ->type_name("N");
  count("--hidden", arguments->hidden, "Hidden size (default: that of all query heads together)");
  command
      ->add_option("--queries", arguments->queries,
                   "Queries to record: window:N for the last N of the prompt and all after it, or all (default: "
                   "window:64)")
      ->type_name("all|window:N");
  command
      ->add_option("--dtype", arguments->dtype,
                   "How tensors are stored: float32, float16 or bfloat16 (default: float32)")
      ->check(one_of({"float32", "float16", "bfloat16"}))
      ->type_name("float32|float16|bfloat16");
  command->add_flag("--no-projection", arguments->no_projection, "Leave out the layers' output projections");
  command->add_flag("--attention-mass", trace.attention_mass,
                    "Add the attention that each key received, for H2O; the time grows with the square of the prompt");
  command->add_option("--seed", trace.seed, "Seed of all that is random (default: 0)")
      ->check(integer_in(0, std::numeric_limits<int>::max(), "a seed"))
      ->type_name("N");
  add_threads_option(*command, arguments->threads);
  command->add_option("-o,--output", arguments->output, "Trace to write, replaced if it exists (default: synthetic.h5)")
      ->check(names_a_file)
      ->type_name("FILE");
  command->callback([arguments] { run_synth(*arguments); });
}

}  // namespace kvreplay::cli
