// What a model's architecture says that its config.json need not: one row of data for each.
#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "tracer/model_config.h"

namespace kvreplay::tracer {

/// Which layers see a sliding window, where config.json does not list them as layer_types.
enum class WindowedLayers {
  none,         ///< there is no window
  all,          ///< all, unless sliding_window is null
  late,         ///< with use_sliding_window: those from max_window_layers on
  all_but_nth,  ///< all but every n-th
};

/// An architecture as transformers' configuration and model classes of that name define it: what is fixed, and what
/// holds for keys that config.json leaves out. Zero stands for keys that have no such value.
struct Architecture {
  std::string_view class_name;  ///< in `architectures`
  std::string_view model_type;
  std::string_view text_config{};  ///< the key under which the language model of a multimodal one is described

  // Fixed.
  bool query_key_value_bias = false;  ///< on these three, rather than on all four as attention_bias says
  bool fused_projections = false;
  bool query_key_norm = false;
  bool norm_after = false;
  bool norm_stored_minus_one = false;
  bool embedding_scaled = false;  ///< by the square root of the hidden size
  bool has_local_rotary = false;  ///< layers with a window have a rotary embedding of their own
  std::string_view activation_key = "hidden_act";
  bool gelu_is_tanh = false;  ///< "gelu" means its approximation by tanh
  WindowedLayers windowed_layers = WindowedLayers::none;

  // Unless config.json says otherwise.
  Activation activation = Activation::silu;
  bool tie_word_embeddings = false;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;  ///< 0: as many as attention heads
  int head_dim = 0;             ///< 0: hidden size / attention heads
  int vocab_size = 0;
  double rms_norm_eps = 1e-6;
  int sliding_window = 0;
  int max_window_layers = 28;
  int windowed_period = 0;             ///< the n of all_but_nth
  bool reads_windowed_period = false;  ///< config.json may name another n as sliding_window_pattern
  double rope_theta = 10000;
  double query_pre_attn_scalar = 0;                   ///< 0: not a key; the softmax is scaled by head_dim^-0.5
  std::optional<double> attn_logit_softcapping = {};  ///< nothing: not a key
  std::optional<double> final_logit_softcapping = {};
};

/// The architectures that the forward pass computes exactly.
std::span<const Architecture> architectures();

}  // namespace kvreplay::tracer
