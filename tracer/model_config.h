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

/// What a gated MLP bends its gate with.
enum class Activation {
  silu,
  gelu,
  gelu_tanh,  ///< the approximation of GELU by tanh
};

/// A decoder-only transformer of blocks of rotary attention and a gated MLP, each of which reads its input through an
/// RMSNorm and adds what it gives to it.
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

  double embedding_scale = 1;  ///< what embeddings are multiplied by
  double rms_norm_eps = 0;
  double norm_offset = 0;       ///< what is added to the weights of every norm: 1 where they are stored less 1
  bool norm_after = false;      ///< whether what attention and MLP give goes through a norm as well, before it is added
  bool query_key_norm = false;  ///< whether every head's queries and keys do, before rotary embedding

  bool fused_projections = false;  ///< one matrix for query, key and value, and one for gate and up
  bool query_key_value_bias = false;
  bool output_bias = false;  ///< of the output projection
  bool mlp_bias = false;
  Activation activation = Activation::silu;
  bool tie_word_embeddings = false;

  double softmax_scale = 0;
  double attn_logit_softcapping = 0;   ///< c in c·tanh(logit / c), before the softmax; 0: none
  double final_logit_softcapping = 0;  ///< the same for the logits of the vocabulary
  std::vector<int> sliding_windows;    ///< [num_layers], keys that a query sees, its own included; 0: all before it
  RotaryEmbedding rotary;
  RotaryEmbedding local_rotary;  ///< of layers with a sliding window

  /// Positions that transformers' cache holds at most although no layer has a window: it shortens the cache to a
  /// sliding_window in config.json that the model's code knows nothing of. Within them nothing is lost; 0: no such
  /// limit.
  int cache_limit = 0;

  std::optional<std::int32_t> bos_token_id;
  std::vector<std::int32_t> eos_token_ids;  ///< of all files; generation stops after any of them

  std::vector<std::string> warnings;  ///< what config.json says and transformers does not do, in sentences

  /// Query heads that read one KV head.
  int group_size() const { return num_attention_heads / num_key_value_heads; }

  int sliding_window(int layer) const { return sliding_windows[static_cast<std::size_t>(layer)]; }
  const RotaryEmbedding& rotary_of(int layer) const { return sliding_window(layer) > 0 ? local_rotary : rotary; }
};

/// Reads `folder`/config.json, and end-of-sequence ids from generation_config.json besides.
/// Throws Error, naming the file and the key, if something is missing, contradicts itself or is not supported.
ModelConfig read_model_config(const std::filesystem::path& folder);

}  // namespace kvreplay::tracer
