#include "tracer/model_config.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string_view>

#include "base/error.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

// An architecture that the forward pass computes exactly. Supporting another one is a row here, if it needs no more
// than ModelConfig describes.
struct Architecture {
  std::string_view class_name;
  std::string_view model_type;
};

constexpr std::array kArchitectures = {Architecture{"LlamaForCausalLM", "llama"}};

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
  Section(const json& content, std::string place) : content_(content), place_(std::move(place)) {}

  bool has(const char* key) const { return content_.contains(key) && !content_[key].is_null(); }

  const json& at(const char* key) const {
    if (!has(key)) throw Error(fmt::format("{}: {} is missing", place_, key));
    return content_[key];
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
    if (!content_[key].is_boolean()) throw wrong(key, "true or false");
    return content_[key].get<bool>();
  }

  std::string text(const char* key) const {
    if (!at(key).is_string()) throw wrong(key, "a text");
    return content_[key].get<std::string>();
  }

  std::vector<std::int32_t> token_ids(const char* key) const {
    std::vector<std::int32_t> ids;
    if (!has(key)) return ids;
    const json& value = content_[key];
    for (const json& id : value.is_array() ? value : json::array({value})) {
      if (!id.is_number_integer() || id.get<double>() < 0 ||
          id.get<double>() > std::numeric_limits<std::int32_t>::max()) {
        throw wrong(key, "a token id or a list of token ids");
      }
      ids.push_back(id.get<std::int32_t>());
    }
    return ids;
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
    std::string value = content_[key].dump(-1, ' ', true, json::error_handler_t::replace);
    return value.size() > kLongest ? value.substr(0, kLongest) + "..." : value;
  }

  const json& content_;
  std::string place_;
};

std::string_view supported_architecture(const Section& config) {
  std::string supported;
  for (const Architecture& candidate : kArchitectures) {
    supported += (supported.empty() ? "" : ", ") + std::string(candidate.class_name);
  }
  if (config.has("architectures")) {
    const json& names = config.at("architectures");
    for (const Architecture& candidate : kArchitectures) {
      if (names == json::array({candidate.class_name})) return candidate.model_type;
    }
    throw config.unsupported("architectures", supported);
  }
  const std::string model_type = config.text("model_type");
  for (const Architecture& candidate : kArchitectures) {
    if (model_type == candidate.model_type) return candidate.model_type;
  }
  throw config.unsupported("model_type", supported);
}

RotaryEmbedding read_rotary(const Section& config, const std::string& place) {
  RotaryEmbedding rotary;
  rotary.theta = config.positive_or("rope_theta", rotary.theta);
  // rope_parameters is what newer versions of transformers write: rope_scaling with rope_theta inside.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!config.has(key)) continue;
    if (!config.at(key).is_object()) throw config.wrong(key, "an object");
    const Section scaling(config.at(key), place + ": " + key);
    rotary.theta = scaling.positive_or("rope_theta", rotary.theta);
    if (scaling.positive_or("partial_rotary_factor", 1) != 1) {
      throw scaling.unsupported("partial_rotary_factor", "1");
    }
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
      rotary.original_max_position_embeddings = scaling.positive("original_max_position_embeddings");
      if (rotary.high_freq_factor <= rotary.low_freq_factor) {
        throw scaling.wrong("high_freq_factor", "larger than low_freq_factor");
      }
    } else if (type != "default") {
      throw scaling.unsupported(type_key, "default, linear, llama3");
    }
  }
  return rotary;
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
  const Section config(content, path.string());

  ModelConfig model;
  model.model_type = supported_architecture(config);
  const auto full_path = std::filesystem::canonical(folder);
  model.name = full_path.filename().string();
  if (config.has("quantization_config")) throw config.unsupported("quantization_config", "float weights");

  model.num_layers = config.size("num_hidden_layers");
  model.num_attention_heads = config.size("num_attention_heads");
  model.num_key_value_heads = config.size_or("num_key_value_heads", model.num_attention_heads);
  model.hidden_size = config.size("hidden_size");
  model.intermediate_size = config.size("intermediate_size");
  model.vocab_size = config.size("vocab_size");
  model.max_position_embeddings = config.size_or("max_position_embeddings", 0);
  if (model.num_attention_heads % model.num_key_value_heads != 0) {
    throw config.wrong("num_key_value_heads",
                       fmt::format("a divisor of the {} attention heads", model.num_attention_heads));
  }
  if (config.has("head_dim")) {
    model.head_dim = config.size("head_dim");
  } else if (model.hidden_size % model.num_attention_heads == 0) {
    model.head_dim = model.hidden_size / model.num_attention_heads;
  } else {
    throw config.wrong("hidden_size", fmt::format("a multiple of the {} attention heads, or head_dim be given",
                                                  model.num_attention_heads));
  }
  if (model.head_dim % 2 != 0) {
    throw Error(fmt::format("{}: head dimension {} must be even for rotary embedding", path.string(), model.head_dim));
  }

  if (config.has("hidden_act") && config.text("hidden_act") != "silu") throw config.unsupported("hidden_act", "silu");
  if (config.positive_or("partial_rotary_factor", 1) != 1) throw config.unsupported("partial_rotary_factor", "1");
  model.rms_norm_eps = config.positive_or("rms_norm_eps", model.rms_norm_eps);
  model.softmax_scale = 1 / std::sqrt(static_cast<double>(model.head_dim));
  model.rotary = read_rotary(config, path.string());
  model.attention_bias = config.flag_or("attention_bias", false);
  model.mlp_bias = config.flag_or("mlp_bias", false);
  model.tie_word_embeddings = config.flag_or("tie_word_embeddings", false);

  const auto bos = config.token_ids("bos_token_id");
  if (!bos.empty()) model.bos_token_id = bos.front();
  model.eos_token_ids = config.token_ids("eos_token_id");
  // Chat models end their turns with ids that only generation_config.json lists.
  const auto generation_path = folder / "generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    const json generation_content = read_json(generation_path);
    const Section generation(generation_content, generation_path.string());
    if (generation.has("eos_token_id")) model.eos_token_ids = generation.token_ids("eos_token_id");
  }
  return model;
}

}  // namespace kvreplay::tracer
