#include "tracer/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "tracer/architectures.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

json read_json(const std::filesystem::path& path) {
  std::ifstream stream(path);
  if (!stream) throw Error(fmt::format("{}: cannot be read", path.string()));
  json content = json::parse(stream, nullptr, false);
  if (!content.is_object()) throw Error(fmt::format("{}: is not a valid JSON object", path.string()));
  return content;
}

// A JSON object whose values are read with a check. Null stands for absent, as in Hugging Face configurations.
class Section {
 public:
  Section(const json& content, std::string place) : content_(&content), place_(std::move(place)) {}

  const std::string& place() const { return place_; }

  const json& content() const { return *content_; }

  /// Whether there is something at `key`, be it null.
  bool says(const char* key) const { return content_->contains(key); }

  bool has(const char* key) const { return says(key) && !(*content_)[key].is_null(); }

  const json& at(const char* key) const {
    if (!has(key)) throw missing(key);
    return (*content_)[key];
  }

  Section section(const char* key) const {
    if (!at(key).is_object()) throw wrong(key, "an object");
    return {at(key), fmt::format("{}: {}", place_, key)};
  }

  int size(const char* key) const {
    const json& value = at(key);
    if (!value.is_number_integer() || value.get<double>() < 1 || value.get<double>() > kLargestSize) {
      throw wrong(key, fmt::format("a whole number from 1 to {}", kLargestSize));
    }
    return value.get<int>();
  }

  int size_or(const char* key, int absent) const { return has(key) ? size(key) : absent; }

  double positive(const char* key) const {
    const json& value = at(key);
    if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>())) {
      throw wrong(key, "a positive number");
    }
    return value.get<double>();
  }

  double positive_or(const char* key, double absent) const { return has(key) ? positive(key) : absent; }

  bool flag_or(const char* key, bool absent) const {
    if (!has(key)) return absent;
    if (!(*content_)[key].is_boolean()) throw wrong(key, "true or false");
    return (*content_)[key].get<bool>();
  }

  std::string text(const char* key) const {
    if (!at(key).is_string()) throw wrong(key, "a text");
    return (*content_)[key].get<std::string>();
  }

  std::vector<std::int32_t> token_ids(const char* key) const {
    std::vector<std::int32_t> ids;
    if (!has(key)) return ids;
    const json& value = (*content_)[key];
    for (const json& id : value.is_array() ? value : json::array({value})) {
      if (!id.is_number_integer() || id.get<double>() < 0 ||
          id.get<double>() > std::numeric_limits<std::int32_t>::max()) {
        throw wrong(key, "a token id or a list of token ids");
      }
      ids.push_back(id.get<std::int32_t>());
    }
    return ids;
  }

  Error missing(const char* key, std::string_view reason = "") const {
    return Error(fmt::format("{}: {} is missing{}{}", place_, key, reason.empty() ? "" : ", but ", reason));
  }

  Error wrong(const char* key, std::string_view expected) const {
    return Error(fmt::format("{}: {} must be {}, not {}", place_, key, expected, shortened(key)));
  }

  Error unsupported(const char* key, std::string_view supported) const {
    return Error(fmt::format("{}: {} {} is not supported; supported: {}", place_, key, shortened(key), supported));
  }

 private:
  static constexpr int kLargestSize = 1 << 28;

  std::string shortened(const char* key) const {
    constexpr std::size_t kLongest = 120;
    std::string value = (*content_)[key].dump(-1, ' ', true, json::error_handler_t::replace);
    return value.size() > kLongest ? value.substr(0, kLongest) + "..." : value;
  }

  const json* content_;
  std::string place_;
};

const Architecture& find_architecture(const Section& config) {
  std::string supported;
  for (const Architecture& candidate : architectures()) {
    supported += (supported.empty() ? "" : ", ") + std::string(candidate.class_name);
  }
  if (config.has("architectures")) {
    const json& names = config.at("architectures");
    for (const Architecture& candidate : architectures()) {
      if (names == json::array({candidate.class_name})) return candidate;
    }
    throw config.unsupported("architectures", supported);
  }
  const std::string model_type = config.text("model_type");
  for (const Architecture& candidate : architectures()) {
    if (model_type == candidate.model_type) return candidate;
  }
  throw config.unsupported("model_type", supported);
}

constexpr std::string_view kFull = "full_attention";
constexpr std::string_view kSliding = "sliding_attention";

