// What a captured run consists of, apart from its tensors. See docs/trace-format.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay {

/// The `format_version` of traces that are written, the newest that is read.
constexpr int kTraceFormatVersion = 2;

/// The attributes of /model: the shapes that all tensors of a trace agree with.
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

  /// Query heads that read one KV head.
  int group_size() const { return num_attention_heads / num_key_value_heads; }
};

/// A half-open range of positions worth following, such as a planted needle.
struct Span {
  int start = 0;
  int end = 0;
  std::string label;
};

/// Everything of a trace but its tensors.
struct TraceInfo {
  ModelInfo model;
  std::string created_by;
  std::string created_at;
  std::string source;
  std::vector<std::int32_t> token_ids;        ///< [T]
  int prompt_length = 0;                      ///< P, at most T
  std::vector<std::string> token_pieces;      ///< [T], or empty where the trace has none
  std::vector<std::int32_t> turn_starts;      ///< first position of each conversation turn
  std::vector<std::int32_t> query_positions;  ///< [Q], ascending
  std::vector<Span> spans;
  std::vector<int> layer_sliding_window;  ///< [L], the model's where a layer does not say otherwise

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  int num_queries() const { return static_cast<int>(query_positions.size()); }
};

/// The per-head tensors of a layer.
enum class HeadTensor {
  keys,     ///< [K, T, D]
  values,   ///< [K, T, D]
  queries,  ///< [H, Q, D]
  outputs,  ///< [H, Q, D]
};

}  // namespace kvreplay
