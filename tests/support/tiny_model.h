// Small random models in Hugging Face format, and a plain forward pass in double precision to hold ours against.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay::test {

/// The bytes of a safetensors file with this header and these data.
std::string safetensors_bytes(const std::string& header, const std::string& data);

struct TinyModelOptions {
  int layers = 2;
  int hidden = 48;
  int heads = 4;
  int kv_heads = 4;
  int head_dim = 0;  ///< 0: hidden / heads, and not in config.json
  int intermediate = 72;
  int vocabulary = 97;
  bool attention_bias = false;
  bool mlp_bias = false;
  bool tied = false;
  nlohmann::json rope_scaling;  ///< null: none
  DType dtype = DType::float32;
  unsigned seed = 1;
};

/// What one layer's attention saw and produced, indexed [head][position][dimension], and [head][position] for the mass.
struct ReferenceLayer {
  using Heads = std::vector<std::vector<std::vector<double>>>;
  Heads queries;
  Heads keys;
  Heads values;
  Heads outputs;
  std::vector<std::vector<double>> mass;
};

struct ReferenceRun {
  std::vector<ReferenceLayer> layers;
  std::vector<double> logits;  ///< after the last token
};

class TinyModel {
 public:
  explicit TinyModel(const TinyModelOptions& options);

  /// The model's config.json.
  nlohmann::json config() const;

  /// Writes config.json and the weights, in one file or several shards with an index.
  void write(const std::filesystem::path& folder, int shards = 1) const;

  /// Sets one weight to a value that its dtype can hold.
  void set_weight(const std::string& tensor, std::size_t index, double value);

  /// Runs all tokens, textbook style: no cache, no blocks.
  ReferenceRun run(std::span<const std::int32_t> ids) const;

 private:
  struct Weights {
    std::vector<Index> shape;
    std::vector<double> values;  ///< as rounded to the dtype
  };
  using Rows = std::vector<std::vector<double>>;

  int head_dim() const { return options_.head_dim > 0 ? options_.head_dim : options_.hidden / options_.heads; }
  void add(const std::string& name, std::vector<Index> shape, double scale, double mean = 0);
  std::string bytes_of(const Weights& weights) const;
  Rows linear(const Rows& rows, const std::string& name) const;
  Rows normalize(const Rows& rows, const std::string& name) const;
  double inverse_frequency(int pair) const;
  ReferenceLayer::Heads split(const Rows& rows, int heads, bool rotate) const;

  TinyModelOptions options_;
  std::map<std::string, Weights> weights_;
};

}  // namespace kvreplay::test