// What stands at the place of rope_scaling, of rope_parameters, or of a kind of layer in the latter.
RotaryEmbedding read_rotary(const Section& scaling, double theta, int max_position_embeddings) {
  RotaryEmbedding rotary;
  rotary.theta = scaling.positive_or("rope_theta", theta);
  if (scaling.positive_or("partial_rotary_factor", 1) != 1) throw scaling.unsupported("partial_rotary_factor", "1");
  const char* type_key = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling.has(type_key) ? scaling.text(type_key) : "default";
  if (type == "linear") {
    rotary.scaling = RotaryEmbedding::Scaling::linear;
    rotary.factor = scaling.positive("factor");
  } else if (type == "llama3") {
    rotary.scaling = RotaryEmbedding::Scaling::llama3;
    rotary.factor = scaling.positive("factor");
    rotary.low_freq_factor = scaling.positive("low_freq_factor");
    rotary.high_freq_factor = scaling.positive("high_freq_factor");
    const char* context = "original_max_position_embeddings";
    rotary.original_max_position_embeddings =
        scaling.has(context) || max_position_embeddings == 0 ? scaling.positive(context) : max_position_embeddings;
    if (rotary.high_freq_factor <= rotary.low_freq_factor) {
      throw scaling.wrong("high_freq_factor", "larger than low_freq_factor");
    }
  } else if (type != "default") {
    throw scaling.unsupported(type_key, "default, linear, llama3");
  }
  return rotary;
}

// What transformers 5 takes for the rotary parameters of the layers without a window where those with one have others:
// rope_parameters of that kind, or nothing, with rope_scaling over them. A "type" in rope_scaling alone is the older
// name of rope_type and overrides none, which is told.
json merged_parameters(const Section& config, std::vector<std::string>& warnings) {
  json merged = json::object();
  if (config.has("rope_parameters")) {
    const Section kinds = config.section("rope_parameters");
    if (kinds.has(kFull.data())) merged = kinds.section(kFull.data()).content();
  } else {
    merged["rope_type"] = "default";
  }
  if (!config.has("rope_scaling")) return merged;
  const Section scaling = config.section("rope_scaling");
  merged.update(scaling.content());
  if (scaling.has("type") && !scaling.has("rope_type") && merged.contains("rope_type") &&
      merged["rope_type"] != scaling.content()["type"]) {
    warnings.push_back(fmt::format(
        "{}: type {} is not obeyed, as it is not by transformers 5 in this architecture; if positions were scaled in "
        "training, write rope_type",
        scaling.place(), scaling.content()["type"].dump()));
  }
  return merged;
}

// Older versions of transformers write rope_theta (and rope_local_base_freq for layers with a window) beside
// rope_scaling, which is for layers without one; newer ones write all of it into rope_parameters, by kind of layer
// where that matters.
void read_rotary(const Section& config, const Architecture& architecture, ModelConfig& model) {
  if (config.positive_or("partial_rotary_factor", 1) != 1) throw config.unsupported("partial_rotary_factor", "1");
  const int context = model.max_position_embeddings;
  const double theta = config.positive_or("rope_theta", architecture.rope_theta);
  model.rotary.theta = theta;
  if (architecture.has_local_rotary) {
    model.local_rotary.theta = config.positive_or("rope_local_base_freq", model.local_rotary.theta);
    if (config.has("rope_parameters")) {
      const Section kinds = config.section("rope_parameters");
      if (!kinds.has(kFull.data()) && !kinds.has(kSliding.data())) {
        throw config.unsupported("rope_parameters", "objects for full_attention and sliding_attention");
      }
      if (kinds.has(kSliding.data())) {
        model.local_rotary = read_rotary(kinds.section(kSliding.data()), model.local_rotary.theta, context);
      }
    }
    const char* place = config.has("rope_scaling") ? "rope_scaling" : "rope_parameters";
    const json merged = merged_parameters(config, model.warnings);
    model.rotary = read_rotary({merged, fmt::format("{}: {}", config.place(), place)}, theta, context);
    return;
  }
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!config.has(key)) continue;
    model.rotary = read_rotary(config.section(key), theta, context);
    break;
  }
  model.local_rotary = model.rotary;
}

// For each layer whether it sees a window, as layer_types says, or nothing where it does not say.
std::optional<std::vector<bool>> read_layer_types(const Section& config, int num_layers) {
  if (!config.has("layer_types")) return std::nullopt;
  const json& types = config.at("layer_types");
  if (!types.is_array() || types.size() != static_cast<std::size_t>(num_layers)) {
    throw config.wrong("layer_types", fmt::format("a list with the types of {} layers", num_layers));
  }
  std::vector<bool> windowed;
  for (const json& type : types) {
    if (type != kFull && type != kSliding) {
      throw config.unsupported("layer_types", fmt::format("{}, {}", kFull, kSliding));
    }
    windowed.push_back(type == kSliding);
  }
  return windowed;
}

