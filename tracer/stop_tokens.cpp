#include "tracer/stop_tokens.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/file_text.h"
#include "base/printable.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

// What models are trained to end their turns with, where that is not the end of the sequence. Only a template that
// writes one of them says that this model does.
constexpr std::string_view kEndsOfTurn[] = {"<|im_end|>",         "<|eot_id|>",      "<|eot|>",
                                            "<end_of_turn>",      "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
                                            "<end_of_utterance>", "<|endofturn|>",   "[|endofturn|]"};

// Between the parts of an answer where there are answers of several, whose end then has another name.
constexpr std::string_view kEndOfPart = "<|end|>";
constexpr std::string_view kEndOfAnswer = "<|return|>";

json read_object(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return json::object();
  json content = json::parse(file_text(path), nullptr, false);
  if (!content.is_object()) throw Error(fmt::format("{}: is not a valid JSON object", path.string()));
  return content;
}

// A text at a key, or in the object there as `part` of it; nothing where the key or the part is absent or null.
std::optional<std::string> text_at(const json& object, const char* key, const char* part,
                                   const std::filesystem::path& path) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  if (found->is_object() && found->contains(part) && (*found)[part].is_string()) {
    return (*found)[part].get<std::string>();
  }
  throw Error(fmt::format("{}: {} must be a text", path.string(), key));
}

std::optional<std::string> eos_token(const std::filesystem::path& folder) {
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"}) {
    if (auto text = text_at(read_object(folder / file), "eos_token", "content", folder / file)) return text;
  }
  return std::nullopt;
}

// All of the model's chat templates, one behind the other.
std::string chat_templates(const std::filesystem::path& folder) {
  std::string templates;
  const auto path = folder / "tokenizer_config.json";
  const json config = read_object(path);
  const char* const key = "chat_template";
  if (const auto several = config.find(key); several != config.end() && several->is_array()) {
    for (const json& entry : *several) {
      const json named = {{key, entry}};
      templates += text_at(named, key, "template", path).value_or("");
    }
  } else {
    templates += text_at(config, key, "template", path).value_or("");
  }
  const auto own_file = folder / "chat_template.jinja";
  if (std::filesystem::exists(own_file)) templates += file_text(own_file);
  return templates;
}

std::set<std::string> names_of_stops(const std::filesystem::path& folder) {
  std::set<std::string> names;
  if (auto name = eos_token(folder)) names.insert(std::move(*name));
  const std::string templates = chat_templates(folder);
  const auto writes = [&templates](std::string_view name) { return templates.find(name) != std::string::npos; };
  for (const std::string_view name : kEndsOfTurn) {
    if (writes(name)) names.emplace(name);
  }
  if (writes(kEndOfAnswer)) {
    names.emplace(kEndOfAnswer);
  } else if (writes(kEndOfPart)) {
    names.emplace(kEndOfPart);
  }
  return names;
}

bool is_number(const std::string& text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
}

Error no_token(const std::string& text, const Tokenizer& tokenizer) {
  std::vector<std::string> pieces;
  for (const std::int32_t id : tokenizer.encode(text, false).ids) {
    pieces.push_back(fmt::format("\"{}\"", printable(tokenizer.piece(id))));
  }
  return Error(fmt::format("--stop {}: is no single token of the model, but {}; give one that it is, or its id",
                           printable(text), fmt::join(pieces, " ")));
}

}  // namespace

std::vector<std::int32_t> stop_ids(const StopOptions& options, const std::filesystem::path& model_folder,
                                   const ModelConfig& config, const Tokenizer* tokenizer) {
  std::set<std::int32_t> ids;
  std::set<std::string> of_model;
  if (options.by_model) {
    ids.insert(config.eos_token_ids.begin(), config.eos_token_ids.end());
    if (tokenizer != nullptr) of_model = names_of_stops(model_folder);
  }
  std::set<std::string> of_user;
  for (const std::string& stop : options.others) {
    if (stop.empty()) throw UsageError("--stop: an empty text is no token");
    if (!is_number(stop)) {
      if (tokenizer == nullptr) {
        throw Error(fmt::format(
            "--stop {}: the model's folder has no tokenizer that could read it; give the token's id", printable(stop)));
      }
      of_user.insert(stop);
      continue;
    }
    std::int32_t id = 0;
    const auto [end, failure] = std::from_chars(stop.data(), stop.data() + stop.size(), id);
    if (failure != std::errc() || id >= config.vocab_size) {
      throw Error(fmt::format("--stop {}: is not in the model's vocabulary of {}", stop, config.vocab_size));
    }
    ids.insert(id);
  }
  std::set<std::string> found;
  for (std::int32_t id = 0; id < config.vocab_size && !(of_model.empty() && of_user.empty()); ++id) {
    std::string piece = tokenizer->piece(id);
    if (!of_model.contains(piece) && !of_user.contains(piece)) continue;
    ids.insert(id);
    found.insert(std::move(piece));
  }
  for (const std::string& text : of_user) {
    if (!found.contains(text)) throw no_token(text, *tokenizer);
  }
  return {ids.begin(), ids.end()};
}

bool is_over(std::span<const std::int32_t> stop_ids, std::int32_t last) {
  return std::binary_search(stop_ids.begin(), stop_ids.end(), last);
}

}  // namespace kvreplay::tracer
