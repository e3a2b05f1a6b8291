#include "tracer/transformer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "base/error.h"
#include "kernels/inference.h"

namespace kvreplay::tracer {

namespace {

std::span<float> all_of(Buffer& rows) { return rows.part(0, rows.size()); }

std::span<float> block_of(std::span<float> rows, Index first, Index count, Index width) {
  return rows.subspan(static_cast<std::size_t>(first * width), static_cast<std::size_t>(count * width));
}

// The first value that is NaN or infinite, or -1.
Index first_not_finite(std::span<const float> values) {
  if (all_finite(values)) return -1;
  const auto found = std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  return found - values.begin();
}

Error not_finite(std::string_view what, int layer, std::string_view head_kind, Index head, Index position,
                 float value) {
  return Error(
      fmt::format("the model computed {} in the {} of layer {}, {} head {}, position {}: its weights or its "
                  "config.json are damaged",
                  std::isnan(value) ? "NaN" : "infinity", what, layer, head_kind, head, position));
}

auto gate_kernel(Activation activation) {
  switch (activation) {
    case Activation::silu:
      return &kernels::silu_multiply;
    case Activation::gelu_tanh:
      return &kernels::gelu_tanh_multiply;
    case Activation::gelu:
      break;
  }
  return &kernels::gelu_multiply;
}

// `rows` is [count, heads * dim].
void check_rows(std::span<const float> rows, std::string_view what, int layer, std::string_view head_kind, Index width,
                Index dim, Index first_position) {
  const Index at = first_not_finite(rows);
  if (at < 0) return;
  throw not_finite(what, layer, head_kind, at % width / dim, first_position + at / width,
                   rows[static_cast<std::size_t>(at)]);
}

}  // namespace

Transformer::Transformer(const Model& model, const Options& options)
    : model_(model),
      execution_(options.threads),
      block_tokens_(options.block_tokens),
      inverse_frequencies_(model.config.rotary.inverse_frequencies(model.config.head_dim)),
      local_inverse_frequencies_(model.config.local_rotary.inverse_frequencies(model.config.head_dim)) {}

std::vector<float> Transformer::forward(std::span<const std::int32_t> ids, KvCache& cache, ForwardObserver* observer) {
  const ModelConfig& config = model_.config;
  const Index count = static_cast<Index>(ids.size());
  const Index width = config.hidden_size;
  const Index query_width = Index{config.num_attention_heads} * config.head_dim;
  const Index first_position = cache.next_position();
  AttentionShape shape = {
      config.num_attention_heads,
      config.num_key_value_heads,
      config.head_dim,
      {.softmax_scale = config.softmax_scale, .attn_logit_softcapping = config.attn_logit_softcapping}};

  Buffer hidden_rows(count * width);
  const std::span<float> hidden = all_of(hidden_rows);
  const Tensor& embedding = model_.embedding;
  for (Index token = 0; token < count; ++token) {
    const Index offset = ids[static_cast<std::size_t>(token)] * width * static_cast<Index>(size_of(embedding.type));
    to_float32(embedding.type, embedding.data + offset, block_of(hidden, token, 1, width));
  }
  if (config.embedding_scale != 1) {
    for (float& value : hidden) value *= static_cast<float>(config.embedding_scale);
  }

  const bool wants_mass = observer != nullptr && observer->wants_attention_mass();
  Buffer query_rows(count * query_width);
  Buffer output_rows(count * query_width);
  const std::span<float> queries = all_of(query_rows);
  const std::span<float> outputs = all_of(output_rows);
  const Rotation rotation = rotation_of(first_position, count, inverse_frequencies_);
  Rotation local_rotation;
  std::vector<double> mass;
  for (int number = 0; number < config.num_layers; ++number) {
    const LayerWeights& layer = model_.layers[static_cast<std::size_t>(number)];
    const bool local = config.sliding_window(number) > 0;
    if (local && local_rotation.cosines.size() == 0) {
      local_rotation = rotation_of(first_position, count, local_inverse_frequencies_);
    }
    const auto report = [&](Index tokens_of_half, int half) {
      if (observer == nullptr) return;
      const double layers = number + (half + static_cast<double>(tokens_of_half) / static_cast<double>(count)) / 2;
      observer->on_progress(layers / config.num_layers);
    };

    for (Index first = 0, block = 0; first < count; first += block) {
      block = next_block(count - first);
      project(layer, block_of(hidden, first, block, width), block, first, local ? local_rotation : rotation, cache,
              number, block_of(queries, first, block, query_width));
      report(first + block, 0);
    }

    if (wants_mass) mass.assign(static_cast<std::size_t>(config.num_attention_heads * (first_position + count)), 0);
    shape.rule.sliding_window = config.sliding_window(number);
    attend(execution_, shape, cache, number, queries, count, outputs, mass);
    check_rows(outputs, "attention output", number, "query", query_width, config.head_dim, first_position);
    if (observer != nullptr) observer->on_attention({number, first_position, count, queries, outputs, mass}, cache);

    // Nothing reads what the last layer makes of any token but the last.
    const Index first_needed = number + 1 < config.num_layers ? 0 : count - 1;
    for (Index first = first_needed, block = 0; first < count; first += block) {
      block = next_block(count - first);
      feed_forward(layer, block_of(outputs, first, block, query_width), block, block_of(hidden, first, block, width));
      report(first + block, 1);
    }
  }
  cache.advance(count);

  std::vector<float> last(static_cast<std::size_t>(width));
  normalize(block_of(hidden, count - 1, 1, width), model_.final_norm, last);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  LinearInput(execution_, last, 1).multiply(model_.output_head, logits);
  if (config.final_logit_softcapping > 0) {
    kernels::soft_cap(static_cast<Index>(logits.size()), static_cast<float>(config.final_logit_softcapping),
                      logits.data());
  }
  if (first_not_finite(logits) >= 0) {
    throw Error(
        fmt::format("the model computed NaN or infinity in the logits after position {}: its weights or its "
                    "config.json are damaged",
                    first_position + count - 1));
  }
  return logits;
}

// No token is left for a block of its own: single ones are multiplied in another order, and the bits that come out must
// not depend on how the prompt was divided.
Index Transformer::next_block(Index left) const { return left <= block_tokens_ + 1 ? left : block_tokens_; }

// `first` counts the tokens of the pass.
void Transformer::project(const LayerWeights& layer, std::span<const float> hidden, Index count, Index first,
                          const Rotation& rotation, KvCache& cache, int layer_number, std::span<float> queries) {
  const ModelConfig& config = model_.config;
  const Index position = cache.next_position() + first;
  const Index dim = config.head_dim;
  const Index query_width = Index{config.num_attention_heads} * dim;
  const Index kv_width = Index{config.num_key_value_heads} * dim;

  Buffer normalized(count * config.hidden_size);
  normalize(hidden, layer.attention_norm, all_of(normalized));
  const LinearInput input(execution_, all_of(normalized), count);
  Buffer key_rows(count * kv_width);
  Buffer value_rows(count * kv_width);
  const std::span<float> keys = all_of(key_rows);
  const std::span<float> values = all_of(value_rows);
  input.multiply(layer.query, queries);
  input.multiply(layer.key, keys);
  input.multiply(layer.value, values);
  if (config.query_key_norm) {
    normalize(queries, layer.query_norm, queries);
    normalize(keys, layer.key_norm, keys);
  }
  rotate(queries, count, query_width, first, rotation);
  rotate(keys, count, kv_width, first, rotation);
  check_rows(queries, "queries", layer_number, "query", query_width, dim, position);
  check_rows(keys, "keys", layer_number, "KV", kv_width, dim, position);
  check_rows(values, "values", layer_number, "KV", kv_width, dim, position);

  for (int head = 0; head < config.num_key_value_heads; ++head) {
    const KvCache::Rows rows = cache.append(layer_number, head, position, count);
    for (Index token = 0; token < count; ++token) {
      const Index from = token * kv_width + head * dim;
      std::copy_n(keys.data() + from, dim, rows.keys + token * dim);
      std::copy_n(values.data() + from, dim, rows.values + token * dim);
    }
  }
}

void Transformer::feed_forward(const LayerWeights& layer, std::span<const float> attended, Index count,
                               std::span<float> hidden) {
  const Index intermediate = model_.config.intermediate_size;
  Buffer buffer(static_cast<Index>(hidden.size()));
  const std::span<float> rows = all_of(buffer);
  const auto add_to_hidden = [&] {
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] += rows[i];
  };
  LinearInput(execution_, attended, count).multiply(layer.output, rows);
  if (model_.config.norm_after) normalize(rows, layer.output_norm, rows);
  add_to_hidden();