// Of every how many layers one has no window. Names for it that transformers does not look at are told where they say
// something else.
int read_windowed_period(const Section& config, const Architecture& architecture, std::vector<std::string>& warnings) {
  const char* const read = "sliding_window_pattern";
  const int period = architecture.reads_windowed_period ? config.size_or(read, architecture.windowed_period)
                                                        : architecture.windowed_period;
  for (const char* key : {read, "_sliding_window_pattern"}) {
    if (config.has("layer_types") || !config.has(key) || config.at(key) == period) continue;
    warnings.push_back(fmt::format(
        "{}: {} {} is not obeyed, as it is not by transformers 5 in this architecture: one layer of every {} "
        "has no window; layer_types can say otherwise",
        config.place(), key, config.at(key).dump(), period));
  }
  return period;
}

std::vector<int> read_sliding_windows(const Section& config, const Architecture& architecture, ModelConfig& model) {
  const int num_layers = model.num_layers;
  int window = config.says("sliding_window") ? config.size_or("sliding_window", 0) : architecture.sliding_window;
  std::vector<bool> windowed(static_cast<std::size_t>(num_layers));
  switch (architecture.windowed_layers) {
    case WindowedLayers::none:
      // With layer_types, transformers takes these for its cache.
      if (!config.has("layer_types")) model.cache_limit = window;
      window = 0;
      break;
    case WindowedLayers::all:
      windowed.assign(windowed.size(), window > 0);
      break;
    case WindowedLayers::late: {
      if (!config.flag_or("use_sliding_window", false)) window = 0;
      // A count of layers from 0 on, not a size.
      const int first = config.has("max_window_layers") && config.at("max_window_layers") == 0
                            ? 0
                            : config.size_or("max_window_layers", architecture.max_window_layers);
      for (int layer = first; window > 0 && layer < num_layers; ++layer) {
        windowed[static_cast<std::size_t>(layer)] = true;
      }
      break;
    }
    case WindowedLayers::all_but_nth: {
      const int period = read_windowed_period(config, architecture, model.warnings);
      for (int layer = 0; layer < num_layers; ++layer) {
        windowed[static_cast<std::size_t>(layer)] = (layer + 1) % period != 0;
      }
    }
  }
  if (const auto types = read_layer_types(config, num_layers)) {
    const bool may_choose = architecture.windowed_layers == WindowedLayers::late ||
                            architecture.windowed_layers == WindowedLayers::all_but_nth;
    if (!may_choose && *types != windowed) {
      throw config.unsupported("layer_types", fmt::format("{} in every layer of {}", window > 0 ? kSliding : kFull,
                                                          architecture.class_name));
    }
    windowed = *types;
  }
  std::vector<int> windows(windowed.size());
  for (std::size_t layer = 0; layer < windows.size(); ++layer) {
    if (!windowed[layer]) continue;
    if (window == 0) throw config.missing("sliding_window", fmt::format("layer {} attends to one", layer));
    // A cache that holds window - 1 tokens for the next one would be empty, which transformers takes for unlimited.
    if (window == 1) throw config.unsupported("sliding_window", "2 and more");
    windows[layer] = window;
  }
  return windows;
}

Activation read_activation(const Section& config, const Architecture& architecture) {
  const char* key = architecture.activation_key.data();
  if (!config.has(key)) return architecture.activation;
  const std::string name = config.text(key);
  if (name == "silu") return Activation::silu;
  if (name == "gelu_pytorch_tanh" || (name == "gelu" && architecture.gelu_is_tanh)) return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  throw config.unsupported(key, "silu, gelu, gelu_pytorch_tanh");
}

// A cap for logits that is a key of this architecture, or refused.
double read_softcapping(const Section& config, const char* key, std::optional<double> absent) {
  if (!absent) {
    if (config.has(key)) throw config.unsupported(key, "null");
    return 0;
  }
  return config.says(key) ? config.positive_or(key, 0) : *absent;
}

void read_sizes(const Section& config, const Architecture& architecture, ModelConfig& model) {
  const auto size = [&](const char* key, int absent) {
    return absent > 0 ? config.size_or(key, absent) : config.size(key);
  };
  model.num_layers = config.size("num_hidden_layers");
  model.num_attention_heads = size("num_attention_heads", architecture.num_attention_heads);
  model.num_key_value_heads = architecture.num_key_value_heads > 0 && !config.says("num_key_value_heads")
                                  ? architecture.num_key_value_heads
                                  : config.size_or("num_key_value_heads", model.num_attention_heads);
  model.hidden_size = config.size("hidden_size");
  model.intermediate_size = config.size("intermediate_size");
  model.vocab_size = size("vocab_size", architecture.vocab_size);
  model.max_position_embeddings = config.size_or("max_position_embeddings", 0);
  if (model.num_attention_heads % model.num_key_value_heads != 0) {
    throw Error(fmt::format("{}: num_key_value_heads must be a divisor of the {} attention heads, not {}",
                            config.place(), model.num_attention_heads, model.num_key_value_heads));
  }
  if (config.has("head_dim")) {
    model.head_dim = config.size("head_dim");
  } else if (architecture.head_dim > 0 && !config.says("head_dim")) {
    model.head_dim = architecture.head_dim;
  } else if (model.hidden_size % model.num_attention_heads == 0) {
    model.head_dim = model.hidden_size / model.num_attention_heads;
  } else {
    throw config.wrong("hidden_size", fmt::format("a multiple of the {} attention heads, or head_dim be given",
                                                  model.num_attention_heads));
  }
  if (model.head_dim % 2 != 0) {
    throw Error(fmt::format("{}: head dimension {} must be even for rotary embedding", config.place(), model.head_dim));
  }
}

}  // namespace

