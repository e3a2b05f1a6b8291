// A model's weights in their places.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "tracer/model_config.h"
#include "tracer/safetensors.h"

namespace kvreplay::tracer {

/// y = x·Wᵀ + b.
struct LinearWeights {
  Tensor weight;            ///< [out, in], as PyTorch stores it
  std::vector<float> bias;  ///< [out], or empty for none
};

/// One block of a model.
struct LayerWeights {
  std::vector<float> attention_norm;  ///< [C], like every norm with the model's offset added
  LinearWeights query;                ///< [H·D, C]
  LinearWeights key;                  ///< [K·D, C]
  LinearWeights value;                ///< [K·D, C]
  LinearWeights output;               ///< [C, H·D]
  std::vector<float> query_norm;      ///< [D], or empty for none
  std::vector<float> key_norm;        ///< [D], or empty for none
  std::vector<float> output_norm;     ///< [C], or empty for none
  std::vector<float> mlp_norm;        ///< [C]
  LinearWeights gate;                 ///< [I, C]
  LinearWeights up;                   ///< [I, C]
  LinearWeights down;                 ///< [C, I]
  std::vector<float> down_norm;       ///< [C], or empty for none
};

/// A model that is ready to run. Matrices stay in the mapped files; vectors are copied to float32.
struct Model {
  /// Reads config.json and finds every weight in the folder's safetensors files. Throws Error.
  explicit Model(const std::filesystem::path& folder);

  ModelConfig config;
  SafeTensors files;
  Tensor embedding;  ///< [vocabulary, C]
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  ///< [C]
  LinearWeights output_head;      ///< [vocabulary, C]
  /// Of the names, from the decoder on, and shapes of all weights above but the output head's: what tells models apart
  /// that a trace's own shapes do not. docs/trace-format.md says of what.
  std::string weight_shapes_digest;
  std::vector<std::string> warnings;  ///< those of the configuration, and what the weights contradict in it
};

}  // namespace kvreplay::tracer