  normalize(hidden, layer.mlp_norm, rows);
  Buffer gate(count * intermediate);
  Buffer up(count * intermediate);
  {
    const LinearInput input(execution_, rows, count);
    input.multiply(layer.gate, all_of(gate));
    input.multiply(layer.up, all_of(up));
  }
  const auto multiply_gate = gate_kernel(model_.config.activation);
  execution_.share(count, count * intermediate * 10, [&](Index token, int) {
    multiply_gate(intermediate, gate.data() + token * intermediate, up.data() + token * intermediate);
  });
  LinearInput(execution_, all_of(gate), count).multiply(layer.down, rows);
  if (model_.config.norm_after) normalize(rows, layer.down_norm, rows);
  add_to_hidden();
}

// RMSNorm of every row, whose width is the weight's. `out` may be `hidden`.
void Transformer::normalize(std::span<const float> hidden, std::span<const float> weight, std::span<float> out) const {
  const Index width = static_cast<Index>(weight.size());
  const Index count = static_cast<Index>(hidden.size()) / width;
  execution_.share(count, count * width, [&](Index token, int) {
    const float* row = hidden.data() + token * width;
    float* normalized = out.data() + token * width;
    double squares = 0;
    for (Index i = 0; i < width; ++i) squares += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    const double mean = squares / static_cast<double>(width);
    const auto factor = static_cast<float>(1 / std::sqrt(mean + model_.config.rms_norm_eps));
    for (Index i = 0; i < width; ++i) normalized[i] = row[i] * factor * weight[static_cast<std::size_t>(i)];
  });
}

