#include "support/odd_trace.h"

#include <fmt/format.h>

#include <cmath>

#include "hdf5/hdf5.h"
#include "support/sample_trace.h"
#include "trace/writer.h"

namespace kvreplay::test {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

// Softmax attention element by element, in double.
std::vector<float> attention(const TraceInfo& info, const LayerInfo& layer, const OddTrace::Tensors& tensors) {
  const int group = layer.num_attention_heads / layer.num_key_value_heads;
  const int tokens = info.num_tokens();
  std::vector<float> outputs;
  for (int head = 0; head < layer.num_attention_heads; ++head) {
    const int kv_head = head / group;
    for (int q = 0; q < info.num_queries(); ++q) {
      const int position = info.query_positions[at(q)];
      std::vector<double> weights(at(tokens), 0);
      double sum = layer.rule.sinks.empty() ? 0 : std::exp(static_cast<double>(layer.rule.sinks[at(head)]));
      for (int key = 0; key <= position; ++key) {
        if (layer.rule.sliding_window > 0 && key <= position - layer.rule.sliding_window) continue;
        const int chunk = layer.rule.attention_chunk_size;
        if (chunk > 0 && key / chunk != position / chunk) continue;
        double logit = 0;
        for (int d = 0; d < layer.key_dim; ++d) {
          logit += static_cast<double>(tensors.queries[at((head * info.num_queries() + q) * layer.key_dim + d)]) *
                   static_cast<double>(tensors.keys[at((kv_head * tokens + key) * layer.key_dim + d)]);
        }
        logit *= layer.rule.softmax_scale;
        const double cap = layer.rule.attn_logit_softcapping;
        if (cap > 0) logit = cap * std::tanh(logit / cap);
        weights[at(key)] = std::exp(logit);
        sum += weights[at(key)];
      }
      for (int d = 0; d < layer.value_dim; ++d) {
        double output = 0;
        for (int key = 0; key <= position; ++key) {
          output += weights[at(key)] / sum *
                    static_cast<double>(tensors.values[at((kv_head * tokens + key) * layer.value_dim + d)]);
        }
        outputs.push_back(static_cast<float>(output));
      }
    }
  }
  return outputs;
}

}  // namespace