std::vector<float> RotaryEmbedding::inverse_frequencies(int head_dim) const {
  std::vector<float> frequencies(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / head_dim);
    if (scaling == Scaling::linear) {
      frequency /= factor;
    } else if (scaling == Scaling::llama3) {
      const double turns = original_max_position_embeddings * frequency / (2 * std::numbers::pi);
      if (turns < low_freq_factor) {
        frequency /= factor;
      } else if (turns <= high_freq_factor) {
        const double smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
        frequency = (1 - smooth) * frequency / factor + smooth * frequency;
      }
    }
    frequencies[i] = static_cast<float>(frequency);
  }
  return frequencies;
}

ModelConfig read_model_config(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder)) {
    throw Error(fmt::format("{}: is not a model folder", folder.string()));
  }
  const auto path = folder / "config.json";
  if (!std::filesystem::exists(path)) {
    throw Error(
        fmt::format("{}: holds no config.json; give the folder of a model in Hugging Face format", folder.string()));
  }
  const json content = read_json(path);
  const Section top(content, path.string());
  const Architecture& architecture = find_architecture(top);
  const Section config = architecture.text_config.empty() ? top : top.section(architecture.text_config.data());

  ModelConfig model;
  // Of a multimodal model, that of its language model.
  const bool has_own_type = !architecture.text_config.empty() && config.has("model_type");
  model.model_type = has_own_type ? config.text("model_type") : architecture.model_type;
  const auto full_path = std::filesystem::canonical(folder);
  model.name = full_path.filename().string();
  for (const Section& section : {top, config}) {
    if (section.has("quantization_config")) throw section.unsupported("quantization_config", "float weights");
  }
  if (config.flag_or("use_bidirectional_attention", false)) {
    throw config.unsupported("use_bidirectional_attention", "false");
  }

  read_sizes(config, architecture, model);
  model.embedding_scale = architecture.embedding_scaled ? std::sqrt(static_cast<double>(model.hidden_size)) : 1;
  model.rms_norm_eps = config.positive_or("rms_norm_eps", architecture.rms_norm_eps);
  model.norm_offset = architecture.norm_stored_minus_one ? 1 : 0;
  model.norm_after = architecture.norm_after;
  model.query_key_norm = architecture.query_key_norm;
  model.fused_projections = architecture.fused_projections;
  model.output_bias = !architecture.query_key_value_bias && config.flag_or("attention_bias", false);
  model.query_key_value_bias = architecture.query_key_value_bias || model.output_bias;
  model.mlp_bias = config.flag_or("mlp_bias", false);
  model.activation = read_activation(config, architecture);
  model.tie_word_embeddings =
      config.flag_or("tie_word_embeddings", top.flag_or("tie_word_embeddings", architecture.tie_word_embeddings));

  double scaled_by = model.head_dim;
  if (architecture.query_pre_attn_scalar > 0) {
    scaled_by = config.positive_or("query_pre_attn_scalar", architecture.query_pre_attn_scalar);
  }
  model.softmax_scale = 1 / std::sqrt(scaled_by);
  model.attn_logit_softcapping =
      read_softcapping(config, "attn_logit_softcapping", architecture.attn_logit_softcapping);
  model.final_logit_softcapping =
      read_softcapping(config, "final_logit_softcapping", architecture.final_logit_softcapping);
  model.sliding_windows = read_sliding_windows(config, architecture, model);
  read_rotary(config, architecture, model);

  auto bos = top.token_ids("bos_token_id");
  if (bos.empty()) bos = config.token_ids("bos_token_id");
  if (!bos.empty()) model.bos_token_id = bos.front();
  // Each of them may name what the others do not: chat models end their turns with ids that only one lists.
  const auto add_ends = [&model](const Section& section) {
    for (const std::int32_t id : section.token_ids("eos_token_id")) {
      if (std::ranges::find(model.eos_token_ids, id) == model.eos_token_ids.end()) model.eos_token_ids.push_back(id);
    }
  };
  const auto generation_path = folder / "generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    const json generation_content = read_json(generation_path);
    add_ends({generation_content, generation_path.string()});
  }
  add_ends(top);
  add_ends(config);
  return model;
}

}  // namespace kvreplay::tracer
