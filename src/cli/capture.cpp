#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/file_text.h"
#include "base/printable.h"
#include "cli/commands.h"
#include "cli/generation_options.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "tracer/capture.h"

namespace kvreplay::cli {

namespace {

struct CaptureArguments {
  std::string model;
  std::string prompt;
  std::string tokens;
  bool templated = false;
  int generate = 0;
  GenerationOptions generation;
  std::string queries = "all";
  std::string dtype = "float32";
  bool no_projection = false;
  std::string spans;
  std::string turns;
  int threads = 0;
  std::string output = "run.h5";
};

std::string read_input(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  return file_text(path);
}

std::string input_name(const std::string& path) {
  return path == "-" ? "standard input" : std::filesystem::path(path).filename().string();
}

std::string describe(const tracer::CaptureProgress& progress) {
  switch (progress.stage) {
    case tracer::CaptureProgress::Stage::prefill:
      return fmt::format("prefill, {:.1f} tokens/s", progress.tokens_per_second);
    case tracer::CaptureProgress::Stage::decode:
      return fmt::format("decode, {:.1f} tokens/s", progress.tokens_per_second);
  }
  return "";
}

// Text that is not UTF-8 would reach the model as something else than what stands in the file.
std::string read_prompt(const std::string& path) {
  std::string text = read_input(path);
  if (const auto at = find_invalid_utf8(text)) {
    throw Error(fmt::format("{}: byte {} is not UTF-8 text; convert it, or give token ids with --tokens",
                            input_name(path), *at));
  }
  return text;
}

// A trace must not take the place of what it is made from.
void check_output(const CaptureArguments& arguments) {
  std::error_code ignored;  // what does not exist is equivalent to nothing
  for (const std::string& input : {arguments.prompt, arguments.tokens, arguments.spans, arguments.turns}) {
    if (!input.empty() && std::filesystem::equivalent(arguments.output, input, ignored)) {
      throw UsageError(fmt::format("{}: the trace would overwrite what it is made from; name another file with -o",
                                   arguments.output));
    }
  }
  const auto folder = std::filesystem::absolute(arguments.output).parent_path();
  if (std::filesystem::exists(arguments.output, ignored) &&
      std::filesystem::equivalent(folder, arguments.model, ignored)) {
    throw UsageError(
        fmt::format("{}: the trace would overwrite a file of the model; name another file with -o", arguments.output));
  }
}

// The token that ended what was generated, if one did.
std::string ending_of(const tracer::CaptureSummary& summary) {
  if (!summary.ended) return "";
  const std::int32_t id = summary.generated_ids.back();
  return summary.last_piece.empty() ? fmt::format(", ended by token {}", id)
                                    : fmt::format(", ended by {} (token {})", printable(summary.last_piece), id);
}

void run_capture(const CaptureArguments& arguments) {
  if (arguments.prompt.empty() == arguments.tokens.empty()) {
    throw UsageError("capture needs a prompt: either --prompt FILE or --tokens FILE (- reads standard input)");
  }
  if (arguments.templated && arguments.prompt.empty()) {
    throw UsageError("--templated says how a --prompt is written; --tokens are taken as given");
  }
  if (arguments.generate < 0) {
    throw UsageError(fmt::format("--generate {}: must not be negative", arguments.generate));
  }
  if (const std::string_view given = given_option(arguments.generation); !given.empty() && arguments.generate == 0) {
    throw UsageError(fmt::format("{} is of what the model generates: ask for that with --generate N", given));
  }
  const auto dtype = dtype_named(arguments.dtype);
  if (!dtype) {
    throw UsageError(fmt::format("--dtype {}: must be float32, float16 or bfloat16", arguments.dtype));
  }

  check_output(arguments);

  tracer::CaptureOptions options;
  options.query_window = parse_queries(arguments.queries);
  options.model_folder = arguments.model;
  const std::string& input = arguments.prompt.empty() ? arguments.tokens : arguments.prompt;
  options.prompt_name = input_name(input);
  if (arguments.prompt.empty()) {
    options.prompt_ids = tracer::parse_token_ids(read_input(input), options.prompt_name);
  } else {
    options.prompt_text = read_prompt(input);
    options.prompt_is_templated = arguments.templated;
  }
  options.generate = arguments.generate;
  options.sampling = sampling_of(arguments.generation);
  options.stop = stop_of(arguments.generation);
  options.dtype = *dtype;
  options.output_projection = !arguments.no_projection;
  if (!arguments.spans.empty()) options.spans = tracer::read_spans(arguments.spans);
  if (!arguments.turns.empty()) options.turns = tracer::read_turns(arguments.turns);
  options.output = arguments.output;
  options.execution.threads = threads_or_all(arguments.threads);

  options.on_warning = [](const std::string& warning) { fmt::print(stderr, "warning: {}\n", warning); };
  tracer::CaptureSummary summary;
  {
    Progress line;
    options.on_progress = [&](const tracer::CaptureProgress& progress) {
      line.show(describe(progress), progress.fraction);
    };
    summary = tracer::capture(options);
  }

  const auto count = [](int number, std::string_view noun) { return counted(static_cast<std::size_t>(number), noun); };
  std::string times = fmt::format("prefill: {} in {:.2f} s ({:.1f} tokens/s)", count(summary.prompt_tokens, "token"),
                                  summary.prefill_seconds, summary.prompt_tokens / summary.prefill_seconds);
  if (summary.generated_ids.size() > 1) {
    const auto steps = summary.generated_ids.size() - 1;
    times += fmt::format(", decode: {} in {:.2f} s ({:.1f} tokens/s)", counted(steps, "token"), summary.decode_seconds,
                         static_cast<double>(steps) / summary.decode_seconds);
  }
  fmt::print(stderr, "{}\n", times);

  fmt::print("{}: {}, {}, {}, {}\n", summary.output.string(), size_text(static_cast<Index>(summary.file_bytes)),
             count(summary.num_layers, "layer"), count(summary.prompt_tokens, "prompt token"),
             count(summary.queries, "captured query"));
  if (!summary.generated_ids.empty()) {
    fmt::print("generated {}{}: ", counted(summary.generated_ids.size(), "token"), ending_of(summary));
    if (summary.generated_text) {
      fmt::print("{}\n", *summary.generated_text);
    } else {
      fmt::print("{}\n", fmt::join(summary.generated_ids, " "));
    }
  }
  // The last generated token is not fed back, so one alone brings no query.
  if (summary.generated_ids.size() < 2) {
    fmt::print(stderr, "note: the trace has no query after the prompt, so eviction at its end cannot be measured; {}\n",
               summary.ended
                   ? "the first token ended the text; go on with --ignore-stop, or replay it with an earlier --evict-at"
                   : "--generate 2 or more adds some");
  }
}

}  // namespace

void add_capture_command(CLI::App& app) {
  const auto arguments = std::make_shared<CaptureArguments>();
  CLI::App* command = app.add_subcommand("capture", "Run a model once and record what its attention saw into a trace");
  command->add_option("-m,--model", arguments->model, "Folder of a model in Hugging Face format")
      ->required()
      ->check(names_a_file)
      ->type_name("DIR");
  command->add_option("-p,--prompt", arguments->prompt, "Text file to run the model on; - reads standard input")
      ->check(names_a_file)
      ->type_name("FILE");
  command
      ->add_option("--tokens", arguments->tokens,
                   "Instead of a text: a file of decimal token ids, taken as given; - reads standard input")
      ->check(names_a_file)
      ->type_name("FILE");
  command->add_flag(
      "--templated", arguments->templated,
      "The prompt is a chat as the model's template writes it, its special tokens included: none is added");
  command->add_option("-n,--generate", arguments->generate, "Tokens to generate after the prompt (default: 0)")
      ->type_name("N");
  add_generation_options(*command, arguments->generation);
  command
      ->add_option("--queries", arguments->queries,
                   "Queries to record: window:N for the last N of the prompt and all after it (default: all)")
      ->type_name("all|window:N");
  command
      ->add_option("--dtype", arguments->dtype,
                   "How tensors are stored: float32, float16 or bfloat16 (default: float32)")
      ->type_name("float32|float16|bfloat16");
  command->add_flag("--no-projection", arguments->no_projection, "Leave out the layers' output projections");
  command
      ->add_option("--spans", arguments->spans,
                   "JSON list of things to follow: {\"label\": ..., \"text\": ...}, every occurrence in the prompt, or "
                   "{\"label\": ..., \"start\": ..., \"end\": ...} in token positions")
      ->check(names_a_file)
      ->type_name("FILE");
  command
      ->add_option(
          "--turns", arguments->turns,
          "JSON list of where turns of the conversation begin: token positions, {\"text\": ...}, every "
          "occurrence in the prompt, or {\"character\": ...}, an offset into its text; a \"role\" beside it says "
          "who speaks")
      ->check(names_a_file)
      ->type_name("FILE");
  add_threads_option(*command, arguments->threads);
  command->add_option("-o,--output", arguments->output, "Trace to write, replaced if it exists (default: run.h5)")
      ->check(names_a_file)
      ->type_name("FILE");
  command->callback([arguments] { run_capture(*arguments); });
}

}  // namespace kvreplay::cli
