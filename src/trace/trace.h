// What a captured run consists of, apart from its tensors. See docs/trace-format.md.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/attention_rule.h"
#include "base/dtype.h"
#include "base/matrix.h"
#include "base/rotary.h"

namespace kvreplay {

/// The `format_version` of traces that are written, the newest that is read.
constexpr int kTraceFormatVersion = 2;

/// An RMS norm: x is divided by √(mean(x²) + epsilon) and multiplied by the weight.
struct RmsNorm {
  std::vector<float> weight;  ///< empty: there is no such norm
  double epsilon = 0;

  bool operator==(const RmsNorm&) const = default;
};

/// What a layer's attention looks like. trace/layer_fields.h names its members as the file does.
struct LayerInfo {
  bool attends = true;          ///< false: the layer has no attention, and nothing of it is in the file
  int num_attention_heads = 0;  ///< H
  int num_key_value_heads = 0;  ///< K
  int key_dim = 0;              ///< Dk, of keys and queries
  int value_dim = 0;            ///< Dv, of values and outputs
  AttentionRule rule;
  int cache_of = -1;                 ///< the earlier layer whose keys and values this one reads; −1: it has its own
  int values_in_keys = 0;            ///< Dv where values are the first Dv columns of keys; 0: they stand apart
  std::string rotary;                ///< name of its table among TraceInfo::rotary; empty: none is known
  RmsNorm projection_norm;           ///< [H·Dv] over all heads, between outputs and projection
  RmsNorm projection_output_norm;    ///< [C] between the projection and the residual stream
  std::vector<float> residual_norm;  ///< [Q] ‖x‖ of the residual stream after this layer's attention; empty: unknown
  int output_gate_dim = 0;           ///< factors of a head's output before the projection: 0 none, 1, or Dv

  /// Query heads that read one KV head.
  int group_size() const { return num_attention_heads / num_key_value_heads; }

  bool operator==(const LayerInfo&) const = default;
};

/// "half" or "interleaved".
std::string name_of(RotaryTable::Layout layout);

/// The attributes of /model: what holds for every layer that does not say otherwise.
struct ModelInfo {
  std::string name;
  std::string architecture;
  int num_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  double rope_theta = 0;
  double softmax_scale = 0;           ///< what q·k is multiplied by before the softmax
  int sliding_window = 0;             ///< keys that a query sees, its own included; 0: all before it
  double attn_logit_softcapping = 0;  ///< c in c·tanh(logit/c); 0: none
  std::string weight_shapes_digest;   ///< of the names and shapes of the decoder's weights; empty: not known

  /// Query heads that read one KV head.
  int group_size() const { return num_attention_heads / num_key_value_heads; }

  /// A layer that says nothing of its own.
  LayerInfo layer() const;
};

/// Layers that differ from the model's in their sliding windows [L] alone.
std::vector<LayerInfo> layers_with_windows(const ModelInfo& model, std::span<const int> sliding_windows);

/// A half-open range of positions worth following, such as a planted needle.
struct Span {
  int start = 0;
  int end = 0;
  std::string label;
  std::string group = {};  ///< spans of one group only help together; empty: it stands alone
};

/// The most likely token after the prompt, and its logit: what the run's model can be told by.
struct NextToken {
  std::int32_t id = 0;
  double logit = 0;
};

/// Everything of a trace but its tensors.
struct TraceInfo {
  ModelInfo model;
  std::string created_by;
  std::string created_at;
  std::string source;
  std::vector<std::int32_t> token_ids;        ///< [T]
  int prompt_length = 0;                      ///< P, at most T
  std::optional<NextToken> next_token = {};   ///< none: not known
  std::vector<std::string> token_pieces;      ///< [T], or empty where the trace has none
  std::vector<std::int32_t> turn_starts;      ///< first position of each conversation turn
  std::vector<std::string> turn_roles;        ///< who speaks in each turn, or empty where nobody is named
  std::vector<std::int32_t> query_positions;  ///< [Q], ascending
  std::vector<Span> spans;
  std::vector<std::string> answers;  ///< texts that count as right
  std::vector<RotaryTable> rotary;   ///< by name
  std::vector<LayerInfo> layers;     ///< [L]; in what is to be written, none for layers that are as the model says

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_queries() const { return static_cast<int>(query_positions.size()); }

  /// The table that turned a layer's keys and queries; null where none is named.
  const RotaryTable* rotary_of(const LayerInfo& layer) const;

  /// Also where `layers` are none.
  LayerInfo layer(int number) const {
    return layers.empty() ? model.layer() : layers[static_cast<std::size_t>(number)];
  }
};

/// The per-head tensors of a layer.
enum class HeadTensor {
  keys,     ///< [K, T, Dk]
  values,   ///< [K, T, Dv]
  queries,  ///< [H, Q, Dk]
  outputs,  ///< [H, Q, Dv]
};

}  // namespace kvreplay
