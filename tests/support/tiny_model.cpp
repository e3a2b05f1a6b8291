#include "support/tiny_model.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <numbers>
#include <random>

#include "support/temporary_folder.h"

namespace kvreplay::test {

namespace {

constexpr double kEpsilon = 1e-5;
constexpr double kTheta = 10000;

}  // namespace

std::string safetensors_bytes(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

TinyModel::TinyModel(const TinyModelOptions& options) : options_(options) {
  const Index hidden = options.hidden;
  const Index intermediate = options.intermediate;
  const Index query_width = Index{options.heads} * head_dim();
  const Index kv_width = Index{options.kv_heads} * head_dim();
  add("model.embed_tokens.weight", {options.vocabulary, hidden}, 1);
  for (int layer = 0; layer < options.layers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    const auto add_linear = [&](const char* name, Index out, Index in, bool bias, double gain) {
      add(prefix + name + ".weight", {out, in}, gain / std::sqrt(static_cast<double>(in)));
      if (bias) add(prefix + name + ".bias", {out}, 0.5);
    };
    add(prefix + "input_layernorm.weight", {hidden}, 0.2, 1);
    // Attention that is neither flat nor on one key.
    add_linear("self_attn.q_proj", query_width, hidden, options.attention_bias, 1.5);
    add_linear("self_attn.k_proj", kv_width, hidden, options.attention_bias, 1.5);
    add_linear("self_attn.v_proj", kv_width, hidden, options.attention_bias, 1);
    add_linear("self_attn.o_proj", hidden, query_width, options.attention_bias, 1);
    add(prefix + "post_attention_layernorm.weight", {hidden}, 0.2, 1);
    add_linear("mlp.gate_proj", intermediate, hidden, options.mlp_bias, 1);
    add_linear("mlp.up_proj", intermediate, hidden, options.mlp_bias, 1);
    add_linear("mlp.down_proj", hidden, intermediate, options.mlp_bias, 1);
  }
  add("model.norm.weight", {hidden}, 0.2, 1);
  if (!options.tied) add("lm_head.weight", {options.vocabulary, hidden}, 1);
}

void TinyModel::add(const std::string& name, std::vector<Index> shape, double scale, double mean) {
  Index count = 1;
  for (const Index size : shape) count *= size;
  std::mt19937 random(options_.seed * 1000 + static_cast<unsigned>(weights_.size()));
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(mean + scale * static_cast<double>(normal(random)));
  std::vector<std::byte> stored(values.size() * size_of(options_.dtype));
  from_float32(options_.dtype, values, stored.data());
  to_float32(options_.dtype, stored.data(), values);
  weights_[name] = {std::move(shape), {values.begin(), values.end()}};
}

void TinyModel::set_weight(const std::string& tensor, std::size_t index, double value) {
  weights_.at(tensor).values.at(index) = value;
}

std::string TinyModel::bytes_of(const Weights& weights) const {
  const std::vector<float> values(weights.values.begin(), weights.values.end());
  std::string bytes(values.size() * size_of(options_.dtype), '\0');
  from_float32(options_.dtype, values, reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

nlohmann::json TinyModel::config() const {
  nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
                           {"model_type", "llama"},
                           {"hidden_act", "silu"},
                           {"num_hidden_layers", options_.layers},
                           {"hidden_size", options_.hidden},
                           {"num_attention_heads", options_.heads},
                           {"num_key_value_heads", options_.kv_heads},
                           {"intermediate_size", options_.intermediate},
                           {"vocab_size", options_.vocabulary},
                           {"max_position_embeddings", 1024},
                           {"rms_norm_eps", kEpsilon},
                           {"rope_theta", kTheta},
                           {"rope_scaling", options_.rope_scaling},
                           {"attention_bias", options_.attention_bias},
                           {"mlp_bias", options_.mlp_bias},
                           {"tie_word_embeddings", options_.tied}};
  if (options_.head_dim > 0) config["head_dim"] = options_.head_dim;
  return config;
}

void TinyModel::write(const std::filesystem::path& folder, int shards) const {
  std::filesystem::create_directories(folder);
  write_file(folder / "config.json", config().dump(2));
  std::vector<nlohmann::json> headers(static_cast<std::size_t>(shards), nlohmann::json::object());
  std::vector<std::string> data(headers.size());
  nlohmann::json weight_map;
  const char* dtype = options_.dtype == DType::float32 ? "F32" : options_.dtype == DType::float16 ? "F16" : "BF16";
  std::size_t count = 0;
  for (const auto& [name, weights] : weights_) {
    const std::size_t shard = count++ % headers.size();
    const std::string bytes = bytes_of(weights);
    headers[shard][name] = {{"dtype", dtype},
                            {"shape", weights.shape},
                            {"data_offsets", {data[shard].size(), data[shard].size() + bytes.size()}}};
    data[shard] += bytes;
    weight_map[name] = fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, shards);
  }
  if (shards == 1) {
    write_file(folder / "model.safetensors", safetensors_bytes(headers[0].dump(), data[0]));
    return;
  }
  for (std::size_t shard = 0; shard < headers.size(); ++shard) {
    write_file(folder / fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, shards),
               safetensors_bytes(headers[shard].dump(), data[shard]));
  }
  write_file(folder / "model.safetensors.index.json", nlohmann::json({{"weight_map", weight_map}}).dump());
}

TinyModel::Rows TinyModel::linear(const Rows& rows, const std::string& name) const {
  const Weights& weight = weights_.at(name + ".weight");
  const auto bias = weights_.find(name + ".bias");
  const auto out_width = static_cast<std::size_t>(weight.shape[0]);
  const auto in_width = static_cast<std::size_t>(weight.shape[1]);
  Rows out;
  for (const auto& row : rows) {
    std::vector<double> result(out_width);
    for (std::size_t i = 0; i < out_width; ++i) {
      for (std::size_t j = 0; j < in_width; ++j) result[i] += weight.values[i * in_width + j] * row[j];
      if (bias != weights_.end()) result[i] += bias->second.values[i];
    }
    out.push_back(std::move(result));
  }
  return out;
}

TinyModel::Rows TinyModel::normalize(const Rows& rows, const std::string& name) const {
  Rows out = rows;
  for (auto& row : out) {
    double squares = 0;
    for (const double value : row) squares += value * value;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(row.size()) + kEpsilon);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] *= factor * weights_.at(name).values[i];
  }
  return out;
}

