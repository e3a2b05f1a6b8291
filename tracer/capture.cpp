#include "tracer/capture.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <memory>

#include "base/error.h"
#include "base/output_file.h"
#include "trace/writer.h"

namespace kvreplay::tracer {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Beyond this, rounding to half precision gives infinity.
constexpr float kLargestFloat16 = 65504.0f;
constexpr float kFirstInfiniteFloat16 = 65520.0f;

void check_fits_float16(std::span<const float> values, std::string_view what, int layer) {
  const auto found = std::find_if(values.begin(), values.end(),
                                  [](float value) { return !(std::abs(value) < kFirstInfiniteFloat16); });
  if (found == values.end()) return;
  throw Error(
      fmt::format("the {} of layer {} hold {:g}, which float16 cannot (it ends at {}); use --dtype bfloat16 "
                  "or float32",
                  what, layer, *found, kLargestFloat16));
}

// Keeps what attention saw and produced at the captured positions.
class Recorder final : public ForwardObserver {
 public:
  Recorder(const CaptureOptions& options, const ModelConfig& config, Index prompt_length, Index first_captured)
      : options_(options),
        config_(config),
        prompt_length_(prompt_length),
        first_captured_(first_captured),
        layers_(static_cast<std::size_t>(config.num_layers)),
        start_(Clock::now()) {}

  bool wants_attention_mass() const override { return !prompt_done_; }

  void on_attention(const LayerAttention& attention, KvCache& cache) override {
    Layer& layer = layers_[static_cast<std::size_t>(attention.layer)];
    const Index width = Index{config_.num_attention_heads} * config_.head_dim;
    const Index skipped = std::max<Index>(0, first_captured_ - attention.first_position) * width;
    const auto queries = attention.queries.subspan(static_cast<std::size_t>(skipped));
    const auto outputs = attention.outputs.subspan(static_cast<std::size_t>(skipped));
    layer.queries.insert(layer.queries.end(), queries.begin(), queries.end());
    layer.outputs.insert(layer.outputs.end(), outputs.begin(), outputs.end());
    if (!attention.attention_mass.empty()) {
      layer.mass.assign(attention.attention_mass.begin(), attention.attention_mass.end());
    }
    if (options_.dtype == DType::float16) {
      check_fits_float16(queries, "queries", attention.layer);
      check_fits_float16(outputs, "attention outputs", attention.layer);
      for (int head = 0; head < config_.num_key_value_heads; ++head) {
        const Index new_rows = cache.length(attention.layer, head) - attention.count;
        const auto floats = static_cast<std::size_t>(attention.count * config_.head_dim);
        const Index offset = new_rows * config_.head_dim;
        check_fits_float16({cache.keys(attention.layer, head) + offset, floats}, "keys", attention.layer);
        check_fits_float16({cache.values(attention.layer, head) + offset, floats}, "values", attention.layer);
      }
    }
  }

  void on_progress(double fraction) override {
    if (prompt_done_ || !options_.on_progress) return;
    const double elapsed = seconds_since(start_);
    const double rate = elapsed > 0 ? fraction * static_cast<double>(prompt_length_) / elapsed : 0;
    options_.on_progress({CaptureProgress::Stage::prefill, fraction, rate});
  }

  void end_prompt() { prompt_done_ = true; }

  // [Q, H·D] to [H, Q, D].
  std::vector<float> queries(int layer) const { return by_head(layers_[static_cast<std::size_t>(layer)].queries); }
  std::vector<float> outputs(int layer) const { return by_head(layers_[static_cast<std::size_t>(layer)].outputs); }

  std::span<const float> attention_mass(int layer) const { return layers_[static_cast<std::size_t>(layer)].mass; }

  void forget(int layer) { layers_[static_cast<std::size_t>(layer)] = {}; }

 private:
  struct Layer {
    std::vector<float> queries;
    std::vector<float> outputs;
    std::vector<float> mass;
  };

  std::vector<float> by_head(const std::vector<float>& rows) const {
    const Index dim = config_.head_dim;
    const Index width = Index{config_.num_attention_heads} * dim;
    const Index count = static_cast<Index>(rows.size()) / width;
    std::vector<float> heads(rows.size());
    for (Index row = 0; row < count; ++row) {
      for (Index head = 0; head < config_.num_attention_heads; ++head) {
        std::copy_n(rows.data() + row * width + head * dim, dim, heads.data() + (head * count + row) * dim);
      }
    }
    return heads;
  }

