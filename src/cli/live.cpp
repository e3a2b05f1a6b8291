#include <fmt/format.h>
#include <fmt/ranges.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <sstream>

#include "analysis/summary.h"
#include "base/digest.h"
#include "base/error.h"
#include "base/file_text.h"
#include "base/printable.h"
#include "cli/commands.h"
#include "cli/generation_options.h"
#include "cli/interruption.h"
#include "cli/launched_ranks.h"
#include "cli/options.h"
#include "cli/plugins.h"
#include "cli/progress.h"
#include "cli/replay_options.h"
#include "cli/together.h"
#include "notebooks-export/tables/tables.h"
#include "policy/plugin_interface.h"
#include "replay/replay.h"
#include "sweep/finished_runs.h"
#include "trace/reader.h"
#include "tracer/live/live_run.h"
#include "tracer/prompt.h"

namespace kvreplay::cli {
namespace {

struct LiveArguments {
  std::string model;
  std::vector<std::string> prompts;
  bool templated = false;
  std::string continuation;       // empty: trace, or a number of tokens
  std::string continuation_text;  // where it is a file's name: what stands in it, read once, as pipes can be
  int generate = 0;
  GenerationOptions generation;
  std::vector<std::string> answers;
  bool no_offline = false;
  bool resume = false;
  std::vector<std::string> plugins;
  ReplayOptions replay;
};

constexpr std::string_view kTraceContinues = "trace";
constexpr int kTokensUnlessSaid = 64;

// Whether it is meant as a number of tokens.
bool is_number(const std::string& continuation) {
  return !continuation.empty() && continuation.find_first_not_of("+-0123456789") == std::string::npos;
}

// Whether it is the name of a file.
bool is_file(const std::string& continuation) {
  return !continuation.empty() && continuation != kTraceContinues && !is_number(continuation);
}

// How many tokens the model is asked to write itself, of a run that gives `given` and is evicted at a position; 0 where
// what comes then is given.
int tokens_to_write(const std::string& continuation, std::size_t given, int eviction_position) {
  if (is_number(continuation)) return std::stoi(continuation);
  return continuation.empty() && given <= static_cast<std::size_t>(eviction_position) ? kTokensUnlessSaid : 0;
}

// What one run begins with.
struct Beginning {
  std::string name;  // of the file
  TraceInfo info;    // of all tokens that are given
  std::string digest;
  std::string text;                    // of a prompt, read once
  std::unique_ptr<TraceReader> trace;  // null: a prompt
  std::unique_ptr<tracer::Tokenizer> tokenizer;
};

// Where its cache is evicted.
int eviction_of(const ReplayRequest& request, const Beginning& beginning) {
  return request.eviction_positions.empty() ? beginning.info.prompt_length : request.eviction_positions.front();
}

std::string text_of(const std::string& file) {
  std::string text = file_text(file);
  if (const auto at = find_invalid_utf8(text)) {
    throw Error(fmt::format("{}: byte {} is not UTF-8 text", file, *at));
  }
  return text;
}

tracer::PromptOptions prompt_options(const LiveArguments& arguments) {
  tracer::PromptOptions options;
  options.model_folder = arguments.model;
  options.prompt_is_templated = arguments.templated;
  return options;
}

Beginning begin_with_prompt(const LiveArguments& arguments, const tracer::Model& model, const std::string& file) {
  Beginning beginning;
  beginning.name = file;
  beginning.text = text_of(file);
  tracer::PromptOptions options = prompt_options(arguments);
  options.prompt_text = beginning.text;
  options.prompt_name = file;
  tracer::Prompt prompt = tracer::prepare_prompt(options, model.config);
  beginning.info = tracer::describe(options, model, prompt, static_cast<Index>(prompt.ids.size()));
  beginning.tokenizer = std::move(prompt.tokenizer);
  return beginning;
}

// The first of a model's numbers in which a trace differs, as a sentence; empty where all are the same.
std::string difference(const ModelInfo& trace, const tracer::ModelConfig& model) {
  const struct {
    const char* name;
    int of_trace;
    int of_model;
  } numbers[] = {{"num_layers", trace.num_layers, model.num_layers},
                 {"num_attention_heads", trace.num_attention_heads, model.num_attention_heads},
                 {"num_key_value_heads", trace.num_key_value_heads, model.num_key_value_heads},
                 {"head_dim", trace.head_dim, model.head_dim},
                 {"hidden_size", trace.hidden_size, model.hidden_size}};
  for (const auto& number : numbers) {
    if (number.of_trace == number.of_model) continue;
    return fmt::format("its {} is {}, and the model's {}", number.name, number.of_trace, number.of_model);
  }
  return "";
}

Error of_another_model(const std::string& trace, const std::string& model, const std::string& why) {
  return Error(fmt::format("{}: is not a run of the model in {}: {}; name the model that it was captured from", trace,
                           model, why));
}

Beginning begin_with_trace(const LiveArguments& arguments, const tracer::Model& model, const std::string& file) {
  Beginning beginning;
  beginning.name = file;
  beginning.trace = std::make_unique<TraceReader>(file);
  const TraceInfo& info = beginning.trace->info();
  if (const std::string why = difference(info.model, model.config); !why.empty()) {
    throw of_another_model(file, arguments.model, why);
  }
  const std::string& shapes = info.model.weight_shapes_digest;
  if (!shapes.empty() && shapes != model.weight_shapes_digest) {
    throw of_another_model(file, arguments.model, "its weights have other names or shapes");
  }
  const auto beyond = std::ranges::find_if(
      info.token_ids, [&model](std::int32_t id) { return id < 0 || id >= model.config.vocab_size; });
  if (beyond != info.token_ids.end()) {
    throw of_another_model(file, arguments.model,
                           fmt::format("token id {} is not in its vocabulary of {}", *beyond, model.config.vocab_size));
  }
  tracer::PromptOptions options = prompt_options(arguments);
  options.prompt_ids.assign(info.token_ids.begin(), info.token_ids.begin() + info.prompt_length);
  options.prompt_name = file;
  tracer::Prompt prompt = tracer::prepare_prompt(options, model.config);
  beginning.info = tracer::describe(options, model, prompt, static_cast<Index>(prompt.ids.size()));
  beginning.info.token_ids = info.token_ids;
  beginning.info.token_pieces = info.token_pieces;
  beginning.info.spans = info.spans;
  beginning.info.turn_starts = info.turn_starts;
  beginning.info.turn_roles = info.turn_roles;
  beginning.info.answers = info.answers;
  beginning.digest = beginning.trace->digest();
  beginning.tokenizer = std::move(prompt.tokenizer);
  return beginning;
}

// A trace's keys are the model's own, as far as its type of number goes; those of other weights are nowhere near.
void check_keys(const TraceReader& trace, const tracer::HeldRun& run, const std::string& model) {
  constexpr double kFarthest = 0.1;
  const int position = run.eviction_position() - 1;
  for (int layer = 0; layer < run.info().model.num_layers; ++layer) {
    const Matrix ours = run.read(layer, HeadTensor::keys, 0, position, 1);
    const Matrix theirs = trace.read(layer, HeadTensor::keys, 0, position, 1);
    const double apart = static_cast<double>((ours - theirs).norm()) / static_cast<double>(ours.norm());
    if (apart <= kFarthest) continue;
    throw of_another_model(trace.name(), model,
                           fmt::format("the key of layer {} at position {} is {:.0f} % apart from the model's", layer,
                                       position, 100 * apart));
  }
}

// Keys say nothing of the last layer's other weights and of what stands behind it.
void check_next_token(const TraceReader& trace, const tracer::LiveRun& run, const std::string& model) {
  const std::optional<NextToken>& theirs = trace.info().next_token;
  if (!theirs || run.run().eviction_position() != trace.info().prompt_length) return;
  const std::span<const float> logits = run.prompt_logits();
  const auto refuse = [&](const std::string& why) { return of_another_model(trace.name(), model, why); };
  if (theirs->id < 0 || theirs->id >= static_cast<int>(logits.size())) {
    throw refuse(fmt::format("token id {} is not in its vocabulary of {}", theirs->id, logits.size()));
  }
  // Of the spread of all logits. What half precision moves is below a tenth.
  constexpr double kFarthest = 0.25;
  double sum = 0;
  double squares = 0;
  for (const float logit : logits) {
    sum += static_cast<double>(logit);
    squares += static_cast<double>(logit) * static_cast<double>(logit);
  }
  const auto count = static_cast<double>(logits.size());
  const double spread = std::sqrt(std::max(0.0, squares / count - (sum / count) * (sum / count)));
  const auto ours = static_cast<double>(logits[static_cast<std::size_t>(theirs->id)]);
  if (std::abs(ours - theirs->logit) <= kFarthest * spread) return;
  throw refuse(fmt::format("the logit of token {} after the prompt is {:.4g}, and the model's {:.4g}", theirs->id,
                           theirs->logit, ours));
}

// What the policies of a request look at before the eviction, and what a replay measures behind it.
tracer::HeldParts parts_for(const ReplayRequest& request, int eviction_position, int prompt_length, bool offline) {
  tracer::HeldParts parts;
  parts.outputs = offline;
  for (const Policy& policy : request.policies) {
    const Requirements needs = policy.requirements();
    bool all = needs.includes(Need::Kind::all_queries);
    if (needs.includes(Need::Kind::accumulated_attention)) {
      // Recorded sums are of the whole prompt.
      if (eviction_position == prompt_length) {
        parts.attention_mass = true;
      } else {
        all = true;
      }
    }
    parts.prompt_queries =
        std::max<Index>(parts.prompt_queries, all ? eviction_position : needs.count(Need::Kind::window_queries));
  }
  return parts;
}

// The tokens that a text adds to those before it, none of which it may change.
std::vector<std::int32_t> ids_of_text(const LiveArguments& arguments, const Beginning& beginning,
                                      std::span<const std::int32_t> before) {
  const std::string& file = arguments.continuation;
  const std::string& text = arguments.continuation_text;
  if (beginning.tokenizer == nullptr) {
    throw Error(
        fmt::format("{}: the model's folder has no tokenizer for this text; continue with a number of tokens", file));
  }
  if (text.empty()) throw Error(fmt::format("{}: is empty; there is nothing to continue with", file));
  // A special token has no text, so that what stands before one cannot be written down; nothing joins across it.
  std::size_t own = before.size();
  while (own > 0 && !beginning.tokenizer->decode(before.subspan(own - 1, 1)).empty()) --own;
  for (const std::size_t first : {std::size_t{0}, own}) {
    const auto tail = before.subspan(first);
    const std::string whole = beginning.tokenizer->decode(tail) + text;
    for (const bool special : {true, false}) {
      const std::vector<std::int32_t> ids = beginning.tokenizer->encode(whole, special).ids;
      if (ids.size() > tail.size() && std::ranges::equal(tail, std::span(ids).first(tail.size()))) {
        return {ids.begin() + static_cast<std::ptrdiff_t>(tail.size()), ids.end()};
      }
    }
  }
  throw Error(fmt::format(
      "{}: behind {} the tokenizer joins the beginning of this text to the token before it, so that it is no "
      "continuation of its tokens; begin it with another space or a new line",
      file, beginning.name));
}

std::vector<std::int32_t> continuation_of(const LiveArguments& arguments, const tracer::Writing& writing,
                                          const Beginning& beginning, tracer::LiveRun& run, int eviction_position) {
  const std::vector<std::int32_t>& all = beginning.info.token_ids;
  const int given = static_cast<int>(all.size());
  const std::string& asked = arguments.continuation;
  const int to_write = tokens_to_write(asked, all.size(), eviction_position);
  std::vector<std::int32_t> ids(all.begin() + eviction_position,
                                all.begin() + std::max(eviction_position, beginning.info.prompt_length));
  if (to_write == 0 && !is_file(asked)) {
    if (given <= eviction_position) {
      throw Error(
          fmt::format("{}: has no token after the eviction at {}; continue with a number of tokens, as in "
                      "--continue {}",
                      beginning.name, eviction_position, kTokensUnlessSaid));
    }
    return {all.begin() + eviction_position, all.end()};
  }
  if (to_write > 0) {
    if (!ids.empty()) {
      throw UsageError("--continue N: the model continues at the prompt's end alone; leave out --evict-at");
    }
    std::vector<std::int32_t> own = run.write(to_write, writing);
    if (own.empty()) {
      throw Error(
          fmt::format("{}: the model ends the sequence at once, so that nothing can be measured; continue with a "
                      "text, as in --continue FILE",
                      beginning.name));
    }
    return own;
  }
  const int known = std::max(eviction_position, beginning.info.prompt_length);
  const std::vector<std::int32_t> more =
      ids_of_text(arguments, beginning, std::span(all).first(static_cast<std::size_t>(known)));
  ids.insert(ids.end(), more.begin(), more.end());
  return ids;
}

std::string digest_of(const tracer::ModelConfig& model, std::span<const std::int32_t> ids) {
  Digest digest;
  digest.add(model.name);
  for (const std::int32_t id : ids) digest.add(fmt::format("{}", id));
  return digest.text();
}

std::string_view stage_text(tracer::LiveProgress::Stage stage) {
  switch (stage) {
    case tracer::LiveProgress::Stage::prompt:
      return "prompt";
    case tracer::LiveProgress::Stage::continuation:
      return "continuation";
    case tracer::LiveProgress::Stage::evicted:
      return "over what is kept";
    case tracer::LiveProgress::Stage::decoding:
      return "evicted token by token";
    case tracer::LiveProgress::Stage::generation:
      return "writing";
  }
  return "";
}

// Those of one prompt, about as long as each other.
std::vector<tracer::LiveProgress::Stage> stages_of(const LiveArguments& arguments, const ReplayRequest& request) {
  using Stage = tracer::LiveProgress::Stage;
  const auto is_scheduled = [](const Policy& policy) { return policy.schedule.has_value(); };
  std::vector<Stage> stages = {Stage::prompt, Stage::continuation};
  if (!std::ranges::all_of(request.policies, is_scheduled)) stages.push_back(Stage::evicted);
  if (std::ranges::any_of(request.policies, is_scheduled)) stages.push_back(Stage::decoding);
  if (arguments.generate > 0) stages.push_back(Stage::generation);
  return stages;
}

TraceReplay run_one(const LiveArguments& arguments, const ReplayRequest& request, const tracer::Writing& writing,
                    const tracer::Model& model, tracer::Transformer& transformer, Beginning beginning,
                    const tracer::LiveRun::OnProgress& on_progress) {
  const int prompt_length = beginning.info.prompt_length;
  const int eviction = eviction_of(request, beginning);
  if (eviction > static_cast<int>(beginning.info.token_ids.size())) {
    throw Error(fmt::format("{}: eviction position {} is beyond its {} tokens", beginning.name, eviction,
                            beginning.info.token_ids.size()));
  }
  TraceInfo info = beginning.info;
  tracer::HeldRun held(model, info, eviction, beginning.name,
                       beginning.digest.empty() ? digest_of(model.config, info.token_ids) : beginning.digest,
                       parts_for(request, eviction, prompt_length, !arguments.no_offline));
  tracer::LiveRun run(model, transformer, held, on_progress);
  run.read_prompt();
  if (beginning.trace != nullptr) {
    check_keys(*beginning.trace, held, arguments.model);
    check_next_token(*beginning.trace, run, arguments.model);
  }
  const std::vector<std::int32_t> ids = continuation_of(arguments, writing, beginning, run, eviction);
  run.follow(ids, tracer::pieces_of(beginning.tokenizer.get(), ids));

  // One run that is evicted once.
  const ReplayEngine engine({&held}, request);
  TraceReplay found = (arguments.no_offline ? decide(engine) : replay(engine)).front();
  const int asked = tokens_to_write(arguments.continuation, beginning.info.token_ids.size(), eviction);
  if (static_cast<int>(ids.size()) < asked) {
    found.notes.push_back(
        fmt::format("the model ends the sequence after {} of the {} tokens that were asked for", ids.size(), asked));
  }
  if ((asked > 0 || arguments.generate > 0) && writing.sampling.temperature > 0) {
    found.notes.push_back(fmt::format("what the model writes is drawn: {}", description(writing.sampling)));
  }
  const std::span<const Setting> settings = engine.settings(0);
  measure_live(run, settings, found);
  settle_capacities(found);
  if (arguments.generate > 0) {
    std::vector<std::string> answers = beginning.info.answers;
    answers.insert(answers.end(), arguments.answers.begin(), arguments.answers.end());
    if (!answers.empty() && beginning.tokenizer == nullptr) {
      found.notes.push_back(
          "whether an answer is in what the model writes cannot be told: its folder has no tokenizer");
    }
    generate_live(run, settings, found, arguments.generate, writing, beginning.tokenizer.get(), answers);
  }
  return found;
}

// As identity_of() of the file that the text was read from.
FileIdentity identity_of_text(const std::string& file, const std::string& text) {
  Digest digest;
  digest.add_bytes(text.data(), text.size());
  return {printable(file), static_cast<std::int64_t>(text.size()), digest.text()};
}

// All that the results follow from.
SweepIdentity identity_of_run(const LiveArguments& arguments, const ReplayRequest& request,
                              const std::vector<std::string>& traces, const std::vector<Beginning>& beginnings) {
  const std::vector<TraceReader> readers(traces.begin(), traces.end());
  std::vector<std::filesystem::path> files(arguments.plugins.begin(), arguments.plugins.end());
  for (const std::string& file : policy_files(request)) files.emplace_back(file);
  // Weights take as long to read as to run; their sizes and times are looked at.
  SweepIdentity identity(request, readers, files);
  for (const Beginning& beginning : beginnings) {
    if (beginning.trace == nullptr) identity.files.push_back(identity_of_text(beginning.name, beginning.text));
  }
  if (is_file(arguments.continuation)) {
    identity.files.push_back(identity_of_text(arguments.continuation, arguments.continuation_text));
  }
  identity.live = {fmt::format("--continue {}", arguments.continuation),
                   fmt::format("--generate {}", arguments.generate),
                   arguments.no_offline ? "--no-offline" : "with what a replay measures",
                   arguments.templated ? "--templated" : "as plain text"};
  for (const std::string& answer : arguments.answers) identity.live.push_back(printable("--answer " + answer));
  if (!given_option(arguments.generation).empty()) {
    identity.live.push_back(description(sampling_of(arguments.generation)));
    if (arguments.generation.ignore_stop) identity.live.emplace_back("--ignore-stop");
    for (const std::string& stop : arguments.generation.stops) identity.live.push_back(printable("--stop " + stop));
  }
  std::vector<std::string> model;
  for (const auto& entry : std::filesystem::directory_iterator(arguments.model)) {
    if (!entry.is_regular_file()) continue;
    const auto written = entry.last_write_time().time_since_epoch().count();
    model.push_back(fmt::format("model file {}, {} bytes, written at {}", printable(entry.path().filename().string()),
                                entry.file_size(), static_cast<std::int64_t>(written)));
  }
  std::ranges::sort(model);
  std::ranges::move(model, std::back_inserter(identity.live));
  return identity;
}

// Which of the runs each process does: the longest first, each by the process that has least to do.
std::vector<std::vector<int>> divided(const std::vector<Beginning>& beginnings, std::vector<int> left, int processes) {
  const auto tokens = [&beginnings](int run) {
    return beginnings[static_cast<std::size_t>(run)].info.token_ids.size();
  };
  std::ranges::stable_sort(left, std::greater<>(), tokens);
  std::vector<std::vector<int>> parts(static_cast<std::size_t>(processes));
  std::vector<std::size_t> sums(parts.size(), 0);
  for (const int run : left) {
    const auto least = static_cast<std::size_t>(std::ranges::min_element(sums) - sums.begin());
    parts[least].push_back(run);
    sums[least] += tokens(run);
  }
  return parts;
}

// A file's name without its folder, where that tells it from those of the other prompts.
std::string short_name(const std::string& file, const std::vector<TraceReplay>& replays) {
  const auto base = [](const std::string& path) { return std::filesystem::path(path).filename().string(); };
  const auto same =
      std::ranges::count_if(replays, [&](const TraceReplay& replay) { return base(replay.trace) == base(file); });
  return printable(same > 1 ? file : base(file));
}

// What the model wrote, a line each, cut where a terminal's line ends.
std::string written_texts(const std::vector<TraceReplay>& replays) {
  constexpr std::size_t kWidth = 80;
  std::vector<std::vector<std::string>> cells = {{"prompt", "policy", "capacity", "what the model writes"}};
  const auto line_of = [](const Generation& generation) {
    std::string text = printable(generation.text);
    if (text.size() <= kWidth) return text;
    std::size_t end = kWidth;
    while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
    return text.substr(0, end) + "…";
  };
  for (const TraceReplay& replay : replays) {
    if (!replay.generation) continue;
    cells.push_back({short_name(replay.trace, replays), "the full cache", "", line_of(*replay.generation)});
    for (const ReplayResult& result : replay.results) {
      cells.push_back({"", result.policy, result.capacity_request, line_of(*result.generation)});
    }
  }
  std::string text;
  std::vector<std::size_t> widths(3, 0);
  for (const auto& row : cells) {
    for (std::size_t i = 0; i < widths.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : cells) {
    text +=
        fmt::format("{:<{}}  {:<{}}  {:>{}}  {}\n", row[0], widths[0], row[1], widths[1], row[2], widths[2], row[3]);
  }
  return text;
}

std::string live_legend(const std::vector<TraceReplay>& replays, bool offline, double seconds) {
  const bool written =
      std::ranges::any_of(replays, [](const TraceReplay& replay) { return replay.generation.has_value(); });
  return fmt::format(
      "KL: divergence of the next token's distribution from the full cache's, nats per token; loss +: what the\n"
      "loss of the true next token grows by; agree: the most likely token is the same;\n{}{}means over tokens{}. Best "
      "first at each capacity. {:.1f} s.\n",
      written ? "same text: tokens written freely before the first other one; answered: an answer is in the text;\n"
              : "",
      offline ? "residual error: change of what a layer adds over the residual stream's length, root of the mean "
                "square over\nthe last two thirds of the layers; layer error: ‖ô−o‖/‖o‖ after the output projection; "
                "recall: attention\nmass still cached; all of layers as if those before were whole;\n"
              : "",
      replays.size() > 1 ? "; every prompt weighs the same" : "", seconds);
}

// The files, beside traces and those of policies, that outputs must not replace.
std::vector<std::string> files_read(const LiveArguments& arguments) {
  std::vector<std::string> files = arguments.prompts;
  files.insert(files.end(), arguments.plugins.begin(), arguments.plugins.end());
  if (is_file(arguments.continuation)) files.push_back(arguments.continuation);
  std::error_code none;  // a folder that is not there is told where the model is read
  for (const auto& entry : std::filesystem::directory_iterator(arguments.model, none)) {
    files.push_back(entry.path().string());
  }
  return files;
}

// How long the runs may become.
void check_lengths(const LiveArguments& arguments, const tracer::ModelConfig& config,
                   const std::vector<Beginning>& beginnings, std::vector<std::string>& notes) {
  for (const Beginning& beginning : beginnings) {
    const auto given = static_cast<Index>(beginning.info.token_ids.size());
    const Index prompt = beginning.info.prompt_length;
    Index later = given > prompt ? given - prompt : kTokensUnlessSaid;
    if (is_number(arguments.continuation)) later = std::stoi(arguments.continuation);
    if (is_file(arguments.continuation)) {
      const auto before = std::span(beginning.info.token_ids).first(static_cast<std::size_t>(prompt));
      later = static_cast<Index>(ids_of_text(arguments, beginning, before).size());
    }
    later = std::max(later, Index{arguments.generate});
    if (const auto warning = tracer::length_warning(config, arguments.model, prompt, later)) {
      notes.push_back(fmt::format("{}: {}", beginning.name, *warning));
    }
  }
}

// What can be wrong with what was asked for, before anything is read.
void check_arguments(const LiveArguments& arguments, const ReplayRequest& request) {
  if (arguments.prompts.empty() && arguments.replay.traces.empty()) {
    throw UsageError(
        "live needs what the model reads: --prompt FILE or --trace FILE, as in kvreplay live --model DIR --trace "
        "run.h5 --policy snapkv --capacity 25%");
  }
  if (arguments.templated && arguments.prompts.empty()) {
    throw UsageError("--templated says how a --prompt is written; a trace's tokens are taken as they are");
  }
  if (arguments.generate > 0 && !request.eviction_positions.empty()) {
    throw UsageError("--generate: the model writes freely at the prompt's end alone; leave out --evict-at");
  }
  if (request.eviction_positions.size() > 1) throw UsageError("--evict-at: a live run evicts once");
  if (is_number(arguments.continuation)) {
    const std::string wrong =
        integer_in(1, std::numeric_limits<int>::max(), "a number of tokens")(arguments.continuation);
    if (!wrong.empty()) throw UsageError(fmt::format("--continue {}: {}", arguments.continuation, wrong));
  }
  if (std::ranges::find(arguments.answers, "") != arguments.answers.end()) {
    throw UsageError("--answer: an empty text is in every answer");
  }
  sampling_of(arguments.generation);
  stop_of(arguments.generation);
  if (!arguments.answers.empty() && arguments.generate == 0) {
    throw UsageError("--answer is looked for in what the model writes: ask for that with --generate N");
  }
  if (arguments.resume && arguments.replay.results.empty()) {
    throw UsageError("--resume goes on with what stands beside an output; name it with -o");
  }
}

// How the model writes what it is asked for, which all runs have alike.
tracer::Writing writing_of(const LiveArguments& arguments, const ReplayRequest& request, const tracer::Model& model,
                           const std::vector<Beginning>& beginnings) {
  const bool writes = arguments.generate > 0 || std::ranges::any_of(beginnings, [&](const Beginning& beginning) {
                        const std::size_t given = beginning.info.token_ids.size();
                        return tokens_to_write(arguments.continuation, given, eviction_of(request, beginning)) > 0;
                      });
  const std::string_view said = given_option(arguments.generation);
  if (!writes && !said.empty()) {
    throw UsageError(
        fmt::format("{} is of what the model writes: ask for that with --continue N or --generate N", said));
  }
  if (!writes) return {};
  return {sampling_of(arguments.generation), tracer::stop_ids(stop_of(arguments.generation), arguments.model,
                                                              model.config, beginnings.front().tokenizer.get())};
}

// The runs as text, for the other processes.
std::string text_of(const std::vector<int>& runs) { return fmt::format("{}", fmt::join(runs, " ")); }

std::vector<int> runs_from(const std::string& text) {
  std::istringstream stream(text);
  std::vector<int> runs;
  for (int run = 0; stream >> run;) runs.push_back(run);
  return runs;
}

void run_live(const LiveArguments& given) {
  const std::unique_ptr<Ranks> ranks = launched_ranks();
  LiveArguments arguments = given;
  const auto started = std::chrono::steady_clock::now();
  std::vector<std::string> notes;
  ReplayRequest request;
  std::unique_ptr<const tracer::Model> model;
  std::vector<Beginning> beginnings;
  tracer::Writing writing;
  std::optional<FinishedRuns> store;
  std::vector<std::optional<TraceReplay>> done;
  tracer::Transformer::Options execution;
  together(*ranks, [&]() {
    for (const std::string& plugin : arguments.plugins) load_plugin(plugin);
    request = request_from(arguments.replay, notes);
    request.residual_sum = true;
    request.layer_by_layer = true;
    check_arguments(arguments, request);
    if (ranks->size() > 1 && arguments.replay.results.empty()) {
      throw UsageError("several processes work together on one output; name it with -o");
    }
    const std::vector<std::string> traces = distinct_traces(arguments.replay, notes);
    if (ranks->is_first()) {
      ReplayOptions outputs = arguments.replay;
      const std::vector<std::string> read = files_read(arguments);
      outputs.traces.insert(outputs.traces.end(), read.begin(), read.end());
      check_outputs(outputs, request);
    }
    execution.threads = threads_of(arguments.replay.threads, *ranks);
    omp_set_num_threads(execution.threads);
    model = std::make_unique<const tracer::Model>(arguments.model);
    if (is_file(arguments.continuation)) arguments.continuation_text = text_of(arguments.continuation);
    std::set<std::string> seen;
    for (const std::string& prompt : arguments.prompts) {
      if (seen.insert(prompt).second) {
        beginnings.push_back(begin_with_prompt(arguments, *model, prompt));
      } else {
        notes.push_back(fmt::format("{}: is given more than once and run once", prompt));
      }
    }
    for (const std::string& trace : traces) beginnings.push_back(begin_with_trace(arguments, *model, trace));
    check_lengths(arguments, model->config, beginnings, notes);
    writing = writing_of(arguments, request, *model, beginnings);
    done.resize(beginnings.size());
    if (arguments.replay.results.empty()) return;
    store.emplace(arguments.replay.results, identity_of_run(arguments, request, traces, beginnings));
    if (ranks->is_first()) store->open(arguments.resume);
  });
  if (ranks->is_first()) {
    for (const std::string& warning : model->warnings) fmt::print(stderr, "warning: {}\n", warning);
  }

  const ModelInfo model_info = beginnings.front().info.model;
  std::vector<int> left;
  if (ranks->is_first()) {
    for (int run = 0; run < static_cast<int>(done.size()); ++run) {
      auto& found = done[static_cast<std::size_t>(run)];
      if (store) found = store->read(run, model_info, notes);
      if (!found) left.push_back(run);
    }
  }
  left = runs_from(ranks->from_first(text_of(left)));
  const std::vector<int> part = divided(beginnings, left, ranks->size())[static_cast<std::size_t>(ranks->rank())];

  const std::size_t finished = done.size() - left.size();
  const auto tell_interruption = [&](std::size_t more) {
    if (!ranks->is_first() || !store) {
      say_when_interrupted("");
      return;
    }
    const std::string folder = store->folder().string();
    say_when_interrupted(ranks->size() == 1
                             ? fmt::format("{} of {} are finished and kept in {}; go on with --resume", finished + more,
                                           counted(done.size(), "prompt"), folder)
                             : fmt::format("finished prompts are kept in {}; go on with --resume", folder));
  };
  const auto with_advice = [&](const auto& action) {
    try {
      action();
    } catch (const Error& error) {
      if (!store || store->empty()) throw;
      throw Error(fmt::format("{}; finished prompts are kept in {}, go on with --resume", error.what(),
                              store->folder().string()));
    }
  };
  const auto work = [&]() {
    tracer::Transformer transformer(*model, execution);
    std::optional<Progress> line;
    if (ranks->is_first()) line.emplace();
    tell_interruption(0);
    const std::vector<tracer::LiveProgress::Stage> stages = stages_of(arguments, request);
    try {
      with_advice([&]() {
        for (std::size_t i = 0; i < part.size() && !ranks->others_stopped(); ++i) {
          Beginning& beginning = beginnings[static_cast<std::size_t>(part[i])];
          const std::string name = std::filesystem::path(beginning.name).filename().string();
          TraceReplay found = run_one(arguments, request, writing, *model, transformer, std::move(beginning),
                                      [&](const tracer::LiveProgress& at) {
                                        if (!line) return;
                                        const auto stages_done = std::ranges::find(stages, at.stage) - stages.begin();
                                        const double share = (static_cast<double>(stages_done) + at.fraction) /
                                                             static_cast<double>(stages.size());
                                        line->show(fmt::format("{}: {}", name, stage_text(at.stage)),
                                                   (static_cast<double>(i) + share) / static_cast<double>(part.size()));
                                      });
          if (store) store->save(part[i], found);
          if (ranks->size() == 1) done[static_cast<std::size_t>(part[i])] = std::move(found);
          tell_interruption(i + 1);
        }
      });
    } catch (...) {
      ranks->announce_stop();
      throw;
    }
  };
  try {
    together(*ranks, work);
  } catch (const Error&) {
    // A folder without anything in it is of no use to anybody.
    if (ranks->is_first() && store && store->empty()) store->remove();
    throw;
  }

  together(*ranks, [&]() {
    if (!ranks->is_first()) return;
    std::vector<TraceReplay> replays;
    for (std::size_t run = 0; run < done.size(); ++run) {
      if (!done[run]) done[run] = store->read(static_cast<int>(run), model_info, notes);
      if (!done[run]) throw Error(fmt::format("{}: lacks a finished prompt", store->folder().string()));
      replays.push_back(std::move(*done[run]));
    }
    std::vector<std::string> written;
    // The table is shown even where a file cannot be written: it is what the work was for.
    std::exception_ptr failure;
    try {
      with_advice([&]() { write_files(arguments.replay, replays, {}, written); });
      if (store) store->remove();
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    fmt::print("{}\n\n{}\n{}", headline(replays, arguments.prompts.empty() ? "trace" : "prompt"),
               policy_table(rank_policies(replays)), live_legend(replays, !arguments.no_offline, seconds));
    if (arguments.generate > 0) fmt::print("\n{}", written_texts(replays));
    for (const std::string& file : written) fmt::print("wrote {}\n", file);
    std::fflush(stdout);
    print_notes(notes, replays, {});
    if (failure) std::rethrow_exception(failure);
  });
}

}  // namespace

void add_live_command(CLI::App& app) {
  const auto arguments = std::make_shared<LiveArguments>();
  CLI::App* command = app.add_subcommand("live", "Run a model on over what policies keep, and measure what it loses");
  command->add_option("-m,--model", arguments->model, "Folder of a model in Hugging Face format")
      ->required()
      ->check(names_a_file)
      ->type_name("DIR");
  CLI::Option* const prompts =
      command->add_option("--prompt", arguments->prompts, "Text files to run the model on, each a prompt")
          ->check(names_a_file)
          ->type_name("FILE,...");
  command->add_flag("--templated", arguments->templated,
                    "Prompts are chats as the model's template writes them, special tokens included: none is added");
  CLI::Option* const traces =
      command->add_option("--trace", arguments->replay.traces, "Traces of the model, whose tokens it reads again")
          ->check(names_a_file)
          ->type_name("FILE,...");
  take_several(*prompts, looks_like_files);
  take_several(*traces, looks_like_files);
  add_setting_options(*command, arguments->replay, true);
  command
      ->add_option("--continue", arguments->continuation,
                   "What comes after the prompt, fed token by token: trace (its own tokens), a number of tokens that "
                   "the model writes itself, or a text file (default: trace, or 64 tokens)")
      ->check(names_a_file)
      ->type_name("trace|N|FILE");
  command
      ->add_option("-n,--generate", arguments->generate,
                   "Then let the model write so many tokens freely over what each policy keeps (default: 0)")
      ->check(integer_in(0, std::numeric_limits<int>::max(), "a number of tokens"))
      ->type_name("N");
  add_generation_options(*command, arguments->generation);
  command
      ->add_option("--answer", arguments->answers,
                   "A text that counts as an answer when it is in what the model writes, beside those of a trace")
      ->type_name("TEXT");
  command->add_flag("--no-offline", arguments->no_offline, "Leave out what a replay measures, layer by layer");
  add_plugin_option(*command, arguments->plugins);
  add_output_options(*command, arguments->replay);
  command->add_flag("--resume", arguments->resume, "Go on with a run that was interrupted");
  command->callback([arguments] { run_live(*arguments); });
}

}  // namespace kvreplay::cli
