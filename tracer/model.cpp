#include "tracer/model.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "base/digest.h"

namespace kvreplay::tracer {

namespace {

// The weights of the decoder, whose names begin with a root, and what they are called and shaped like.
class DecoderWeights {
 public:
  DecoderWeights(const SafeTensors& files, std::string root) : files_(files), root_(std::move(root)) {}

  Tensor get(const std::string& name, std::initializer_list<Index> shape) {
    shapes_.push_back(fmt::format("{} {}", name, fmt::join(shape, ",")));
    return files_.get(root_ + name, shape);
  }

  std::string shapes_digest() const {
    std::vector<std::string> sorted = shapes_;
    std::ranges::sort(sorted);
    Digest digest;
    for (const std::string& shape : sorted) digest.add(shape);
    return digest.text();
  }

 private:
  const SafeTensors& files_;
  std::string root_;
  std::vector<std::string> shapes_;
};

std::vector<float> read_vector(DecoderWeights& weights, const std::string& name, Index size) {
  const Tensor tensor = weights.get(name, {size});
  std::vector<float> values(static_cast<std::size_t>(size));
  to_float32(tensor.type, tensor.data, values);
  return values;
}

LinearWeights find_linear(DecoderWeights& weights, const std::string& name, Index out, Index in, bool has_bias) {
  LinearWeights linear;
  linear.weight = weights.get(name + ".weight", {out, in});
  if (has_bias) linear.bias = read_vector(weights, name + ".bias", out);
  return linear;
}

// `count` rows of a matrix from `first` on, with their biases.
LinearWeights rows_of(const LinearWeights& linear, Index first, Index count) {
  LinearWeights rows;
  rows.weight = linear.weight;
  rows.weight.shape[0] = count;
  rows.weight.data += first * linear.weight.columns() * static_cast<Index>(size_of(linear.weight.type));
  if (!linear.bias.empty()) rows.bias.assign(linear.bias.begin() + first, linear.bias.begin() + first + count);
  return rows;
}

// The first place at which the files have such a tensor; the usual one where they have none, for the message.
std::string place_of(const SafeTensors& files, std::initializer_list<std::string_view> candidates) {
  const auto found = std::find_if(candidates.begin(), candidates.end(),
                                  [&](std::string_view name) { return files.contains(std::string(name)); });
  return std::string(found != candidates.end() ? *found : *candidates.begin());
}

// Whether two tensors of one shape hold the same values.
bool same_values(const Tensor& a, const Tensor& b) {
  const Index width = a.columns();
  if (a.type == b.type) {
    return std::memcmp(a.data, b.data, static_cast<std::size_t>(a.rows() * width) * size_of(a.type)) == 0;
  }
  std::vector<float> row_of_a(static_cast<std::size_t>(width));
  std::vector<float> row_of_b(row_of_a.size());
  for (Index row = 0; row < a.rows(); ++row) {
    to_float32(a.type, a.data + row * width * static_cast<Index>(size_of(a.type)), row_of_a);
    to_float32(b.type, b.data + row * width * static_cast<Index>(size_of(b.type)), row_of_b);
    if (row_of_a != row_of_b) return false;
  }
  return true;
}

}  // namespace

Model::Model(const std::filesystem::path& folder)
    : config(read_model_config(folder)), files(folder), warnings(config.warnings) {
  const Index hidden = config.hidden_size;
  const Index intermediate = config.intermediate_size;
  const Index query_size = Index{config.num_attention_heads} * config.head_dim;
  const Index kv_size = Index{config.num_key_value_heads} * config.head_dim;

  // Multimodal checkpoints, old and new, hold the language model beside others.
  constexpr std::string_view kEmbedding = "embed_tokens.weight";
  std::string root = place_of(files, {"model.embed_tokens.weight", "language_model.model.embed_tokens.weight",
                                      "model.language_model.embed_tokens.weight"});
  root.resize(root.size() - kEmbedding.size());
  DecoderWeights decoder(files, root);
  embedding = decoder.get(std::string(kEmbedding), {config.vocab_size, hidden});

  const auto norm = [&](const std::string& name, Index size) {
    std::vector<float> weight = read_vector(decoder, name + ".weight", size);
    for (float& value : weight) value += static_cast<float>(config.norm_offset);
    return weight;
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = fmt::format("layers.{}.", layer);
    const auto linear = [&](const char* name, Index out, Index in, bool has_bias) {
      return find_linear(decoder, prefix + name, out, in, has_bias);
    };
    LayerWeights weights;
    weights.attention_norm = norm(prefix + "input_layernorm", hidden);
    if (config.fused_projections) {
      const LinearWeights all =
          linear("self_attn.qkv_proj", query_size + 2 * kv_size, hidden, config.query_key_value_bias);
      weights.query = rows_of(all, 0, query_size);
      weights.key = rows_of(all, query_size, kv_size);
      weights.value = rows_of(all, query_size + kv_size, kv_size);
    } else {
      weights.query = linear("self_attn.q_proj", query_size, hidden, config.query_key_value_bias);
      weights.key = linear("self_attn.k_proj", kv_size, hidden, config.query_key_value_bias);
      weights.value = linear("self_attn.v_proj", kv_size, hidden, config.query_key_value_bias);
    }
    weights.output = linear("self_attn.o_proj", hidden, query_size, config.output_bias);
    if (config.query_key_norm) {
      weights.query_norm = norm(prefix + "self_attn.q_norm", config.head_dim);
      weights.key_norm = norm(prefix + "self_attn.k_norm", config.head_dim);
    }
    if (config.norm_after) {
      weights.output_norm = norm(prefix + "post_attention_layernorm", hidden);
      weights.mlp_norm = norm(prefix + "pre_feedforward_layernorm", hidden);
      weights.down_norm = norm(prefix + "post_feedforward_layernorm", hidden);
    } else {
      weights.mlp_norm = norm(prefix + "post_attention_layernorm", hidden);
    }
    if (config.fused_projections) {
      const LinearWeights both = linear("mlp.gate_up_proj", 2 * intermediate, hidden, config.mlp_bias);
      weights.gate = rows_of(both, 0, intermediate);
      weights.up = rows_of(both, intermediate, intermediate);
    } else {
      weights.gate = linear("mlp.gate_proj", intermediate, hidden, config.mlp_bias);
      weights.up = linear("mlp.up_proj", intermediate, hidden, config.mlp_bias);
    }
    weights.down = linear("mlp.down_proj", hidden, intermediate, config.mlp_bias);
    layers.push_back(std::move(weights));
  }
  final_norm = norm("norm", hidden);
  weight_shapes_digest = decoder.shapes_digest();
  const std::string head = place_of(files, {"lm_head.weight", "language_model.lm_head.weight"});
  output_head.weight = embedding;
  if (config.tie_word_embeddings && !files.contains(head)) return;
  output_head.weight = files.get(head, {config.vocab_size, hidden});
  // Fine-tunes leave the flag of the model that they began with.
  if (config.tie_word_embeddings && !same_values(output_head.weight, embedding)) {
    warnings.push_back(
        fmt::format("{}: tie_word_embeddings is true, but {} is not the embeddings; it is used as it stands, as "
                    "transformers 5 does",
                    (folder / "config.json").string(), head));
  }
}

}  // namespace kvreplay::tracer