  const CaptureOptions& options_;
  const ModelConfig& config_;
  Index prompt_length_;
  Index first_captured_;
  std::vector<Layer> layers_;
  Clock::time_point start_;
  bool prompt_done_ = false;
};

struct Prompt {
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::int32_t> ids;
  std::vector<Span> spans;
};

Prompt prepare_prompt(const CaptureOptions& options, const ModelConfig& config) {
  Prompt prompt;
  if (options.prompt_text || Tokenizer::exists_in(options.model_folder)) {
    prompt.tokenizer = std::make_unique<Tokenizer>(options.model_folder, config.bos_token_id);
  }
  std::optional<Encoding> encoding;
  if (options.prompt_text) {
    if (options.prompt_text->empty()) throw Error(fmt::format("{}: the prompt is empty", options.prompt_name));
    encoding = prompt.tokenizer->encode(*options.prompt_text, !options.prompt_is_templated);
    const auto stands_for_text = [](const auto& range) { return range.first < range.second; };
    if (std::none_of(encoding->bytes.begin(), encoding->bytes.end(), stands_for_text)) {
      throw Error(fmt::format("{}: the tokenizer finds no token in the prompt", options.prompt_name));
    }
    prompt.ids = encoding->ids;
  } else {
    prompt.ids = options.prompt_ids;
  }
  if (prompt.ids.empty()) throw Error(fmt::format("{}: the prompt is empty", options.prompt_name));
  for (std::size_t position = 0; position < prompt.ids.size(); ++position) {
    const std::int32_t id = prompt.ids[position];
    if (id < 0 || id >= config.vocab_size) {
      throw Error(fmt::format("{}: token id {} at position {} is not in the model's vocabulary of {}",
                              options.prompt_name, id, position, config.vocab_size));
    }
  }
  prompt.spans = locate_spans(options.spans, options.prompt_text.value_or(""), encoding ? &*encoding : nullptr,
                              static_cast<int>(prompt.ids.size()));
  return prompt;
}

void check_options(const CaptureOptions& options) {
  if (options.generate < 0) throw UsageError("the number of tokens to generate must not be negative");
  if (options.query_window && *options.query_window < 1) throw UsageError("the query window must be at least 1");
  if (options.execution.threads < 1) throw UsageError("the number of threads must be at least 1");
  if (options.execution.block_tokens < 1) throw UsageError("the number of tokens in a block must be at least 1");
}

void warn(const CaptureOptions& options, const std::string& line) {
  if (options.on_warning) options.on_warning(line);
}

// What the run generated, with the space that a text's first word would lose.
std::string text_after(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt,
                       std::span<const std::int32_t> generated) {
  std::vector<std::int32_t> all(prompt.begin(), prompt.end());
  const std::string before = tokenizer.decode(all);
  all.insert(all.end(), generated.begin(), generated.end());
  const std::string whole = tokenizer.decode(all);
  return whole.starts_with(before) ? whole.substr(before.size()) : tokenizer.decode(generated);
}

TraceInfo describe(const CaptureOptions& options, const ModelConfig& config, const Prompt& prompt,
                   std::span<const std::int32_t> token_ids, Index first_captured) {
  TraceInfo info;
  info.model.name = config.name;
  info.model.architecture = config.model_type;
  info.model.num_layers = config.num_layers;
  info.model.num_attention_heads = config.num_attention_heads;
  info.model.num_key_value_heads = config.num_key_value_heads;
  info.model.head_dim = config.head_dim;
  info.model.hidden_size = config.hidden_size;
  info.model.rope_theta = config.rotary.theta;
  info.model.softmax_scale = config.softmax_scale;
  info.source = fmt::format("model {}, prompt {}{}, greedy decoding in float32", config.name, options.prompt_name,
                            options.prompt_text ? fmt::format(" by {}", prompt.tokenizer->file_name()) : "");
  info.token_ids.assign(token_ids.begin(), token_ids.end());
  info.prompt_length = static_cast<int>(prompt.ids.size());
  if (prompt.tokenizer != nullptr) {
    for (const std::int32_t id : token_ids) info.token_pieces.push_back(prompt.tokenizer->piece(id));
  }
  for (Index position = first_captured; position < static_cast<Index>(token_ids.size()); ++position) {
    info.query_positions.push_back(static_cast<std::int32_t>(position));
  }
  info.spans = prompt.spans;
  info.layer_sliding_window.assign(static_cast<std::size_t>(config.num_layers), 0);
  return info;
}

std::vector<float> output_projection(const Model& model, int layer) {
  const Tensor& weight = model.layers[static_cast<std::size_t>(layer)].output.weight;
  std::vector<float> values(static_cast<std::size_t>(weight.rows() * weight.columns()));
  to_float32(weight.type, weight.data, values);
  return values;
}

void write_trace(const CaptureOptions& options, const Model& model, TraceInfo info, const KvCache& cache,
                 Recorder& recorder) {
  const ModelConfig& config = model.config;
  const auto head_floats = static_cast<std::size_t>(info.num_tokens()) * static_cast<std::size_t>(config.head_dim);
  TraceWriter writer(options.output, std::move(info), options.dtype);
  std::vector<float> rows(static_cast<std::size_t>(config.num_key_value_heads) * head_floats);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values}) {
      for (int head = 0; head < config.num_key_value_heads; ++head) {
        const float* from = tensor == HeadTensor::keys ? cache.keys(layer, head) : cache.values(layer, head);
        std::copy_n(from, head_floats, rows.data() + static_cast<std::size_t>(head) * head_floats);
      }
      writer.write(layer, tensor, rows);
    }
    writer.write(layer, HeadTensor::queries, recorder.queries(layer));
    writer.write(layer, HeadTensor::outputs, recorder.outputs(layer));
    if (options.output_projection) writer.write_output_projection(layer, output_projection(model, layer));
    writer.write_attention_mass(layer, recorder.attention_mass(layer));
    recorder.forget(layer);
    if (options.on_progress) {
      options.on_progress({CaptureProgress::Stage::write, (layer + 1.0) / config.num_layers, 0});
    }
  }
  writer.finish();
}

}  // namespace