OddTrace::OddTrace() {
  info.model = {.name = "odd",
                .architecture = "odd",
                .num_layers = 6,
                .num_attention_heads = 4,
                .num_key_value_heads = 2,
                .head_dim = 8,
                .hidden_size = 10,
                .rope_theta = 10000,
                .softmax_scale = 0.35,
                .sliding_window = 0,
                .attn_logit_softcapping = 0,
                .weight_shapes_digest = "0123456789abcdef"};
  info.created_by = "a test";
  info.created_at = "2026-01-02T03:04:05Z";
  info.source = "odd_trace.cpp";
  for (int i = 0; i < 14; ++i) info.token_ids.push_back(3 * i);
  info.prompt_length = 9;
  info.query_positions = {4, 6, 7, 8, 9, 13};
  info.turn_starts = {0, 5};
  info.turn_roles = {"user", "assistant"};
  info.answers = {"42", "forty-two", "è"};
  info.spans = {{1, 3, "first", "pair"}, {4, 5, "second", "pair"}, {6, 8, "alone"}};
  info.rotary = {{.name = "global", .inverse_frequencies = {1, 0.1F, 0.01F, 0.001F}},
                 {.name = "local",
                  .inverse_frequencies = {1, 0.5F},
                  .attention_scaling = 1.25,
                  .layout = RotaryTable::Layout::interleaved}};
  info.layers.assign(6, info.model.layer());
  for (LayerInfo& layer : info.layers) layer.rotary = "global";
  LayerInfo& sinks = info.layers[kSinks];
  sinks.rule.attention_chunk_size = 5;
  sinks.rule.sinks = {0, -1, 2, 0.5F};
  info.layers[kGap].attends = false;
  info.layers[kGap].rotary.clear();
  LayerInfo& shared = info.layers[kShared];
  shared.num_attention_heads = 6;
  shared.cache_of = kSinks;
  shared.rule.softmax_scale = 0.2;
  shared.rule.sliding_window = 4;
  LayerInfo& latent = info.layers[kLatent];
  latent.num_key_value_heads = 1;
  latent.key_dim = 12;
  latent.value_dim = 6;
  latent.values_in_keys = 6;
  latent.output_gate_dim = 6;
  LayerInfo& widths = info.layers[kTwoWidths];
  widths.num_attention_heads = 3;
  widths.num_key_value_heads = 1;
  widths.key_dim = 5;
  widths.value_dim = 7;
  widths.rule.attn_logit_softcapping = 3;
  widths.rotary = "local";
  widths.output_gate_dim = 1;
  widths.projection_norm = {sample_values(21, 51), 1e-6};
  widths.projection_output_norm = {sample_values(10, 52), 1e-5};
  widths.residual_norm = {1, 2, 3, 4, 5, 6};

  for (int l = 0; l < info.model.num_layers; ++l) {
    const LayerInfo& layer = info.layers[at(l)];
    Tensors& tensors = layers.emplace_back();
    if (!layer.attends) continue;
    const auto drawn = [&](Index count, unsigned seed) {
      return sample_values(static_cast<std::size_t>(count), static_cast<unsigned>(100 * l) + seed);
    };
    const Index tokens = info.num_tokens();
    const Index queries = info.num_queries();
    tensors.queries = drawn(layer.num_attention_heads * queries * layer.key_dim, 1);
    if (layer.cache_of >= 0) {
      tensors.keys = layers[at(layer.cache_of)].keys;
      tensors.values = layers[at(layer.cache_of)].values;
    } else {
      tensors.keys = drawn(layer.num_key_value_heads * tokens * layer.key_dim, 2);
      tensors.values = drawn(layer.num_key_value_heads * tokens * layer.value_dim, 3);
    }
    for (Index row = 0; row < tokens && layer.values_in_keys > 0; ++row) {
      for (Index d = 0; d < layer.value_dim; ++d) {
        tensors.values[at(row * layer.value_dim + d)] = tensors.keys[at(row * layer.key_dim + d)];
      }
    }
    tensors.outputs = attention(info, layer, tensors);
    tensors.projection = drawn(Index{info.model.hidden_size} * layer.num_attention_heads * layer.value_dim, 4);
    tensors.gate = drawn(layer.num_attention_heads * queries * layer.output_gate_dim, 5);
  }
}

