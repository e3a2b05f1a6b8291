// What config.json says about a model, as plain data: the forward pass is one, and architectures differ in what stands
// here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kvreplay::tracer {

/// Rotary position embedding: position p turns the pair (i, i + D/2) of a head by p · inverse_frequencies()[i].
struct RotaryEmbedding {
  enum class Scaling { none, linear, llama3 };

  double theta = 10000;
  Scaling scaling = Scaling::none;
  double factor = 1;                               ///< linear, llama3: how far the context was stretched
  double low_freq_factor = 1;                      ///< llama3
  double high_freq_factor = 4;                     ///< llama3
  double original_max_position_embeddings = 8192;  ///< llama3

  /// [head_dim / 2] in radians per position, in float32 as models are trained with.
  /// llama3: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
  std::vector<float> inverse_frequencies(int head_dim) const;
};

/// A decoder-only transformer: pre-norm blocks of rotary attention and a gated MLP.
struct ModelConfig {
  std::string name;        ///< the folder's
  std::string model_type;  ///< such as llama

  int num_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;  ///< tokens that the model was made for; 0: not said

  double rms_norm_eps = 1e-6;
  double softmax_scale = 0;
  RotaryEmbedding rotary;
  bool attention_bias = false;  ///< on the query, key, value and output projections
  bool mlp_bias = false;
  bool tie_word_embeddings = false;

  std::optional<std::int32_t> bos_token_id;
  std::vector<std::int32_t> eos_token_ids;  ///< generation stops after any of them

  /// Query heads that read one KV head.
  int group_size() const { return num_attention_heads / num_key_value_heads; }
};

/// Reads `folder`/config.json, and the end-of-sequence ids from generation_config.json where that has some.
/// Throws Error, naming the file and the key, if something is missing, contradicts itself or is not supported.
ModelConfig read_model_config(const std::filesystem::path& folder);

}  // namespace kvreplay::tracer