std::vector<std::int32_t> parse_token_ids(std::string_view text, std::string_view name) {
  constexpr std::string_view kSpaces = " \t\r\n\v\f";
  std::vector<std::int32_t> ids;
  for (std::size_t at = text.find_first_not_of(kSpaces); at != std::string_view::npos;
       at = text.find_first_not_of(kSpaces, at)) {
    const std::string_view word = text.substr(at, text.find_first_of(kSpaces, at) - at);
    std::int32_t id = 0;
    const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (failure != std::errc() || end != word.data() + word.size() || id < 0) {
      constexpr std::size_t kLongest = 40;
      throw Error(fmt::format("{}: {:?} is not a token id", name, word.substr(0, kLongest)));
    }
    ids.push_back(id);
    at += word.size();
  }
  if (ids.empty()) throw Error(fmt::format("{}: holds no token ids", name));
  return ids;
}

CaptureSummary capture(const CaptureOptions& options) {
  check_options(options);
  const Model model(options.model_folder);
  const ModelConfig& config = model.config;
  const Prompt prompt = prepare_prompt(options, config);
  // A long run should not end at a folder that cannot be written to.
  { const OutputFile probe(options.output); }
  if (options.dtype == DType::float16 && options.output_projection) {
    for (int layer = 0; layer < config.num_layers; ++layer) {
      check_fits_float16(output_projection(model, layer), "output projection", layer);
    }
  }

  const auto prompt_length = static_cast<Index>(prompt.ids.size());
  const Index capacity = prompt_length + std::max(0, options.generate - 1);
  if (config.max_position_embeddings > 0 && capacity > config.max_position_embeddings) {
    warn(options,
         fmt::format("the run may take {} positions, but {} was made for {}; what lies beyond may be unlike it",
                     capacity, config.name, config.max_position_embeddings));
  }
  const Index first_captured =
      options.query_window ? std::max<Index>(0, prompt_length - *options.query_window) : Index{0};

  CaptureSummary summary;
  KvCache cache(config.num_layers, config.num_key_value_heads, config.head_dim, capacity);
  Transformer transformer(model, options.execution);
  Recorder recorder(options, config, prompt_length, first_captured);
  std::vector<std::int32_t> token_ids = prompt.ids;

  const auto prefill_start = Clock::now();
  std::vector<float> logits = transformer.forward(prompt.ids, cache, &recorder);
  recorder.end_prompt();
  summary.prefill_seconds = seconds_since(prefill_start);

  const auto decode_start = Clock::now();
  while (static_cast<int>(summary.generated_ids.size()) < options.generate) {
    if (!summary.generated_ids.empty()) {
      token_ids.push_back(summary.generated_ids.back());
      logits = transformer.forward({&token_ids.back(), 1}, cache, &recorder);
    }
    summary.generated_ids.push_back(most_likely(logits));
    summary.decode_seconds = seconds_since(decode_start);
    if (options.on_progress) {
      const auto done = static_cast<double>(summary.generated_ids.size());
      options.on_progress({CaptureProgress::Stage::decode, done / options.generate,
                           done > 1 ? (done - 1) / summary.decode_seconds : 0});
    }
    summary.ended = std::find(config.eos_token_ids.begin(), config.eos_token_ids.end(), summary.generated_ids.back()) !=
                    config.eos_token_ids.end();
    if (summary.ended) break;
  }

  write_trace(options, model, describe(options, config, prompt, token_ids, first_captured), cache, recorder);
  summary.output = options.output;
  summary.file_bytes = std::filesystem::file_size(options.output);
  summary.num_layers = config.num_layers;
  summary.prompt_tokens = static_cast<int>(prompt_length);
  summary.queries = static_cast<int>(static_cast<Index>(token_ids.size()) - first_captured);
  if (prompt.tokenizer != nullptr) {
    summary.generated_text = text_after(*prompt.tokenizer, prompt.ids, summary.generated_ids);
  }
  return summary;
}

}  // namespace kvreplay::tracer