// As in transformers' modeling_rope_utils: in terms of wavelengths.
double TinyModel::inverse_frequency(int pair) const {
  const double frequency = 1 / std::pow(kTheta, 2.0 * pair / head_dim());
  const auto& scaling = options_.rope_scaling;
  if (scaling.is_null()) return frequency;
  const double factor = scaling.at("factor");
  if (scaling.value("rope_type", scaling.value("type", "")) == "linear") return frequency / factor;
  const double low_factor = scaling.at("low_freq_factor");
  const double high_factor = scaling.at("high_freq_factor");
  const double context = scaling.at("original_max_position_embeddings");
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength > context / low_factor) return frequency / factor;
  if (wavelength < context / high_factor) return frequency;
  const double smooth = (context / wavelength - low_factor) / (high_factor - low_factor);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

ReferenceLayer::Heads TinyModel::split(const Rows& rows, int heads, bool rotate) const {
  const int dim = head_dim();
  ReferenceLayer::Heads split(static_cast<std::size_t>(heads));
  for (int head = 0; head < heads; ++head) {
    for (std::size_t position = 0; position < rows.size(); ++position) {
      const auto begin = rows[position].begin() + head * dim;
      std::vector<double> vector(begin, begin + dim);
      for (int i = 0; rotate && i < dim / 2; ++i) {
        const double angle = static_cast<double>(position) * inverse_frequency(i);
        const double left = begin[i];
        const double right = begin[i + dim / 2];
        vector[static_cast<std::size_t>(i)] = left * std::cos(angle) - right * std::sin(angle);
        vector[static_cast<std::size_t>(i + dim / 2)] = right * std::cos(angle) + left * std::sin(angle);
      }
      split[static_cast<std::size_t>(head)].push_back(std::move(vector));
    }
  }
  return split;
}

