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

TEST(ModelConfig, TakesTheEndOfSequenceFromAllFilesThatNameOne) {
  const TemporaryFolder folder;
  write_file(folder / "config.json", with({{"eos_token_id", 2}}).dump());
  EXPECT_EQ(read_model_config(folder.path()).eos_token_ids, std::vector<std::int32_t>{2});
  write_file(folder / "generation_config.json", R"({"eos_token_id": [3, 2, 4]})");
  EXPECT_EQ(read_model_config(folder.path()).eos_token_ids, (std::vector<std::int32_t>{3, 2, 4}));
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
      {{{"architectures", {"Qwen3MoeForCausalLM"}}},
       "architectures [\"Qwen3MoeForCausalLM\"] is not supported; supported: LlamaForCausalLM, MistralForCausalLM, "
       "Qwen2ForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, "
       "Gemma3ForConditionalGeneration"},
      {{{"architectures", nullptr}, {"model_type", "mixtral"}},
       "model_type \"mixtral\" is not supported; supported: LlamaForCausalLM"},
      {{{"architectures", nullptr}, {"model_type", nullptr}}, "model_type is missing"},
      {{{"hidden_act", "relu"}}, "hidden_act \"relu\" is not supported; supported: silu, gelu, gelu_pytorch_tanh"},
      {{{"use_bidirectional_attention", true}}, "use_bidirectional_attention true is not supported; supported: false"},
      {{{"attn_logit_softcapping", 50.0}}, "attn_logit_softcapping 50.0 is not supported; supported: null"},
      {{{"layer_types", {"full_attention", "sliding_attention"}}},
       "supported: full_attention in every layer of LlamaForCausalLM"},
      {{{"layer_types", {"full_attention"}}}, "layer_types must be a list with the types of 2 layers"},
      {{{"layer_types", {"full_attention", "chunked_attention"}}}, "supported: full_attention, sliding_attention"},
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

json of_class(const char* name, const json& changes = json::object()) {
  json config = with({{"num_hidden_layers", 6}, {"head_dim", 12}, {"rope_scaling", nullptr}, {"rope_theta", nullptr}});
  config["architectures"] = {name};
  config.merge_patch(changes);
  return config;
}

// merge_patch would take null for "leave it out".
json with_null(json config, const char* key) {
  config[key] = nullptr;
  return config;
}

TEST(ModelConfig, ReadsWhichLayersSeeAWindow) {
  using Windows = std::vector<int>;
  const auto windows = [](const json& config) { return read(config).sliding_windows; };
  EXPECT_EQ(windows(of_class("LlamaForCausalLM", {{"sliding_window", 7}})), Windows(6, 0));
  EXPECT_EQ(windows(of_class("MistralForCausalLM", {{"sliding_window", 7}})), Windows(6, 7));
  EXPECT_EQ(windows(of_class("MistralForCausalLM", {{"sliding_window", 2}})), Windows(6, 2));
  EXPECT_THROW(windows(of_class("MistralForCausalLM", {{"sliding_window", 1}})), Error);
  EXPECT_EQ(windows(of_class("MistralForCausalLM")), Windows(6, 4096)) << "as transformers takes it";
  EXPECT_EQ(windows(with_null(of_class("MistralForCausalLM"), "sliding_window")), Windows(6, 0));
  for (const char* name : {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    const json late = {{"sliding_window", 7}, {"max_window_layers", 4}};
    EXPECT_EQ(windows(of_class(name, late)), Windows(6, 0)) << "a window that is not used";
    json used = of_class(name, late);
    used["use_sliding_window"] = true;
    EXPECT_EQ(windows(used), (Windows{0, 0, 0, 0, 7, 7}));
    used["max_window_layers"] = 0;
    EXPECT_EQ(windows(used), Windows(6, 7));
    const char* full = "full_attention";
    used["layer_types"] = {"sliding_attention", full, full, full, full, full};
    EXPECT_EQ(windows(used), (Windows{7, 0, 0, 0, 0, 0}));
  }
  EXPECT_EQ(windows(of_class("Gemma2ForCausalLM", {{"sliding_window", 7}})), (Windows{7, 0, 7, 0, 7, 0}));
  EXPECT_EQ(windows(of_class("Gemma3ForCausalLM", {{"sliding_window", 7}})), (Windows{7, 7, 7, 7, 7, 0}));
  EXPECT_EQ(windows(of_class("Gemma3ForCausalLM", {{"sliding_window", 7}, {"sliding_window_pattern", 3}})),
            (Windows{7, 7, 0, 7, 7, 0}));
  EXPECT_NE(message_of<Error>([&] {
              windows(with_null(of_class("Gemma2ForCausalLM"), "sliding_window"));
            }).find("sliding_window is missing, but layer 0 attends to one"),
            std::string::npos);
}

// What transformers 5.24 does; fixtures of the same configurations hold its numbers.
TEST(ModelConfig, TellsWhatTransformersDoesNotObey) {
  using Windows = std::vector<int>;
  const struct {
    const char* name;
    const char* key;
    Windows windows;
  } cases[] = {{"Gemma2ForCausalLM", "sliding_window_pattern", {7, 0, 7, 0, 7, 0}},
               {"Gemma2ForCausalLM", "_sliding_window_pattern", {7, 0, 7, 0, 7, 0}},
               {"Gemma3ForCausalLM", "_sliding_window_pattern", {7, 7, 7, 7, 7, 0}}};
  for (const auto& each : cases) {
    json config = of_class(each.name, {{"sliding_window", 7}, {each.key, 3}});
    const ModelConfig model = read(config);
    EXPECT_EQ(model.sliding_windows, each.windows) << each.name << " " << each.key;
    ASSERT_EQ(model.warnings.size(), 1u) << each.name << " " << each.key;
    EXPECT_NE(model.warnings[0].find(std::string("config.json: ") + each.key + " 3 is not obeyed"), std::string::npos)
        << model.warnings[0];
    config["layer_types"] = std::vector<std::string>(6, "full_attention");
    EXPECT_TRUE(read(config).warnings.empty()) << "layer_types say it";
  }
  EXPECT_TRUE(read(of_class("Gemma3ForCausalLM", {{"_sliding_window_pattern", 6}})).warnings.empty());

  const json old_name = {{"type", "linear"}, {"factor", 8.0}};
  const ModelConfig gemma3 = read(of_class("Gemma3ForCausalLM", {{"rope_scaling", old_name}}));
  EXPECT_EQ(gemma3.rotary.scaling, RotaryEmbedding::Scaling::none);
  ASSERT_EQ(gemma3.warnings.size(), 1u);
  EXPECT_NE(gemma3.warnings[0].find("rope_scaling: type \"linear\" is not obeyed"), std::string::npos)
      << gemma3.warnings[0];
  json both = old_name;
  both["rope_type"] = "linear";
  EXPECT_EQ(read(of_class("Gemma3ForCausalLM", {{"rope_scaling", both}})).rotary.factor, 8);
  const ModelConfig gemma2 = read(of_class("Gemma2ForCausalLM", {{"rope_scaling", old_name}}));
  EXPECT_EQ(gemma2.rotary.scaling, RotaryEmbedding::Scaling::linear) << "elsewhere the old name is obeyed";
  EXPECT_TRUE(gemma2.warnings.empty());
}

TEST(ModelConfig, LooksAtTheActivationThatTheFamilyLooksAt) {
  const auto activation = [](const char* name, const json& changes) {
    return read(of_class(name, changes)).activation;
  };
  EXPECT_EQ(activation("GemmaForCausalLM", {{"hidden_act", "gelu"}, {"hidden_activation", "silu"}}),
            Activation::gelu_tanh);
  for (const char* name : {"Gemma2ForCausalLM", "Gemma3ForCausalLM"}) {
    EXPECT_EQ(activation(name, {{"hidden_act", "silu"}, {"hidden_activation", "gelu"}}), Activation::gelu);
    EXPECT_EQ(activation(name, {{"hidden_act", "silu"}}), Activation::gelu_tanh);
  }
  EXPECT_EQ(activation("LlamaForCausalLM", {{"hidden_act", "gelu"}}), Activation::gelu);
}

TEST(ModelConfig, NotesAWindowThatOnlyTheCacheOfTransformersKnows) {
  for (const char* name : {"LlamaForCausalLM", "GemmaForCausalLM"}) {
    json config = of_class(name, {{"sliding_window", 7}});
    EXPECT_EQ(read(config).cache_limit, 7);
    config["layer_types"] = std::vector<std::string>(6, "full_attention");
    EXPECT_EQ(read(config).cache_limit, 0);
  }
  EXPECT_EQ(read(of_class("LlamaForCausalLM")).cache_limit, 0);
  EXPECT_EQ(read(of_class("MistralForCausalLM", {{"sliding_window", 7}})).cache_limit, 0);
}

TEST(ModelConfig, ReadsBothRotaryEmbeddingsOfGemma3) {
  const auto check = [](const json& config) {
    const ModelConfig model = read(config);
    EXPECT_EQ(model.rotary_of(5).theta, 500000);
    EXPECT_EQ(model.rotary_of(5).scaling, RotaryEmbedding::Scaling::linear);
    EXPECT_EQ(model.rotary_of(5).factor, 8);
    EXPECT_EQ(model.rotary_of(0).theta, 20000);
    EXPECT_EQ(model.rotary_of(0).scaling, RotaryEmbedding::Scaling::none);
  };
  const char* name = "Gemma3ForCausalLM";
  const json scaling = {{"rope_type", "linear"}, {"factor", 8.0}};
  check(of_class(name, {{"rope_theta", 500000}, {"rope_local_base_freq", 20000}, {"rope_scaling", scaling}}));
  json full = scaling;
  full["rope_theta"] = 500000;
  const json sliding = {{"rope_type", "default"}, {"rope_theta", 20000}};
  check(of_class(name, {{"rope_parameters", {{"full_attention", full}, {"sliding_attention", sliding}}}}));
  const ModelConfig neither = read(of_class(name));
  EXPECT_EQ(neither.rotary.theta, 1000000);
  EXPECT_EQ(neither.local_rotary.theta, 10000);
  const std::string message = message_of<Error>([&] { read(of_class(name, {{"rope_parameters", sliding}})); });
  EXPECT_NE(message.find("supported: objects for full_attention and sliding_attention"), std::string::npos) << message;
}

TEST(ModelConfig, TakesTheSameRotaryEmbeddingInEveryLayerElsewhere) {
  const ModelConfig model = read(
      of_class("Qwen2ForCausalLM", {{"use_sliding_window", true}, {"max_window_layers", 1}, {"rope_theta", 1000000}}));
  EXPECT_EQ(model.rotary_of(0).theta, 1000000);
  EXPECT_EQ(model.rotary_of(5).theta, 1000000);
  // What rope_parameters says comes first, and what it leaves out stands beside it.
  const auto theta = [](const json& changes) { return read(with(changes)).rotary.theta; };
  EXPECT_EQ(theta({{"rope_theta", 5}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 7}}}}), 7);
  EXPECT_EQ(theta({{"rope_theta", 5}, {"rope_parameters", {{"rope_type", "default"}}}}), 5);
}

