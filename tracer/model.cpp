#include "tracer/model.h"

#include <fmt/format.h>

#include <string>

namespace kvreplay::tracer {

namespace {

std::vector<float> read_vector(const SafeTensors& files, const std::string& name, Index size) {
  const Tensor tensor = files.get(name, {size});
  std::vector<float> values(static_cast<std::size_t>(size));
  to_float32(tensor.type, tensor.data, values);
  return values;
}

LinearWeights find_linear(const SafeTensors& files, const std::string& name, Index out, Index in, bool has_bias) {
  LinearWeights linear;
  linear.weight = files.get(name + ".weight", {out, in});
  if (has_bias) linear.bias = read_vector(files, name + ".bias", out);
  return linear;
}

}  // namespace

Model::Model(const std::filesystem::path& folder) : config(read_model_config(folder)), files(folder) {
  const Index hidden = config.hidden_size;
  const Index intermediate = config.intermediate_size;
  const Index query_size = Index{config.num_attention_heads} * config.head_dim;
  const Index kv_size = Index{config.num_key_value_heads} * config.head_dim;

  embedding = files.get("model.embed_tokens.weight", {config.vocab_size, hidden});
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    const auto linear = [&](const char* name, Index out, Index in, bool has_bias) {
      return find_linear(files, prefix + name, out, in, has_bias);
    };
    LayerWeights weights;
    weights.attention_norm = read_vector(files, prefix + "input_layernorm.weight", hidden);
    weights.query = linear("self_attn.q_proj", query_size, hidden, config.attention_bias);
    weights.key = linear("self_attn.k_proj", kv_size, hidden, config.attention_bias);
    weights.value = linear("self_attn.v_proj", kv_size, hidden, config.attention_bias);
    weights.output = linear("self_attn.o_proj", hidden, query_size, config.attention_bias);
    weights.mlp_norm = read_vector(files, prefix + "post_attention_layernorm.weight", hidden);
    weights.gate = linear("mlp.gate_proj", intermediate, hidden, config.mlp_bias);
    weights.up = linear("mlp.up_proj", intermediate, hidden, config.mlp_bias);
    weights.down = linear("mlp.down_proj", hidden, intermediate, config.mlp_bias);
    layers.push_back(std::move(weights));
  }
  final_norm = read_vector(files, "model.norm.weight", hidden);
  if (config.tie_word_embeddings) {
    output_head.weight = embedding;
  } else {
    output_head.weight = files.get("lm_head.weight", {config.vocab_size, hidden});
  }
}

}  // namespace kvreplay::tracer
