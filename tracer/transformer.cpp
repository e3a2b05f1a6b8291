#include "tracer/transformer.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <string_view>

#include "base/error.h"
#include "kernels/inference.h"

namespace kvreplay::tracer {

namespace {

std::span<float> all_of(Buffer& rows) { return rows.part(0, rows.size()); }

template <class Element>
std::span<Element> block_of(std::span<Element> rows, Index first, Index count, Index width) {
  return rows.subspan(static_cast<std::size_t>(first * width), static_cast<std::size_t>(count * width));
}

// The first value that is NaN or infinite. Precondition: there is one.
Index first_not_finite(std::span<const float> values) {
  const auto found = std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  return found - values.begin();
}

// Values that are looked at or added up on one thread.
constexpr std::size_t kPart = std::size_t{1} << 15;

Index parts_of(std::size_t values) { return static_cast<Index>((values + kPart - 1) / kPart); }

template <class Value>
std::span<Value> part_of(std::span<Value> values, Index part) {
  const std::size_t first = static_cast<std::size_t>(part) * kPart;
  return values.subspan(first, std::min(kPart, values.size() - first));
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

// Several sums side by side, since each addition waits for the one before; their number is fixed, and so is the order.
double sum_of_squares(std::span<const float> values) {
  constexpr std::size_t kSums = 8;
  double sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums <= values.size(); i += kSums) {
    for (std::size_t lane = 0; lane < kSums; ++lane) {
      const auto value = static_cast<double>(values[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (; i < values.size(); ++i) sums[i % kSums] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

void cap_logits(const ModelConfig& config, std::span<float> logits) {
  if (config.final_logit_softcapping <= 0) return;
  kernels::soft_cap(static_cast<Index>(logits.size()), static_cast<float>(config.final_logit_softcapping),
                    logits.data());
}

}  // namespace

Transformer::Transformer(const Model& model, const Options& options)
    : model_(model),
      execution_(options.threads),
      block_tokens_(options.block_tokens),
      inverse_frequencies_(model.config.rotary.inverse_frequencies(model.config.head_dim)),
      local_inverse_frequencies_(model.config.local_rotary.inverse_frequencies(model.config.head_dim)) {}

std::vector<float> Transformer::forward(std::span<const std::int32_t> ids, KvCache& cache, ForwardObserver* observer) {
  const Sequence sequence{ids, &cache};
  Pass pass = begin({&sequence, 1}, LinearInput::SingleRow::fast, false, true);
  run_layers(pass, observer);
  const ModelConfig& config = model_.config;
  std::vector<float> last(static_cast<std::size_t>(config.hidden_size));
  normalize(block_of(all_of(pass.hidden), pass.count() - 1, 1, config.hidden_size), model_.final_norm, last);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  LinearInput(execution_, last, 1).multiply(model_.output_head, logits);
  cap_logits(config, logits);
  if (!are_finite(logits)) {
    throw Error(
        fmt::format("the model computed NaN or infinity in the logits after position {}: its weights or its "
                    "config.json are damaged",
                    pass.positions.back()));
  }
  return logits;
}

Buffer Transformer::run(std::span<const Sequence> sequences, ForwardObserver* observer) {
  return states_of(begin(sequences, LinearInput::SingleRow::as_many, true, false), observer);
}

Buffer Transformer::step(std::span<const Sequence> sequences) {
  return states_of(begin(sequences, LinearInput::SingleRow::as_many, true, true), nullptr);
}

// Of every token, after the final norm.
Buffer Transformer::states_of(Pass pass, ForwardObserver* observer) {
  run_layers(pass, observer);
  normalize(all_of(pass.hidden), model_.final_norm, all_of(pass.hidden));
  return std::move(pass.hidden);
}

void Transformer::logits(std::span<const float> states, Index count, std::span<float> out) const {
  LinearInput(execution_, states, count, LinearInput::SingleRow::as_many).multiply(model_.output_head, out);
  cap_logits(model_.config, out);
  if (!are_finite(out)) {
    throw Error("the model computed NaN or infinity in its logits: its weights or its config.json are damaged");
  }
}

Transformer::Pass Transformer::begin(std::span<const Sequence> sequences, LinearInput::SingleRow single_row,
                                     bool all_states, bool single_queries) const {
  Pass pass{sequences, single_row, all_states, single_queries, {}, {}, {}};
  for (const Sequence& sequence : sequences) {
    pass.starts.push_back(pass.count());
    for (std::size_t i = 0; i < sequence.ids.size(); ++i) {
      pass.positions.push_back(sequence.next_position() + static_cast<Index>(i));
    }
  }
  const Index width = model_.config.hidden_size;
  pass.hidden = Buffer(pass.count() * width);
  const std::span<float> hidden = all_of(pass.hidden);
  const Tensor& embedding = model_.embedding;
  Index token = 0;
  for (const Sequence& sequence : sequences) {
    for (const std::int32_t id : sequence.ids) {
      const Index offset = id * width * static_cast<Index>(size_of(embedding.type));
      to_float32(embedding.type, embedding.data + offset, block_of(hidden, token++, 1, width));
    }
  }
  if (model_.config.embedding_scale != 1) {
    for (float& value : hidden) value *= static_cast<float>(model_.config.embedding_scale);
  }
  return pass;
}

void Transformer::run_layers(Pass& pass, ForwardObserver* observer) {
  const ModelConfig& config = model_.config;
  const Index count = pass.count();
  const Index width = config.hidden_size;
  const Index query_width = Index{config.num_attention_heads} * config.head_dim;
  AttentionShape shape = {
      config.num_attention_heads,
      config.num_key_value_heads,
      config.head_dim,
      {.softmax_scale = config.softmax_scale, .attn_logit_softcapping = config.attn_logit_softcapping}};
  const std::span<float> hidden = all_of(pass.hidden);
  const bool wants_mass = observer != nullptr && observer->wants_attention_mass();
  const bool wants_norms = observer != nullptr && observer->wants_residual_norms();
  Buffer query_rows(count * query_width);
  Buffer output_rows(count * query_width);
  const std::span<float> queries = all_of(query_rows);
  const std::span<float> outputs = all_of(output_rows);
  const Rotation rotation = rotation_of(pass.positions, inverse_frequencies_);
  Rotation local_rotation;
  std::vector<NewTokens> new_tokens;
  for (const Sequence& sequence : pass.sequences) {
    new_tokens.push_back({sequence.cache, static_cast<Index>(sequence.ids.size())});
  }
  std::vector<double> mass;
  std::vector<float> norms;
  for (int number = 0; number < config.num_layers; ++number) {
    const LayerWeights& layer = model_.layers[static_cast<std::size_t>(number)];
    const bool local = config.sliding_window(number) > 0;
    if (local && local_rotation.cosines.size() == 0) {
      local_rotation = rotation_of(pass.positions, local_inverse_frequencies_);
    }
    const auto report = [&](Index tokens_of_half, int half) {
      if (observer == nullptr) return;
      const double layers = number + (half + static_cast<double>(tokens_of_half) / static_cast<double>(count)) / 2;
      observer->on_progress(layers / config.num_layers);
    };

    for (Index first = 0, block = 0; first < count; first += block) {
      block = next_block(count - first);
      project(pass, number, first, block, local ? local_rotation : rotation,
              block_of(queries, first, block, query_width), block_of(outputs, first, block, query_width));
      report(first + block, 0);
    }

    shape.rule.sliding_window = config.sliding_window(number);
    const Sequence& observed = pass.sequences.front();
    if (wants_mass) {
      mass.assign(static_cast<std::size_t>(config.num_attention_heads * (observed.cache->next_position() + count)), 0);
    }
    attend(execution_, shape, new_tokens, number, queries, outputs, mass, pass.single_queries);
    check_rows(outputs, "attention output", number, "query", query_width, pass.positions);
    if (observer != nullptr) {
      observer->on_attention({number, pass.positions.front(), count, queries, outputs, mass}, *observed.cache);
    }

    // Nothing reads what the last layer makes of any token but the last.
    const Index first_needed = pass.all_states || number + 1 < config.num_layers ? 0 : count - 1;
    if (wants_norms) norms.resize(static_cast<std::size_t>(count));
    const auto finish = [&](Index begin, Index end, bool whole) {
      for (Index token = begin, block = 0; token < end; token += block) {
        block = next_block(end - token);
        const std::span<float> rows = block_of(hidden, token, block, width);
        add_attention(layer, block_of(outputs, token, block, query_width), block, pass.single_row, rows);
        if (wants_norms) {
          execution_.share(block, block * width * 4, [&](Index row, int) {
            norms[static_cast<std::size_t>(token + row)] =
                static_cast<float>(std::sqrt(sum_of_squares(block_of(rows, row, 1, width))));
          });
        }
        if (whole) feed_forward(layer, block, pass.single_row, rows);
        report(token + block, 1);
      }
    };
    if (wants_norms && first_needed > 0) finish(0, first_needed, false);
    finish(first_needed, count, true);
    if (wants_norms) observer->on_residual(number, pass.positions.front(), norms);
  }
  for (const Sequence& sequence : pass.sequences) {
    if (sequence.attention != nullptr) {
      sequence.attention->advance();
    } else {
      sequence.cache->advance(static_cast<Index>(sequence.ids.size()));
    }
  }
}

// No token is left for a block of its own: single ones are multiplied in another order, and the bits that come out must
// not depend on how the prompt was divided.
Index Transformer::next_block(Index left) const { return left <= block_tokens_ + 1 ? left : block_tokens_; }

// Of `count` tokens of the pass from `first` on; `outputs` of those that attend by themselves.
void Transformer::project(const Pass& pass, int layer_number, Index first, Index count, const Rotation& rotation,
                          std::span<float> queries, std::span<float> outputs) {
  const ModelConfig& config = model_.config;
  const LayerWeights& layer = model_.layers[static_cast<std::size_t>(layer_number)];
  const std::span positions = std::span(pass.positions).subspan(static_cast<std::size_t>(first));
  const Index dim = config.head_dim;
  const Index query_width = Index{config.num_attention_heads} * dim;
  const Index kv_width = Index{config.num_key_value_heads} * dim;

  Buffer normalized(count * config.hidden_size);
  const float* const hidden = pass.hidden.data() + first * config.hidden_size;
  normalize({hidden, static_cast<std::size_t>(normalized.size())}, layer.attention_norm, all_of(normalized));
  const LinearInput input(execution_, all_of(normalized), count, pass.single_row);
  Buffer key_rows(count * kv_width);
  Buffer value_rows(count * kv_width);
  const std::span<float> keys = all_of(key_rows);
  const std::span<float> values = all_of(value_rows);
  input.multiply({{layer.query, queries}, {layer.key, keys}, {layer.value, values}});
  if (config.query_key_norm) {
    normalize(queries, layer.query_norm, queries);
    normalize(keys, layer.key_norm, keys);
  }
  rotate(queries, count, query_width, first, rotation);
  rotate(keys, count, kv_width, first, rotation);
  check_rows(queries, "queries", layer_number, "query", query_width, positions);
  check_rows(keys, "keys", layer_number, "KV", kv_width, positions);
  check_rows(values, "values", layer_number, "KV", kv_width, positions);

  // Each sequence's tokens among these go to its own cache.
  const auto sequences = static_cast<Index>(pass.sequences.size());
  const bool attends = std::ranges::any_of(pass.sequences, [](const Sequence& s) { return s.attention != nullptr; });
  const Index work = attends ? std::numeric_limits<Index>::max() : count * kv_width * 8;
  execution_.share(sequences, work, [&](Index sequence, int) {
    const auto& [ids, cache, attention] = pass.sequences[static_cast<std::size_t>(sequence)];
    const Index begin = pass.starts[static_cast<std::size_t>(sequence)];
    const Index from = std::max(first, begin);
    const Index end = std::min(first + count, begin + static_cast<Index>(ids.size()));
    if (from >= end) return;
    if (attention != nullptr) {
      const Index token = from - first;
      attention->attend(layer_number, keys.data() + token * kv_width, values.data() + token * kv_width,
                        queries.data() + token * query_width, outputs.data() + token * query_width);
      return;
    }
    for (int head = 0; head < config.num_key_value_heads; ++head) {
      const KvCache::Rows rows =
          cache->append(layer_number, head, pass.positions[static_cast<std::size_t>(from)], end - from);
      for (Index token = from; token < end; ++token) {
        const Index at = (token - first) * kv_width + head * dim;
        std::copy_n(keys.data() + at, dim, rows.keys + (token - from) * dim);
        std::copy_n(values.data() + at, dim, rows.values + (token - from) * dim);
      }
    }
  });
}

void Transformer::add_attention(const LayerWeights& layer, std::span<const float> attended, Index count,
                                LinearInput::SingleRow single_row, std::span<float> hidden) const {
  Buffer buffer(static_cast<Index>(hidden.size()));
  const std::span<float> rows = all_of(buffer);
  LinearInput(execution_, attended, count, single_row).multiply(layer.output, rows);
  if (model_.config.norm_after) normalize(rows, layer.output_norm, rows);
  add(rows, hidden);
}

void Transformer::feed_forward(const LayerWeights& layer, Index count, LinearInput::SingleRow single_row,
                               std::span<float> hidden) const {
  const Index intermediate = model_.config.intermediate_size;
  Buffer buffer(static_cast<Index>(hidden.size()));
  const std::span<float> rows = all_of(buffer);
  normalize(hidden, layer.mlp_norm, rows);
  Buffer gate(count * intermediate);
  Buffer up(count * intermediate);
  {
    const LinearInput input(execution_, rows, count, single_row);
    input.multiply({{layer.gate, all_of(gate)}, {layer.up, all_of(up)}});
  }
  const auto multiply_gate = gate_kernel(model_.config.activation);
  execution_.share(count, count * intermediate * 10, [&](Index token, int) {
    multiply_gate(intermediate, gate.data() + token * intermediate, up.data() + token * intermediate);
  });
  LinearInput(execution_, all_of(gate), count, single_row).multiply(layer.down, rows);
  if (model_.config.norm_after) normalize(rows, layer.down_norm, rows);
  add(rows, hidden);
}

// RMSNorm of every row, whose width is the weight's. `out` may be `hidden`.
void Transformer::normalize(std::span<const float> hidden, std::span<const float> weight, std::span<float> out) const {
  const Index width = static_cast<Index>(weight.size());
  const Index count = static_cast<Index>(hidden.size()) / width;
  execution_.share(count, count * width, [&](Index token, int) {
    const float* row = hidden.data() + token * width;
    float* normalized = out.data() + token * width;
    const double mean = sum_of_squares({row, static_cast<std::size_t>(width)}) / static_cast<double>(width);
    const auto factor = static_cast<float>(1 / std::sqrt(mean + model_.config.rms_norm_eps));
    for (Index i = 0; i < width; ++i) normalized[i] = row[i] * factor * weight[static_cast<std::size_t>(i)];
  });
}

void Transformer::add(std::span<const float> rows, std::span<float> hidden) const {
  execution_.share(parts_of(hidden.size()), static_cast<Index>(hidden.size()), [&](Index part, int) {
    const std::span<const float> from = part_of(rows, part);
    const std::span<float> to = part_of(hidden, part);
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  });
}

bool Transformer::are_finite(std::span<const float> values) const {
  std::atomic<bool> finite = true;
  execution_.share(parts_of(values.size()), static_cast<Index>(values.size()), [&](Index part, int) {
    if (!all_finite(part_of(values, part))) finite = false;
  });
  return finite;
}

// `rows` is [tokens, width], of heads of the model's width; `positions` begin with those of the tokens.
void Transformer::check_rows(std::span<const float> rows, std::string_view what, int layer, std::string_view head_kind,
                             Index width, std::span<const Index> positions) const {
  if (are_finite(rows)) return;
  const Index at = first_not_finite(rows);
  throw not_finite(what, layer, head_kind, at % width / model_.config.head_dim,
                   positions[static_cast<std::size_t>(at / width)], rows[static_cast<std::size_t>(at)]);
}

Transformer::Rotation Transformer::rotation_of(std::span<const Index> positions,
                                               const std::vector<float>& frequencies) const {
  const auto count = static_cast<Index>(positions.size());
  const auto half = static_cast<Index>(frequencies.size());
  Rotation rotation{Buffer(count * half), Buffer(count * half)};
  execution_.share(count, count * half * 40, [&](Index token, int) {
    for (Index i = 0; i < half; ++i) {
      // The angle is rounded to float32, as where the model was trained; at position 100,000 that is 0.004 rad.
      const float angle =
          static_cast<float>(positions[static_cast<std::size_t>(token)]) * frequencies[static_cast<std::size_t>(i)];
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
