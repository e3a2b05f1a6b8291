#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/printable.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "notebooks-export/tables/tables.h"
#include "trace/inspection.h"
#include "trace/layer_fields.h"

namespace kvreplay::cli {
namespace {

using nlohmann::ordered_json;

// So that the whole answer stays on one screen.
constexpr std::size_t kLayersShown = 12;
constexpr std::size_t kSpansShown = 8;
constexpr std::size_t kTurnsShown = 12;
constexpr std::size_t kDatasetsShown = 24;
constexpr std::size_t kTextShown = 60;

struct InspectOptions {
  std::string trace;
  bool json = false;
  bool verify = false;
  int threads = 0;
};

std::string shape_text(const std::vector<Index>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

std::string types_text(const TensorKind& kind) {
  std::string text;
  for (const DType type : kind.types) text += (text.empty() ? "" : ", ") + std::string(name_of(type));
  return text;
}

// The first characters of a text, and that there is more.
std::string shortened(const std::string& text) {
  std::size_t end = 0;
  for (std::size_t characters = 0; end < text.size(); ++end) {
    const bool starts_character = (static_cast<unsigned char>(text[end]) & 0xc0) != 0x80;
    if (starts_character && ++characters > kTextShown) return text.substr(0, end) + "…";
  }
  return text;
}

std::string window_text(const TraceInfo& info) {
  std::map<int, int> windows;  // how many layers have each
  for (const LayerInfo& layer : info.layers) {
    if (layer.attends) ++windows[layer.rule.sliding_window];
  }
  std::string text;
  for (const auto& [window, layers] : windows) {
    const std::string name = window == 0 ? "no sliding window" : fmt::format("sliding window {}", window);
    if (windows.size() == 1) return name;
    text += fmt::format("{}{} in {} of {} layers", text.empty() ? "" : ", ", name, layers, info.model.num_layers);
  }
  return text;
}

// What layers say otherwise than the model, but for windows: those that say the same together.
void print_layers(const TraceInfo& info) {
  std::map<std::string, std::vector<int>> layers;
  for (int l = 0; l < info.model.num_layers; ++l) {
    const LayerInfo& layer = info.layers[static_cast<std::size_t>(l)];
    std::vector<std::string> texts;
    if (!layer.attends) texts.emplace_back("without attention");
    for (const LayerField& field : fields_of_its_own(info, l)) {
      if (field.name == "sliding_window" || field.name == "rotary" || !layer.attends) continue;
      texts.push_back(field.is_list ? "with " + field.name : fmt::format("{} {}", field.name, field.value));
    }
    if (layer.output_gate_dim > 0) texts.emplace_back("with output_gate");
    if (!texts.empty()) layers[fmt::format("{}", fmt::join(texts, ", "))].push_back(l);
  }
  bool first = true;
  for (const auto& [text, numbers] : layers) {
    fmt::print("{:<10} {} {}: {}\n", std::exchange(first, false) ? "layers" : "",
               numbers.size() == 1 ? "layer" : "layers", fmt::join(numbers, ", "), text);
  }
  first = true;
  for (const RotaryTable& table : info.rotary) {
    fmt::print("{:<10} {}: {} dimensions of a head turn, {}{}\n", std::exchange(first, false) ? "rotary" : "",
               printable(table.name), table.rotated_dims(), name_of(table.layout),
               table.attention_scaling != 1 ? fmt::format(", scaled by {:.6g}", table.attention_scaling) : "");
  }
}

// All fields of a layer; of lists, whether they are there.
struct LayerJson {
  template <class Number>
  void number(const char* name, const Number& value, Bound) {
    json[name] = value;
  }
  void text(const char* name, const std::string& value) { json[name] = value; }
  void list(const char* name, const std::vector<float>& values, Index) { json[name] = !values.empty(); }
  void norm(const char* name, const RmsNorm& norm, Index) { json[name] = !norm.weight.empty(); }

  ordered_json json;
};

ordered_json layers_json(const TraceInfo& info) {
  ordered_json layers = ordered_json::array();
  for (const LayerInfo& layer : info.layers) {
    LayerJson fields{.json = {{"attends", layer.attends}}};
    if (layer.attends) {
      visit_layer_fields(layer, info, fields);
      fields.json["output_gate"] = layer.output_gate_dim > 0;
    }
    layers.push_back(std::move(fields.json));
  }
  return layers;
}

void print_model(const Inspection& inspection) {
  const TraceInfo& info = inspection.info;
  const ModelInfo& model = info.model;
  fmt::print("{}: kvtrace, {}{}{}\n", inspection.path.string(), size_text(inspection.file_bytes),
             info.created_by.empty() ? "" : ", by " + printable(info.created_by),
             info.created_at.empty() ? "" : ", " + printable(info.created_at));
  if (!info.source.empty()) fmt::print("source     {}\n", printable(info.source));
  const auto count = [](int number, std::string_view noun) { return counted(static_cast<std::size_t>(number), noun); };
  fmt::print("model      {} ({}), {}, {} on {}, head dimension {}, hidden size {}\n", printable(model.name),
             printable(model.architecture), count(model.num_layers, "layer"),
             count(model.num_attention_heads, "query head"), count(model.num_key_value_heads, "KV head"),
             model.head_dim, model.hidden_size);
  fmt::print(
      "attention  softmax scale {:.6g}, rope theta {:.6g}, {}{}\n", model.softmax_scale, model.rope_theta,
      window_text(info),
      model.attn_logit_softcapping > 0 ? fmt::format(", logits capped at {:.6g}", model.attn_logit_softcapping) : "");
  print_layers(info);
}

void print_tokens(const Inspection& inspection) {
  const TraceInfo& info = inspection.info;
  fmt::print("tokens     {}, the first {} of them the prompt{}\n", info.num_tokens(), info.prompt_length,
             info.token_pieces.empty() ? "; no pieces" : "");
  if (!info.turn_starts.empty()) {
    const std::size_t shown = std::min(info.turn_starts.size(), kTurnsShown);
    std::vector<std::string> turns;
    for (std::size_t i = 0; i < shown; ++i) {
      turns.push_back(info.turn_roles.empty()
                          ? fmt::format("{}", info.turn_starts[i])
                          : fmt::format("{} ({})", info.turn_starts[i], printable(info.turn_roles[i])));
    }
    fmt::print("turns      {}, beginning at {}{}\n", info.turn_starts.size(), fmt::join(turns, ", "),
               shown < info.turn_starts.size() ? ", …; --json has all" : "");
  }
  fmt::print("queries    {} captured, positions {} to {}: {} in the prompt (its last {} without a gap), {} after it\n",
             info.num_queries(), info.query_positions.front(), info.query_positions.back(), inspection.prompt_queries,
             inspection.observation_window, inspection.later_queries);
  for (std::size_t i = 0; i < info.spans.size(); ++i) {
    if (i == kSpansShown) {
      fmt::print("           and {} more; --json has all\n", info.spans.size() - i);
      break;
    }
    const std::string& text = inspection.span_texts[i];
    fmt::print("{:<10} {} [{}, {}){}\n", i == 0 ? "spans" : "", shortened(printable(info.spans[i].label)),
               info.spans[i].start, info.spans[i].end,
               text.empty() ? "" : fmt::format(" \"{}\"", shortened(printable(text))));
  }
}

void print_tensors(const Inspection& inspection) {
  std::vector<std::vector<std::string>> rows = {{"tensor", "layers", "shape", "type", "on disk", "storage"}};
  for (const TensorKind& kind : inspection.tensors) {
    rows.push_back({kind.name, fmt::format("{}", kind.layers), shape_text(kind.shape), types_text(kind),
                    size_text(kind.stored_bytes), fmt::format("{}", fmt::join(kind.storage, "; "))});
  }
  fmt::print("\n{}", aligned_table(rows));
}

void print_fidelity(const Inspection& inspection) {
  const auto& fidelity = inspection.fidelity;
  if (fidelity.empty()) return;
  std::vector<std::size_t> layers(fidelity.size());
  std::iota(layers.begin(), layers.end(), std::size_t{0});
  const bool all = layers.size() <= kLayersShown;
  if (!all) {
    std::stable_sort(layers.begin(), layers.end(),
                     [&](std::size_t a, std::size_t b) { return fidelity[a].mean > fidelity[b].mean; });
    layers.resize(kLayersShown);
    std::sort(layers.begin(), layers.end());
  }
  const int captured = inspection.info.num_queries();
  fmt::print("\nfidelity: ‖stored−exact‖/‖exact‖ of the attention outputs, {}\n",
             inspection.recomputed_queries == captured
                 ? std::string("all captured queries")
                 : fmt::format("{} of {} queries per head, evenly spread", inspection.recomputed_queries, captured));
  std::vector<std::vector<std::string>> rows = {{"layer", "mean", "worst", "head", "position"}};
  for (const std::size_t layer : layers) {
    const LayerFidelity& found = fidelity[layer];
    rows.push_back({fmt::format("{}", layer), fmt::format("{:.1e}", found.mean), fmt::format("{:.1e}", found.worst),
                    fmt::format("{}", found.worst_head), fmt::format("{}", found.worst_position)});
  }
  fmt::print("{}", aligned_table(rows));
  if (!all) fmt::print("the {} least faithful of {} layers; --json has all\n", layers.size(), fidelity.size());
  fmt::print("{}\n", inspection.explanation);
}

void print_digests(const Inspection& inspection) {
  if (inspection.digests.empty()) return;
  const auto count = [&](DigestCheck::Outcome outcome) {
    return std::count_if(inspection.digests.begin(), inspection.digests.end(),
                         [&](const DigestCheck& check) { return check.outcome == outcome; });
  };
  fmt::print("\ndigests: {} ok, {} mismatch, {} without one\n", count(DigestCheck::Outcome::ok),
             count(DigestCheck::Outcome::mismatch), count(DigestCheck::Outcome::no_digest));
  const bool all = inspection.digests.size() <= kDatasetsShown;
  for (const DigestCheck& check : inspection.digests) {
    if (all || check.outcome == DigestCheck::Outcome::mismatch) {
      fmt::print("{:<10} {}\n", name_of(check.outcome), check.path);
    }
  }
  if (!all) fmt::print("--json has every dataset\n");
}

ordered_json to_json(const Inspection& inspection) {
  const TraceInfo& info = inspection.info;
  const ModelInfo& model = info.model;
  ordered_json json;
  json["path"] = inspection.path.string();
  json["file_bytes"] = inspection.file_bytes;
  json["created_by"] = info.created_by;
  json["created_at"] = info.created_at;
  json["source"] = info.source;
  json["model"] = {{"name", model.name},
                   {"architecture", model.architecture},
                   {"num_layers", model.num_layers},
                   {"num_attention_heads", model.num_attention_heads},
                   {"num_key_value_heads", model.num_key_value_heads},
                   {"head_dim", model.head_dim},
                   {"hidden_size", model.hidden_size},
                   {"rope_theta", model.rope_theta},
                   {"softmax_scale", model.softmax_scale},
                   {"sliding_window", model.sliding_window},
                   {"attn_logit_softcapping", model.attn_logit_softcapping},
                   {"layer_sliding_window", ordered_json::array()}};
  for (const LayerInfo& layer : info.layers) {
    json["model"]["layer_sliding_window"].push_back(layer.rule.sliding_window);
  }
  json["layers"] = layers_json(info);
  json["rotary"] = ordered_json::array();
  for (const RotaryTable& table : info.rotary) {
    json["rotary"].push_back({{"name", table.name},
                              {"rotated_dims", table.rotated_dims()},
                              {"attention_scaling", table.attention_scaling},
                              {"layout", name_of(table.layout)},
                              {"inverse_frequencies", table.inverse_frequencies}});
  }
  json["tokens"] = {{"count", info.num_tokens()},
                    {"prompt_length", info.prompt_length},
                    {"turn_starts", info.turn_starts},
                    {"turn_roles", info.turn_roles},
                    {"has_pieces", !info.token_pieces.empty()}};
  json["queries"] = {{"count", info.num_queries()},
                     {"first_position", info.query_positions.front()},
                     {"last_position", info.query_positions.back()},
                     {"in_prompt", inspection.prompt_queries},
                     {"observation_window", inspection.observation_window},
                     {"after_prompt", inspection.later_queries}};
  json["answers"] = info.answers;
  json["spans"] = ordered_json::array();
  for (std::size_t i = 0; i < info.spans.size(); ++i) {
    json["spans"].push_back({{"label", info.spans[i].label},
                             {"start", info.spans[i].start},
                             {"end", info.spans[i].end},
                             {"group", info.spans[i].group},
                             {"text", inspection.span_texts[i]}});
  }
  json["tensors"] = ordered_json::array();
  for (const TensorKind& kind : inspection.tensors) {
    std::vector<std::string> types;
    for (const DType type : kind.types) types.emplace_back(name_of(type));
    json["tensors"].push_back({{"name", kind.name},
                               {"layers", kind.layers},
                               {"shape", kind.shape},
                               {"types", types},
                               {"storage", kind.storage},
                               {"stored_bytes", kind.stored_bytes},
                               {"unpacked_bytes", kind.unpacked_bytes}});
  }
  json["fidelity"] = {{"recomputed_queries", inspection.recomputed_queries},
                      {"explanation", inspection.explanation},
                      {"layers", ordered_json::array()}};
  for (std::size_t layer = 0; layer < inspection.fidelity.size(); ++layer) {
    const LayerFidelity& found = inspection.fidelity[layer];
    json["fidelity"]["layers"].push_back({{"layer", layer},
                                          {"mean", found.mean},
                                          {"worst", found.worst},
                                          {"worst_head", found.worst_head},
                                          {"worst_position", found.worst_position}});
  }
  for (const DigestCheck& check : inspection.digests) {
    json["digests"].push_back({{"path", check.path},
                               {"outcome", name_of(check.outcome)},
                               {"stored", check.stored},
                               {"computed", check.computed}});
  }
  json["warnings"] = inspection.warnings;
  return json;
}

void run_inspect(const InspectOptions& options) {
  omp_set_num_threads(threads_or_all(options.threads));
  const TraceReader trace(options.trace);
  const Inspection inspection = inspect(trace, options.verify);
  if (options.json) {
    // Token pieces are whatever bytes the tokenizer has; JSON is UTF-8.
    fmt::print("{}\n", to_json(inspection).dump(2, ' ', false, ordered_json::error_handler_t::replace));
  } else {
    print_model(inspection);
    print_tokens(inspection);
    print_tensors(inspection);
    print_fidelity(inspection);
    print_digests(inspection);
    for (const std::string& warning : inspection.warnings) fmt::print("warning: {}\n", warning);
  }
  std::fflush(stdout);

  std::vector<std::string> damaged;
  for (const DigestCheck& check : inspection.digests) {
    if (check.outcome == DigestCheck::Outcome::mismatch) damaged.push_back(check.path);
  }
  if (!damaged.empty()) {
    throw Error(fmt::format("{}: {}{}: does not match its digest; the file is damaged, copy or capture it again",
                            options.trace, damaged.front(),
                            damaged.size() > 1 ? fmt::format(" and {} more", damaged.size() - 1) : ""));
  }
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command = app.add_subcommand("inspect", "Show what a trace holds and how far it can be trusted");
  command->add_option("trace", options->trace, "A kvtrace file")->required()->type_name("FILE");
  command->add_flag("--json", options->json, "The same facts as JSON");
  command->add_flag("--verify", options->verify,
                    "Read everything: compare digests, find NaN and infinity; either is a failure");
  add_threads_option(*command, options->threads);
  command->footer(
      fmt::format("Fidelity recomputes at most {} captured queries per head, evenly spread.", kRecomputedQueries));
  command->callback([options]() { run_inspect(*options); });
}

}  // namespace kvreplay::cli