Transformer::Rotation Transformer::rotation_of(Index first_position, Index count,
                                               const std::vector<float>& frequencies) const {
  const Index half = static_cast<Index>(frequencies.size());
  Rotation rotation{Buffer(count * half), Buffer(count * half)};
  execution_.share(count, count * half * 40, [&](Index token, int) {
    for (Index i = 0; i < half; ++i) {
      // The angle is rounded to float32, as where the model was trained; at position 100,000 that is 0.004 rad.
      const float angle = static_cast<float>(first_position + token) * frequencies[static_cast<std::size_t>(i)];
      rotation.cosines.data()[token * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      rotation.sines.data()[token * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  });
  return rotation;
}

// Turns the halves of every head against each other, as Hugging Face checkpoints expect. `first` counts the tokens of
// the pass.
void Transformer::rotate(std::span<float> heads, Index count, Index width, Index first,
                         const Rotation& rotation) const {
  const Index half = model_.config.head_dim / 2;
  execution_.share(count, count * width * 4, [&](Index token, int) {
    const float* const cosines = rotation.cosines.data() + (first + token) * half;
    const float* const sines = rotation.sines.data() + (first + token) * half;
    for (float* head = heads.data() + token * width; head < heads.data() + (token + 1) * width; head += 2 * half) {
      for (Index i = 0; i < half; ++i) {
        const float left = head[i];
        const float right = head[half + i];
        head[i] = left * cosines[i] - right * sines[i];
        head[half + i] = right * cosines[i] + left * sines[i];
      }
    }
  });
}

std::int32_t most_likely(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace kvreplay::tracer
