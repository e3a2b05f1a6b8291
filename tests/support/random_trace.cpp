#include "support/random_trace.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "trace/attention.h"

namespace kvreplay::test {
namespace {

float rounded_to_float16(float value) {
  std::byte bytes[2];
  from_float32(DType::float16, {&value, 1}, bytes);
  to_float32(DType::float16, bytes, {&value, 1});
  return value;
}

}  // namespace

TraceInfo RandomTrace::info() const {
  TraceInfo info;
  info.model = {.name = "random",
                .architecture = "random",
                .num_layers = num_layers,
                .num_attention_heads = num_attention_heads,
                .num_key_value_heads = num_key_value_heads,
                .head_dim = head_dim,
                .hidden_size = hidden_size,
                .rope_theta = 10000,
                .softmax_scale = 1 / std::sqrt(head_dim),
                .sliding_window = sliding_window,
                .attn_logit_softcapping = softcapping,
                .weight_shapes_digest = "0123456789abcdef"};
  info.token_ids.resize(static_cast<std::size_t>(num_tokens));
  std::iota(info.token_ids.begin(), info.token_ids.end(), first_token);
  info.prompt_length = prompt_length;
  const int first = captured_prompt_queries < 0 ? 0 : prompt_length - captured_prompt_queries;
  for (int position = first; position < num_tokens; ++position) info.query_positions.push_back(position);
  info.spans = spans;
  info.turn_starts.assign(turn_starts.begin(), turn_starts.end());
  std::vector<int> windows = layer_windows;
  windows.resize(static_cast<std::size_t>(num_layers), sliding_window);
  info.layers = layers_with_windows(info.model, windows);
  for (std::size_t l = 0; l < info.layers.size(); ++l) {
    info.layers[l].rule.attention_chunk_size = chunk;
    info.layers[l].rule.sinks = sinks;
    if (!scales.empty()) info.layers[l].rule.softmax_scale = scales[l];
    for (std::size_t i = 0; residual_norms && i < info.query_positions.size(); ++i) {
      info.layers[l].residual_norm.push_back(1 + static_cast<float>((i + 3 * l) % 7));
    }
    for (int channel = 0; projection_output_norm && channel < hidden_size; ++channel) {
      info.layers[l].projection_output_norm.weight.push_back(static_cast<float>(channel % 5) - 1.5f);
      info.layers[l].projection_output_norm.epsilon = 0.01;
    }
  }
  return info;
}

RandomTrace::Tensors RandomTrace::tensors() const {
  const int group = num_attention_heads / num_key_value_heads;
  std::vector<int> order = head_order;
  if (order.empty()) {
    order.resize(static_cast<std::size_t>(num_key_value_heads));
    std::iota(order.begin(), order.end(), 0);
  }
  const auto d = static_cast<std::size_t>(head_dim);
  const auto tokens = static_cast<std::size_t>(num_tokens);
  const auto heads = static_cast<std::size_t>(num_attention_heads);
  const TraceInfo described = info();
  const std::size_t queries = described.query_positions.size();
  const std::size_t skipped = tokens - queries;
  Tensors all;
  for (int layer = 0; layer < num_layers; ++layer) {
    // Each KV head with its group has a stream of its own, so that heads can be permuted.
    std::vector<float> keys, values, query_rows, projection_columns;
    for (const int kv_head : order) {
      std::mt19937 generator(seed * 7919 + static_cast<unsigned>(layer * 101 + kv_head));
      std::normal_distribution<float> normal;
      const auto draw = [&](std::size_t count, float scale, std::vector<float>& into) {
        for (std::size_t i = 0; i < count; ++i) into.push_back(scale * normal(generator));
      };
      draw(tokens * d, 1.5f, keys);
      draw(tokens * d, 1, values);
      for (int member = 0; member < group; ++member) {
        std::vector<float> rows;
        draw(tokens * d, 1.5f, rows);
        query_rows.insert(query_rows.end(), rows.begin() + static_cast<std::ptrdiff_t>(skipped * d), rows.end());
        draw(static_cast<std::size_t>(hidden_size) * d, 0.3f, projection_columns);
      }
    }
    std::vector<float> projection(static_cast<std::size_t>(hidden_size) * heads * d);
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t c = 0; c < static_cast<std::size_t>(hidden_size); ++c) {
        for (std::size_t i = 0; i < d; ++i) {
          projection[c * heads * d + h * d + i] =
              projection_columns[(h * static_cast<std::size_t>(hidden_size) + c) * d + i];
        }
      }
    }
    if (representable_in_float16) {
      for (auto* tensor : {&keys, &values, &query_rows, &projection}) {
        for (float& value : *tensor) value = rounded_to_float16(value);
      }
    }
    all.keys.push_back(std::move(keys));
    all.values.push_back(std::move(values));
    all.queries.push_back(std::move(query_rows));
    all.projection.push_back(std::move(projection));
    all.outputs.emplace_back(heads * queries * d, 0.5f);
    for (std::size_t h = 0; own_outputs && h < heads; ++h) {
      const std::size_t kv_head = h / static_cast<std::size_t>(group);
      const auto rows = [&](const std::vector<float>& tensor, std::size_t head, std::size_t count) {
        return MatrixView(tensor.data() + head * count * d, static_cast<Index>(count), static_cast<Index>(d));
      };
      const Matrix outputs = attention_outputs(
          rows(all.queries.back(), h, queries), described.query_positions, rows(all.keys.back(), kv_head, tokens),
          rows(all.values.back(), kv_head, tokens), described.layer(layer).rule, static_cast<int>(h));
      std::copy_n(outputs.data(), outputs.size(),
                  all.outputs.back().begin() + static_cast<std::ptrdiff_t>(h * queries * d));
    }
    all.mass.emplace_back(heads * static_cast<std::size_t>(prompt_length), 1.0f);
  }
  return all;
}

void RandomTrace::write(const std::filesystem::path& path) const {
  const Tensors all = tensors();
  TraceWriter writer(path, info(), type);
  for (int layer = 0; layer < num_layers; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    writer.write(layer, HeadTensor::keys, all.keys[l]);
    writer.write(layer, HeadTensor::values, all.values[l]);
    writer.write(layer, HeadTensor::queries, all.queries[l]);
    writer.write(layer, HeadTensor::outputs, all.outputs[l]);
    if (output_projection) writer.write_output_projection(layer, all.projection[l]);
    if (attention_mass) writer.write_attention_mass(layer, all.mass[l]);
  }
  writer.finish();
}

}  // namespace kvreplay::test
