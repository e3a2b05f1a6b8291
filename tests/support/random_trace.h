// Small traces of random tensors, in any shape.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "trace/trace.h"
#include "trace/writer.h"

namespace kvreplay::test {

/// A trace of random tensors. Keys and queries share a few directions, so that attention has peaks.
struct RandomTrace {
  int num_layers = 2;
  int num_attention_heads = 4;
  int num_key_value_heads = 2;
  int head_dim = 8;
  int hidden_size = 24;
  int prompt_length = 60;
  int num_tokens = 70;
  int first_token = 0;               ///< the id of the first token; each has one more than that before it
  int captured_prompt_queries = -1;  ///< the last ones; −1: all
  bool output_projection = true;
  bool attention_mass = true;
  int sliding_window = 0;
  std::vector<int> layer_windows = {};  ///< of each layer; empty: all have `sliding_window`
  double softcapping = 0;
  int chunk = 0;                    ///< attention_chunk_size of all layers
  std::vector<float> sinks = {};    ///< of all layers: a logit per query head
  std::vector<double> scales = {};  ///< softmax scale of each layer; empty: D^−½
  bool residual_norms = false;      ///< of all layers
  bool projection_output_norm = false;
  DType type = DType::float32;
  bool own_outputs = true;                ///< the attention of the tensors; else some constant
  bool representable_in_float16 = false;  ///< round all tensors to float16 first
  std::vector<Span> spans = {};
  std::vector<int> turn_starts = {};
  std::vector<int> head_order = {};  ///< of KV heads with their groups; empty: as drawn
  unsigned seed = 1;

  /// The tensors [L][…] as the file holds them.
  struct Tensors {
    std::vector<std::vector<float>> keys, values, queries, outputs, projection, mass;
  };
  Tensors tensors() const;
  TraceInfo info() const;
  void write(const std::filesystem::path& path) const;
};

}  // namespace kvreplay::test
