// What config.json may say.
#include "tracer/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::message_of;
using test::TemporaryFolder;
using test::TinyModel;
using test::write_file;

ModelConfig read(const json& content) {
  const TemporaryFolder folder;
  write_file(folder / "config.json", content.dump());
  return read_model_config(folder.path());
}

json plain() { return TinyModel({}).config(); }

json with(const json& changes) {
  json config = plain();
  config.merge_patch(changes);
  return config;
}

TEST(ModelConfig, DerivesWhatIsNotSaid) {
  json config = plain();
  for (const char* key : {"num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias",
                          "tie_word_embeddings", "max_position_embeddings", "hidden_act"}) {
    config.erase(key);
  }
  const ModelConfig model = read(config);
  EXPECT_EQ(model.model_type, "llama");
  EXPECT_EQ(model.num_key_value_heads, 4);
  EXPECT_EQ(model.head_dim, 12);
  EXPECT_DOUBLE_EQ(model.softmax_scale, 1 / std::sqrt(12.0));
  EXPECT_EQ(model.rotary.theta, 10000);
  EXPECT_FALSE(model.tie_word_embeddings);
  EXPECT_EQ(model.max_position_embeddings, 0);
  EXPECT_TRUE(model.eos_token_ids.empty());
}

TEST(ModelConfig, ReadsWhatIsSaid) {
  const ModelConfig model = read(with({{"num_key_value_heads", 2},
                                       {"head_dim", 64},
                                       {"attention_bias", true},
                                       {"mlp_bias", true},
                                       {"tie_word_embeddings", true},
                                       {"bos_token_id", 1},
                                       {"eos_token_id", {2, 7}}}));
  EXPECT_EQ(model.num_key_value_heads, 2);
  EXPECT_EQ(model.group_size(), 2);
  EXPECT_EQ(model.head_dim, 64);
  EXPECT_TRUE(model.query_key_value_bias);
  EXPECT_TRUE(model.output_bias);
  EXPECT_TRUE(model.mlp_bias);
  EXPECT_TRUE(model.tie_word_embeddings);
  EXPECT_EQ(model.bos_token_id, 1);
  EXPECT_EQ(model.eos_token_ids, (std::vector<std::int32_t>{2, 7}));
  EXPECT_EQ(model.max_position_embeddings, 1024);
}

TEST(ModelConfig, TakesTheEndOfSequenceFromTheGenerationConfig) {
  const TemporaryFolder folder;
  write_file(folder / "config.json", with({{"eos_token_id", 2}}).dump());
  EXPECT_EQ(read_model_config(folder.path()).eos_token_ids, std::vector<std::int32_t>{2});
  write_file(folder / "generation_config.json", R"({"eos_token_id": [3, 4]})");
  EXPECT_EQ(read_model_config(folder.path()).eos_token_ids, (std::vector<std::int32_t>{3, 4}));
  write_file(folder / "generation_config.json", R"({"temperature": 1})");
  EXPECT_EQ(read_model_config(folder.path()).eos_token_ids, std::vector<std::int32_t>{2});
}

TEST(ModelConfig, ReadsEveryWayToScaleRotaryEmbedding) {
  EXPECT_EQ(read(with({{"rope_scaling", {{"rope_type", "default"}}}})).rotary.scaling, RotaryEmbedding::Scaling::none);
  const auto linear = read(with({{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}})).rotary;
  EXPECT_EQ(linear.scaling, RotaryEmbedding::Scaling::linear);
  EXPECT_EQ(linear.factor, 4);
  EXPECT_FLOAT_EQ(linear.inverse_frequencies(8)[0], 0.25f);
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 8192},
                       {"rope_theta", 500000.0}};
  json config = plain();
  config.erase("rope_theta");
  config.erase("rope_scaling");
  config["rope_parameters"] = llama3;
  const auto rotary = read(config).rotary;
  EXPECT_EQ(rotary.scaling, RotaryEmbedding::Scaling::llama3);
  EXPECT_EQ(rotary.theta, 500000);
  // From transformers' _compute_llama3_parameters, for head_dim 128: untouched, smoothed and divided by 8.
  const auto frequencies = rotary.inverse_frequencies(128);
  EXPECT_FLOAT_EQ(frequencies[0], 1.0f);
  EXPECT_FLOAT_EQ(frequencies[10], static_cast<float>(std::pow(500000.0, -20.0 / 128)));
  EXPECT_FLOAT_EQ(frequencies[63], static_cast<float>(std::pow(500000.0, -126.0 / 128) / 8));
  const double between = std::pow(500000.0, -62.0 / 128);
  EXPECT_LT(frequencies[31], between);
  EXPECT_GT(frequencies[31], between / 8);
}