ReferenceRun TinyModel::run(std::span<const std::int32_t> ids) const {
  const auto hidden_width = static_cast<std::size_t>(options_.hidden);
  const auto dim = static_cast<std::size_t>(head_dim());
  const Weights& embedding = weights_.at("model.embed_tokens.weight");
  Rows hidden;
  for (const std::int32_t id : ids) {
    const auto begin = embedding.values.begin() + id * options_.hidden;
    hidden.emplace_back(begin, begin + options_.hidden);
  }
  const auto add = [&](const Rows& rows) {
    for (std::size_t t = 0; t < hidden.size(); ++t) {
      for (std::size_t i = 0; i < hidden_width; ++i) hidden[t][i] += rows[t][i];
    }
  };

  ReferenceRun run;
  for (int number = 0; number < options_.layers; ++number) {
    const std::string prefix = fmt::format("model.layers.{}.", number);
    ReferenceLayer layer;
    const Rows input = normalize(hidden, prefix + "input_layernorm.weight");
    layer.queries = split(linear(input, prefix + "self_attn.q_proj"), options_.heads, true);
    layer.keys = split(linear(input, prefix + "self_attn.k_proj"), options_.kv_heads, true);
    layer.values = split(linear(input, prefix + "self_attn.v_proj"), options_.kv_heads, false);
    Rows joined(ids.size(), std::vector<double>(static_cast<std::size_t>(options_.heads) * dim));
    for (std::size_t h = 0; h < layer.queries.size(); ++h) {
      const std::size_t kv = h / static_cast<std::size_t>(options_.heads / options_.kv_heads);
      layer.mass.emplace_back(ids.size());
      layer.outputs.emplace_back();
      for (std::size_t t = 0; t < ids.size(); ++t) {
        std::vector<double> weights(t + 1);
        double total = 0;
        for (std::size_t n = 0; n <= t; ++n) {
          double product = 0;
          for (std::size_t d = 0; d < dim; ++d) product += layer.queries[h][t][d] * layer.keys[kv][n][d];
          weights[n] = std::exp(product / std::sqrt(static_cast<double>(dim)));
          total += weights[n];
        }
        std::vector<double> output(dim);
        for (std::size_t n = 0; n <= t; ++n) {
          layer.mass[h][n] += weights[n] / total;
          for (std::size_t d = 0; d < dim; ++d) output[d] += weights[n] / total * layer.values[kv][n][d];
        }
        for (std::size_t d = 0; d < dim; ++d) joined[t][h * dim + d] = output[d];
        layer.outputs[h].push_back(std::move(output));
      }
    }
    add(linear(joined, prefix + "self_attn.o_proj"));
    const Rows mlp_input = normalize(hidden, prefix + "post_attention_layernorm.weight");
    Rows gate = linear(mlp_input, prefix + "mlp.gate_proj");
    const Rows up = linear(mlp_input, prefix + "mlp.up_proj");
    for (std::size_t t = 0; t < gate.size(); ++t) {
      for (std::size_t i = 0; i < gate[t].size(); ++i) gate[t][i] *= up[t][i] / (1 + std::exp(-gate[t][i]));
    }
    add(linear(gate, prefix + "mlp.down_proj"));
    run.layers.push_back(std::move(layer));
  }
  const Rows last = normalize({hidden.back()}, "model.norm.weight");
  const Weights& head = weights_.at(options_.tied ? "model.embed_tokens.weight" : "lm_head.weight");
  for (int id = 0; id < options_.vocabulary; ++id) {
    double logit = 0;
    for (std::size_t i = 0; i < hidden_width; ++i) {
      logit += head.values[static_cast<std::size_t>(id) * hidden_width + i] * last[0][i];
    }
    run.logits.push_back(logit);
  }
  return run;
}

}  // namespace kvreplay::test