TEST(ModelConfig, TakesTheContextOfLlama3RopeFromTheModelWhereItIsNotSaid) {
  const json scaling = {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}};
  EXPECT_EQ(read(with({{"rope_scaling", scaling}})).rotary.original_max_position_embeddings, 1024);
}

TEST(ModelConfig, KnowsWhatAFamilysConfigNeedNotSay) {
  const ModelConfig qwen2 = read(of_class("Qwen2ForCausalLM"));
  EXPECT_TRUE(qwen2.query_key_value_bias);
  EXPECT_FALSE(qwen2.output_bias);
  EXPECT_FALSE(qwen2.query_key_norm);
  EXPECT_TRUE(read(of_class("Qwen3ForCausalLM")).query_key_norm);
  json qwen3 = of_class("Qwen3ForCausalLM");
  qwen3.erase("head_dim");
  EXPECT_EQ(read(qwen3).head_dim, 128);
  EXPECT_TRUE(read(of_class("Phi3ForCausalLM")).fused_projections);

  json gemma = of_class("GemmaForCausalLM", {{"hidden_size", 64}});
  for (const char* key : {"head_dim", "hidden_act", "tie_word_embeddings"}) gemma.erase(key);
  const ModelConfig gemma1 = read(gemma);
  EXPECT_EQ(gemma1.head_dim, 256);
  EXPECT_EQ(gemma1.activation, Activation::gelu_tanh);
  EXPECT_EQ(gemma1.embedding_scale, 8);
  EXPECT_EQ(gemma1.norm_offset, 1);
  EXPECT_FALSE(gemma1.norm_after);
  EXPECT_TRUE(gemma1.tie_word_embeddings);
  EXPECT_EQ(gemma1.final_logit_softcapping, 0);
  gemma["hidden_act"] = "gelu";
  EXPECT_EQ(read(gemma).activation, Activation::gelu_tanh) << "what released checkpoints mean by it";
}