TEST(ModelConfig, RefusesWhatItCannotComputeExactly) {
  const std::pair<json, std::string> cases[] = {
      {{{"architectures", {"Qwen2ForCausalLM"}}},
       "architectures [\"Qwen2ForCausalLM\"] is not supported; supported: LlamaForCausalLM"},
      {{{"architectures", nullptr}, {"model_type", "gemma"}},
       "model_type \"gemma\" is not supported; supported: LlamaForCausalLM"},
      {{{"architectures", nullptr}, {"model_type", nullptr}}, "model_type is missing"},
      {{{"hidden_act", "gelu"}}, "hidden_act \"gelu\" is not supported; supported: silu"},
      {{{"quantization_config", {{"bits", 4}}}}, "quantization_config {\"bits\":4} is not supported"},
      {{{"partial_rotary_factor", 0.5}}, "partial_rotary_factor 0.5 is not supported"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2}}}},
       "rope_scaling: rope_type \"yarn\" is not supported; supported: default, linear, llama3"},
      {{{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 2}}}}, "rope_scaling: low_freq_factor is missing"},
      {{{"rope_scaling", "linear"}}, "rope_scaling must be an object, not \"linear\""},
      {{{"num_hidden_layers", 0}}, "num_hidden_layers must be a whole number from 1 to"},
      {{{"num_hidden_layers", "2"}}, "num_hidden_layers must be a whole number"},
      {{{"hidden_size", 1e30}}, "hidden_size must be a whole number"},
      {{{"hidden_size", -48}}, "hidden_size must be a whole number"},
      {{{"vocab_size", nullptr}}, "vocab_size is missing"},
      {{{"hidden_size", 50}}, "hidden_size must be a multiple of the 4 attention heads, or head_dim be given, not 50"},
      {{{"num_key_value_heads", 3}}, "num_key_value_heads must be a divisor of the 4 attention heads, not 3"},
      {{{"head_dim", 7}}, "head dimension 7 must be even"},
      {{{"rope_theta", -1}}, "rope_theta must be a positive number, not -1"},
      {{{"attention_bias", "yes"}}, "attention_bias must be true or false, not \"yes\""},
      {{{"eos_token_id", {1, "x"}}}, "eos_token_id must be a token id or a list of token ids"},
  };
  for (const auto& [changes, reason] : cases) {
    const std::string message = message_of<Error>([&, &patch = changes] { read(with(patch)); });
    EXPECT_NE(message.find(reason), std::string::npos) << changes << ": " << message;
    EXPECT_NE(message.find("config.json"), std::string::npos) << message;
  }
}

TEST(ModelConfig, NamesMissingAndBrokenFiles) {
  const TemporaryFolder folder;
  EXPECT_NE(message_of<Error>([&] { read_model_config(folder / "none"); }).find("is not a model folder"),
            std::string::npos);
  EXPECT_NE(message_of<Error>([&] { read_model_config(folder.path()); }).find("holds no config.json"),
            std::string::npos);
  write_file(folder / "config.json", "{\"a\":");
  EXPECT_NE(message_of<Error>([&] { read_model_config(folder.path()); }).find("not a valid JSON object"),
            std::string::npos);
}

}  // namespace
}  // namespace kvreplay::tracer
