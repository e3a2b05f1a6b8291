#include "tracer/prompt.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <functional>

#include "base/error.h"

namespace kvreplay::tracer {

std::vector<std::int32_t> parse_token_ids(std::string_view text, std::string_view name) {
  constexpr std::string_view kSpaces = " \t\r\n\v\f";
  std::vector<std::int32_t> ids;
  for (std::size_t at = text.find_first_not_of(kSpaces); at != std::string_view::npos;
       at = text.find_first_not_of(kSpaces, at)) {
    const std::string_view word = text.substr(at, text.find_first_of(kSpaces, at) - at);
    std::int32_t id = 0;
    const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (failure != std::errc() || end != word.data() + word.size() || id < 0) {
      constexpr std::size_t kLongest = 40;
      throw Error(fmt::format("{}: {:?} is not a token id", name, word.substr(0, kLongest)));
    }
    ids.push_back(id);
    at += word.size();
  }
  if (ids.empty()) throw Error(fmt::format("{}: holds no token ids", name));
  return ids;
}

Prompt prepare_prompt(const PromptOptions& options, const ModelConfig& config) {
  Prompt prompt;
  if (options.prompt_text || Tokenizer::exists_in(options.model_folder)) {
    prompt.tokenizer = std::make_unique<Tokenizer>(options.model_folder, config.bos_token_id);
  }
  std::optional<Encoding> encoding;
  if (options.prompt_is_templated && prompt.tokenizer != nullptr && !prompt.tokenizer->reads_special_tokens()) {
    throw Error(
        fmt::format("{}: {} takes the names of special tokens in a templated prompt for ordinary text, BOS too; "
                    "use a tokenizer.json, or give the prompt's token ids with --tokens",
                    options.model_folder.string(), prompt.tokenizer->file_name()));
  }
  if (options.prompt_text) {
    if (options.prompt_text->empty()) throw Error(fmt::format("{}: the prompt is empty", options.prompt_name));
    encoding = prompt.tokenizer->encode(*options.prompt_text, !options.prompt_is_templated);
    const auto stands_for_text = [](const auto& range) { return range.first < range.second; };
    if (std::none_of(encoding->bytes.begin(), encoding->bytes.end(), stands_for_text)) {
      throw Error(fmt::format("{}: the tokenizer finds no token in the prompt", options.prompt_name));
    }
    prompt.ids = encoding->ids;
  } else {
    prompt.ids = options.prompt_ids;
  }
  if (prompt.ids.empty()) throw Error(fmt::format("{}: the prompt is empty", options.prompt_name));
  for (std::size_t position = 0; position < prompt.ids.size(); ++position) {
    const std::int32_t id = prompt.ids[position];
    if (id < 0 || id >= config.vocab_size) {
      throw Error(fmt::format("{}: token id {} at position {} is not in the model's vocabulary of {}",
                              options.prompt_name, id, position, config.vocab_size));
    }
  }
  prompt.spans = locate_spans(options.spans, options.prompt_text.value_or(""), encoding ? &*encoding : nullptr,
                              static_cast<int>(prompt.ids.size()));
  prompt.turns = locate_turns(options.turns, options.prompt_text.value_or(""), encoding ? &*encoding : nullptr,
                              static_cast<int>(prompt.ids.size()));
  return prompt;
}

std::optional<std::string> length_warning(const ModelConfig& config, const std::filesystem::path& model_folder,
                                          Index prompt, Index later) {
  const Index longest = prompt + later;
  if (config.cache_limit > 0 && later > 0 && longest > config.cache_limit) {
    throw Error(fmt::format(
        "{}: sliding_window {}: the layers of {} have no window, but transformers 5 shortens their cache to it, so "
        "that generated tokens see less than the prompt did, which no trace can say; set it to null, or let prompt and "
        "generated tokens be no more than {} together",
        (model_folder / "config.json").string(), config.cache_limit, config.model_type, config.cache_limit));
  }
  if (config.max_position_embeddings == 0 || longest <= config.max_position_embeddings) return std::nullopt;
  return fmt::format("the run may take {} positions, but {} was made for {}; what lies beyond may be unlike it",
                     longest, config.name, config.max_position_embeddings);
}

std::string text_after(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt,
                       std::span<const std::int32_t> generated) {
  std::vector<std::int32_t> all(prompt.begin(), prompt.end());
  const std::string before = tokenizer.decode(all);
  all.insert(all.end(), generated.begin(), generated.end());
  const std::string whole = tokenizer.decode(all);
  return whole.starts_with(before) ? whole.substr(before.size()) : tokenizer.decode(generated);
}

std::vector<std::string> pieces_of(const Tokenizer* tokenizer, std::span<const std::int32_t> ids) {
  std::vector<std::string> pieces;
  if (tokenizer == nullptr) return pieces;
  for (const std::int32_t id : ids) pieces.push_back(tokenizer->piece(id));
  return pieces;
}

TraceInfo describe(const PromptOptions& options, const Model& model, const Prompt& prompt, Index first_captured) {
  const ModelConfig& config = model.config;
  TraceInfo info;
  info.model.name = config.name;
  info.model.architecture = config.model_type;
  info.model.num_layers = config.num_layers;
  info.model.num_attention_heads = config.num_attention_heads;
  info.model.num_key_value_heads = config.num_key_value_heads;
  info.model.head_dim = config.head_dim;
  info.model.hidden_size = config.hidden_size;
  info.model.weight_shapes_digest = model.weight_shapes_digest;
  info.model.rope_theta = config.rotary.theta;
  info.model.softmax_scale = config.softmax_scale;
  info.model.attn_logit_softcapping = config.attn_logit_softcapping;
  const auto& windows = config.sliding_windows;
  const bool all_alike = std::adjacent_find(windows.begin(), windows.end(), std::not_equal_to<>()) == windows.end();
  info.model.sliding_window = all_alike ? windows.front() : 0;
  info.source = fmt::format("model {}, prompt {}{}", config.name, options.prompt_name,
                            options.prompt_text ? fmt::format(" by {}", prompt.tokenizer->file_name()) : "");
  info.token_ids = prompt.ids;
  info.token_pieces = pieces_of(prompt.tokenizer.get(), prompt.ids);
  info.prompt_length = info.num_tokens();
  for (int position = static_cast<int>(first_captured); position < info.prompt_length; ++position) {
    info.query_positions.push_back(position);
  }
  info.spans = prompt.spans;
  for (const Turn& turn : prompt.turns) {
    info.turn_starts.push_back(turn.start);
    if (!turn.role.empty()) info.turn_roles.push_back(turn.role);
  }
  info.layers = layers_with_windows(info.model, config.sliding_windows);
  for (int layer = 0; layer < config.num_layers && config.norm_after; ++layer) {
    info.layers[static_cast<std::size_t>(layer)].projection_output_norm = {
        .weight = model.layers[static_cast<std::size_t>(layer)].output_norm, .epsilon = config.rms_norm_eps};
  }
  for (int layer = 0; layer < config.num_layers; ++layer) {
    RotaryTable table{.name = config.sliding_window(layer) > 0 ? "local" : "global",
                      .inverse_frequencies = config.rotary_of(layer).inverse_frequencies(config.head_dim)};
    auto like = std::ranges::find(info.rotary, table.inverse_frequencies, &RotaryTable::inverse_frequencies);
    if (like == info.rotary.end()) like = info.rotary.insert(like, std::move(table));
    info.layers[static_cast<std::size_t>(layer)].rotary = like->name;
  }
  return info;
}

}  // namespace kvreplay::tracer