void OddTrace::write(const std::filesystem::path& path) const {
  hdf5::File file = hdf5::File::create(path);
  file.write_string("/", "format", "kvtrace");
  file.write_int("/", "format_version", 2);
  file.write_string("/", "created_by", info.created_by);
  file.write_string("/", "created_at", info.created_at);
  file.write_string("/", "source", info.source);
  file.create_group("/model");
  file.write_string("/model", "name", "odd");
  file.write_string("/model", "architecture", "odd");
  file.write_int("/model", "num_layers", 6);
  file.write_int("/model", "num_attention_heads", 4);
  file.write_int("/model", "num_key_value_heads", 2);
  file.write_int("/model", "head_dim", 8);
  file.write_int("/model", "hidden_size", 10);
  file.write_double("/model", "rope_theta", 10000);
  file.write_double("/model", "softmax_scale", 0.35);
  file.write_string("/model", "rotary", "global");
  const auto floats = [&](const std::string& name, const std::vector<float>& values, const hdf5::Shape& shape) {
    file.write(name, std::span<const float>(values), shape);
  };
  const auto ints = [&](const std::string& name, const std::vector<std::int32_t>& values) {
    file.write(name, std::span<const std::int32_t>(values), {static_cast<Index>(values.size())});
  };
  const auto strings = [&](const std::string& name, const std::vector<std::string>& values) {
    file.write(name, std::span<const std::string>(values), {static_cast<Index>(values.size())});
  };
  ints("/tokens/ids", info.token_ids);
  file.write_int("/tokens/ids", "prompt_length", info.prompt_length);
  ints("/tokens/turn_starts", info.turn_starts);
  file.write_string_list("/tokens/turn_starts", "roles", info.turn_roles);
  ints("/query_positions", info.query_positions);
  strings("/answers", info.answers);
  ints("/annotations/spans/start", {1, 4, 6});
  ints("/annotations/spans/end", {3, 5, 8});
  strings("/annotations/spans/label", {"first", "second", "alone"});
  strings("/annotations/spans/group", {"pair", "pair", ""});
  floats("/rotary/global", {1, 0.1F, 0.01F, 0.001F}, {4});
  file.write_double("/rotary/global", "attention_scaling", 1);
  file.write_int("/rotary/global", "rotated_dims", 8);
  file.write_string("/rotary/global", "layout", "half");
  floats("/rotary/local", {1, 0.5F}, {2});
  file.write_double("/rotary/local", "attention_scaling", 1.25);
  file.write_int("/rotary/local", "rotated_dims", 4);
  file.write_string("/rotary/local", "layout", "interleaved");
  const Index tokens = 14;
  const Index queries = 6;
  const auto tensors = [&](int l, Index heads, Index kv_heads, Index key_dim, Index value_dim) {
    const std::string group = fmt::format("/layers/{}/", l);
    const Tensors& of = layers[at(l)];
    floats(group + "queries", of.queries, {heads, queries, key_dim});
    floats(group + "outputs", of.outputs, {heads, queries, value_dim});
    floats(group + "output_projection", of.projection, {10, heads * value_dim});
    if (l != kShared) floats(group + "keys", of.keys, {kv_heads, tokens, key_dim});
    if (l != kShared && l != kLatent) floats(group + "values", of.values, {kv_heads, tokens, value_dim});
  };
  tensors(kSinks, 4, 2, 8, 8);
  file.write_int("/layers/0", "attention_chunk_size", 5);
  floats("/layers/0/sinks", {0, -1, 2, 0.5F}, {4});
  tensors(kShared, 6, 2, 8, 8);
  file.write_int("/layers/2", "num_attention_heads", 6);
  file.write_int("/layers/2", "cache_of", 0);
  file.write_double("/layers/2", "softmax_scale", 0.2);
  file.write_int("/layers/2", "sliding_window", 4);
  tensors(kLatent, 4, 1, 12, 6);
  file.write_int("/layers/3", "num_key_value_heads", 1);
  file.write_int("/layers/3", "key_dim", 12);
  file.write_int("/layers/3", "values_in_keys", 6);
  floats("/layers/3/output_gate", layers[kLatent].gate, {4, queries, 6});
  tensors(kTwoWidths, 3, 1, 5, 7);
  file.write_int("/layers/4", "num_attention_heads", 3);
  file.write_int("/layers/4", "num_key_value_heads", 1);
  file.write_int("/layers/4", "key_dim", 5);
  file.write_int("/layers/4", "value_dim", 7);
  file.write_double("/layers/4", "attn_logit_softcapping", 3);
  file.write_string("/layers/4", "rotary", "local");
  floats("/layers/4/output_gate", layers[kTwoWidths].gate, {3, queries});
  floats("/layers/4/projection_norm", info.layers[kTwoWidths].projection_norm.weight, {21});
  file.write_double("/layers/4/projection_norm", "epsilon", 1e-6);
  floats("/layers/4/projection_output_norm", info.layers[kTwoWidths].projection_output_norm.weight, {10});
  file.write_double("/layers/4/projection_output_norm", "epsilon", 1e-5);
  floats("/layers/4/residual_norm", {1, 2, 3, 4, 5, 6}, {6});
  tensors(kPlain, 4, 2, 8, 8);
  file.write_int("/", "complete", 1);
  file.close();
}

void OddTrace::write_with_digests(const std::filesystem::path& path) const {
  TraceWriter writer(path, info, DType::float32);
  for (int l = 0; l < info.model.num_layers; ++l) {
    const LayerInfo& layer = info.layers[at(l)];
    if (!layer.attends) continue;
    const Tensors& of = layers[at(l)];
    if (layer.cache_of < 0) writer.write(l, HeadTensor::keys, of.keys);
    if (layer.cache_of < 0 && layer.values_in_keys == 0) writer.write(l, HeadTensor::values, of.values);
    writer.write(l, HeadTensor::queries, of.queries);
    writer.write(l, HeadTensor::outputs, of.outputs);
    writer.write_output_projection(l, of.projection);
    if (layer.output_gate_dim > 0) writer.write_output_gate(l, of.gate);
  }
  writer.finish();
}

}  // namespace kvreplay::test