TEST(ModelConfig, ReadsSoftCapsAndTheQueryScale) {
  json config = of_class("Gemma2ForCausalLM");
  ModelConfig model = read(config);
  EXPECT_EQ(model.attn_logit_softcapping, 50);
  EXPECT_EQ(model.final_logit_softcapping, 30);
  EXPECT_DOUBLE_EQ(model.softmax_scale, 1.0 / 16);
  EXPECT_TRUE(model.norm_after);
  config["attn_logit_softcapping"] = nullptr;
  config["final_logit_softcapping"] = 7.5;
  config["query_pre_attn_scalar"] = 144;
  model = read(config);
  EXPECT_EQ(model.attn_logit_softcapping, 0);
  EXPECT_EQ(model.final_logit_softcapping, 7.5);
  EXPECT_DOUBLE_EQ(model.softmax_scale, 1.0 / 12);
  EXPECT_EQ(read(of_class("Gemma3ForCausalLM")).final_logit_softcapping, 0);
  const std::string message = message_of<Error>([&] {
    read(of_class("Gemma3ForCausalLM", {{"attn_logit_softcapping", 50.0}}));
  });
  EXPECT_NE(message.find("attn_logit_softcapping 50.0 is not supported"), std::string::npos) << message;
}

TEST(ModelConfig, ReadsTheTextPartOfAMultimodalModel) {
  // What google/gemma-3-4b-it says, and no more.
  const json text = {{"hidden_size", 2560},
                     {"intermediate_size", 10240},
                     {"model_type", "gemma3_text"},
                     {"num_hidden_layers", 34},
                     {"rope_scaling", {{"factor", 8.0}, {"rope_type", "linear"}}},
                     {"sliding_window", 1024}};
  json config = {{"architectures", {"Gemma3ForConditionalGeneration"}},
                 {"eos_token_id", {1, 106}},
                 {"model_type", "gemma3"},
                 {"text_config", text}};
  const ModelConfig model = read(config);
  EXPECT_EQ(model.model_type, "gemma3_text");
  EXPECT_EQ(model.num_layers, 34);
  EXPECT_EQ(model.num_attention_heads, 8);
  EXPECT_EQ(model.num_key_value_heads, 4);
  EXPECT_EQ(model.head_dim, 256);
  EXPECT_EQ(model.vocab_size, 262208);
  EXPECT_EQ(model.eos_token_ids, (std::vector<std::int32_t>{1, 106}));
  EXPECT_TRUE(model.tie_word_embeddings);
  EXPECT_EQ(model.sliding_window(4), 1024);
  EXPECT_EQ(model.sliding_window(5), 0);
  config["text_config"]["hidden_activation"] = "relu";
  EXPECT_NE(message_of<Error>([&] { read(config); }).find("config.json: text_config: hidden_activation \"relu\""),
            std::string::npos);
  config["text_config"] = 3;
  EXPECT_NE(message_of<Error>([&] { read(config); }).find("text_config must be an object"), std::string::npos);
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
