#include "tracer/architectures.h"

namespace kvreplay::tracer {

namespace {

constexpr Architecture kLlama = {.class_name = "LlamaForCausalLM", .model_type = "llama"};

constexpr Architecture kMistral = {.class_name = "MistralForCausalLM",
                                   .model_type = "mistral",
                                   .windowed_layers = WindowedLayers::all,
                                   .num_key_value_heads = 8,
                                   .sliding_window = 4096};

constexpr Architecture kQwen2 = {.class_name = "Qwen2ForCausalLM",
                                 .model_type = "qwen2",
                                 .query_key_value_bias = true,
                                 .windowed_layers = WindowedLayers::late,
                                 .num_key_value_heads = 32,
                                 .sliding_window = 4096};

constexpr Architecture kQwen3 = {.class_name = "Qwen3ForCausalLM",
                                 .model_type = "qwen3",
                                 .query_key_norm = true,
                                 .windowed_layers = WindowedLayers::late,
                                 .num_key_value_heads = 32,
                                 .head_dim = 128,
                                 .sliding_window = 4096};

constexpr Architecture kPhi3 = {.class_name = "Phi3ForCausalLM",
                                .model_type = "phi3",
                                .fused_projections = true,
                                .windowed_layers = WindowedLayers::all,
                                .rms_norm_eps = 1e-5};

constexpr Architecture kGemma = {.class_name = "GemmaForCausalLM",
                                 .model_type = "gemma",
                                 .norm_stored_minus_one = true,
                                 .embedding_scaled = true,
                                 .gelu_is_tanh = true,
                                 .activation = Activation::gelu_tanh,
                                 .tie_word_embeddings = true,
                                 .num_key_value_heads = 16,
                                 .head_dim = 256};

// What Gemma 2 and 3 have in common.
constexpr Architecture local_gemma() {
  Architecture gemma = kGemma;
  gemma.activation_key = "hidden_activation";
  gemma.gelu_is_tanh = false;
  gemma.norm_after = true;
  gemma.windowed_layers = WindowedLayers::all_but_nth;
  gemma.num_key_value_heads = 4;
  gemma.sliding_window = 4096;
  gemma.query_pre_attn_scalar = 256;
  return gemma;
}

constexpr Architecture gemma2() {
  Architecture gemma = local_gemma();
  gemma.class_name = "Gemma2ForCausalLM";
  gemma.model_type = "gemma2";
  gemma.windowed_period = 2;
  gemma.attn_logit_softcapping = 50;
  gemma.final_logit_softcapping = 30;
  return gemma;
}

// Its configurations may carry attn_logit_softcapping, which transformers does not apply to it.
constexpr Architecture gemma3() {
  Architecture gemma = local_gemma();
  gemma.class_name = "Gemma3ForCausalLM";
  gemma.model_type = "gemma3_text";
  gemma.query_key_norm = true;
  gemma.has_local_rotary = true;
  gemma.num_attention_heads = 8;
  gemma.vocab_size = 262208;
  gemma.windowed_period = 6;
  gemma.reads_windowed_period = true;
  gemma.rope_theta = 1e6;
  gemma.final_logit_softcapping = 0;
  return gemma;
}

constexpr Architecture multimodal_gemma3() {
  Architecture gemma = gemma3();
  gemma.class_name = "Gemma3ForConditionalGeneration";
  gemma.model_type = "gemma3";
  gemma.text_config = "text_config";
  return gemma;
}

constexpr Architecture kArchitectures[] = {kLlama,   kMistral,           kQwen2, kQwen3, kPhi3, kGemma, gemma2(),
                                           gemma3(), multimodal_gemma3()};

}  // namespace

std::span<const Architecture> architectures() { return kArchitectures; }

}  // namespace kvreplay::tracer
