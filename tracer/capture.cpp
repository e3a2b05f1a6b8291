#include "tracer/capture.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/error.h"
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

std::vector<float> output_projection(const Model& model, int layer) {
  const Tensor& weight = model.layers[static_cast<std::size_t>(layer)].output.weight;
  std::vector<float> values(static_cast<std::size_t>(weight.rows() * weight.columns()));
  to_float32(weight.type, weight.data, values);
  return values;
}

// Brings what attention saw and produced at the captured positions into the trace, layer by layer.
class Recorder final : public ForwardObserver {
 public:
  Recorder(const CaptureOptions& options, const Model& model, Index prompt_length, Index first_captured,
           TraceWriter& writer)
      : options_(options),
        model_(model),
        config_(model.config),
        prompt_length_(prompt_length),
        first_captured_(first_captured),
        writer_(writer),
        start_(Clock::now()) {}

  bool wants_attention_mass() const override { return !prompt_done_; }

  void on_attention(const LayerAttention& attention, KvCache& cache) override {
    const auto start = Clock::now();
    if (prompt_done_) {
      write_step(attention, cache);
    } else {
      write_prompt(attention, cache);
      if (options_.generate < 2) cache.release(attention.layer);
    }
    seconds_ += seconds_since(start);
  }

  bool wants_residual_norms() const override { return true; }

  void on_residual(int layer, Index /*first_position*/, std::span<const float> norms) override {
    const auto skipped = static_cast<std::size_t>(prompt_done_ ? 0 : first_captured_);
    writer_.write_residual_norms(layer, norms.subspan(skipped));
  }

  void on_progress(double fraction) override {
    if (prompt_done_ || !options_.on_progress) return;
    const double elapsed = seconds_since(start_);
    const double rate = elapsed > 0 ? fraction * static_cast<double>(prompt_length_) / elapsed : 0;
    options_.on_progress({CaptureProgress::Stage::prefill, fraction, rate});
  }

  void end_prompt() { prompt_done_ = true; }

  // What writing took so far.
  double seconds() const { return seconds_; }

 private:
  Index width() const { return Index{config_.num_attention_heads} * config_.head_dim; }

  void write_prompt(const LayerAttention& attention, const KvCache& cache) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values}) {
      const auto floats = static_cast<std::size_t>(attention.count * config_.head_dim);
      for (int head = 0; head < config_.num_key_value_heads; ++head) {
        writer_.write_rows(attention.layer, tensor, head, 0,
                           std::span(rows_in(cache, tensor, attention, head), floats));
      }
    }
    const auto skipped = static_cast<std::size_t>(first_captured_ * width());
    for (const HeadTensor tensor : {HeadTensor::queries, HeadTensor::outputs}) {
      const auto all = tensor == HeadTensor::queries ? attention.queries : attention.outputs;
      for (int head = 0; head < config_.num_attention_heads; ++head) {
        writer_.write_rows(attention.layer, tensor, head, 0, rows_of(all.subspan(skipped), head));
      }
    }
    if (options_.output_projection) {
      writer_.write_output_projection(attention.layer, output_projection(model_, attention.layer));
    }
    writer_.write_attention_mass(attention.layer,
                                 std::vector<float>(attention.attention_mass.begin(), attention.attention_mass.end()));
  }

  void write_step(const LayerAttention& attention, const KvCache& cache) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values}) {
      std::vector<float> rows;
      for (int head = 0; head < config_.num_key_value_heads; ++head) {
        const float* row = rows_in(cache, tensor, attention, head);
        rows.insert(rows.end(), row, row + config_.head_dim);
      }
      writer_.write_next(attention.layer, tensor, rows);
    }
    writer_.write_next(attention.layer, HeadTensor::queries, attention.queries);
    writer_.write_next(attention.layer, HeadTensor::outputs, attention.outputs);
  }

  // A head's keys or values of the tokens that attention was computed for, [count, D].
  const float* rows_in(const KvCache& cache, HeadTensor tensor, const LayerAttention& attention, int head) const {
    const float* rows =
        tensor == HeadTensor::keys ? cache.keys(attention.layer, head) : cache.values(attention.layer, head);
    return rows + attention.first_position * config_.head_dim;
  }

  // One head's part of rows of all heads: [count, H·D] to [count, D].
  std::vector<float> rows_of(std::span<const float> all, int head) const {
    const Index dim = config_.head_dim;
    const Index count = static_cast<Index>(all.size()) / width();
    std::vector<float> rows(static_cast<std::size_t>(count * dim));
    for (Index row = 0; row < count; ++row) {
      std::copy_n(all.data() + row * width() + head * dim, dim, rows.data() + row * dim);
    }
    return rows;
  }

  const CaptureOptions& options_;
  const Model& model_;
  const ModelConfig& config_;
  Index prompt_length_;
  Index first_captured_;
  TraceWriter& writer_;
  Clock::time_point start_;
  double seconds_ = 0;
  bool prompt_done_ = false;
};

void check_options(const CaptureOptions& options) {
  if (options.generate < 0) throw UsageError("the number of tokens to generate must not be negative");
  check_sampling(options.sampling);
  if (options.query_window && *options.query_window < 1) throw UsageError("the query window must be at least 1");
  if (options.execution.threads < 1) throw UsageError("the number of threads must be at least 1");
  if (options.execution.block_tokens < 1) throw UsageError("the number of tokens in a block must be at least 1");
}

void warn(const CaptureOptions& options, const std::string& line) {
  if (options.on_warning) options.on_warning(line);
}

// How the run came about, beside its prompt.
std::string provenance(const CaptureOptions& options) {
  return fmt::format(", {} in float32{}", description(options.sampling),
                     options.stop.by_model || options.generate == 0 ? "" : ", the model's stop tokens ignored");
}

// Whether the prompt's last turn is one that the model goes on with: a chat whose other turns all end in a stop token
// of the model, as templates write them, and that leaves the last one open.
bool leaves_turn_open(const Prompt& prompt, const ModelConfig& config, std::span<const std::int32_t> ends) {
  const auto has_end = [&](std::size_t first, std::size_t last) {
    return std::any_of(prompt.ids.begin() + static_cast<std::ptrdiff_t>(first),
                       prompt.ids.begin() + static_cast<std::ptrdiff_t>(last),
                       [&](std::int32_t id) { return is_over(ends, id) && id != config.bos_token_id; });
  };
  const std::vector<Turn>& turns = prompt.turns;
  if (turns.size() < 2) return false;
  for (std::size_t i = 0; i + 1 < turns.size(); ++i) {
    if (!has_end(static_cast<std::size_t>(turns[i].start), static_cast<std::size_t>(turns[i + 1].start))) return false;
  }
  return !has_end(static_cast<std::size_t>(turns.back().start), prompt.ids.size());
}

}  // namespace

CaptureSummary capture(const CaptureOptions& options) {
  check_options(options);
  const Model model(options.model_folder);
  const ModelConfig& config = model.config;
  const Prompt prompt = prepare_prompt(options, config);
  if (options.dtype == DType::float16 && options.output_projection) {
    for (int layer = 0; layer < config.num_layers; ++layer) {
      check_fits_float16(output_projection(model, layer), "output projection", layer);
    }
  }

  const Tokenizer* const tokenizer = prompt.tokenizer.get();
  std::vector<std::int32_t> own_ends;  // of the model
  std::vector<std::int32_t> ends;      // of this run
  if (options.generate > 0) {
    own_ends = stop_ids({}, options.model_folder, config, tokenizer);
    ends = stop_ids(options.stop, options.model_folder, config, tokenizer);
  }

  for (const std::string& warning : model.warnings) warn(options, warning);
  const auto prompt_length = static_cast<Index>(prompt.ids.size());
  // The last generated token is not fed back.
  const Index most_later = std::max(0, options.generate - 1);
  const Index longest = prompt_length + most_later;
  if (const auto warning = length_warning(config, options.model_folder, prompt_length, most_later)) {
    warn(options, *warning);
  }
  const Index first_captured =
      options.query_window ? std::max<Index>(0, prompt_length - *options.query_window) : Index{0};

  CaptureSummary summary;
  KvCache cache(config.num_layers, config.num_key_value_heads, config.head_dim, longest);
  Transformer transformer(model, options.execution);
  std::vector<std::int32_t> token_ids = prompt.ids;
  TraceInfo info = describe(options, model, prompt, first_captured);
  info.source += provenance(options);
  TraceWriter writer(options.output, std::move(info), options.dtype, most_later);
  Recorder recorder(options, model, prompt_length, first_captured, writer);

  const auto prefill_start = Clock::now();
  std::vector<float> logits = transformer.forward(prompt.ids, cache, &recorder);
  recorder.end_prompt();
  const std::int32_t next = most_likely(logits);
  writer.write_next_token({next, static_cast<double>(logits[static_cast<std::size_t>(next)])});
  summary.prefill_seconds = seconds_since(prefill_start) - recorder.seconds();

  Sampler sampler(options.sampling);
  const auto decode_start = Clock::now();
  const double written_before = recorder.seconds();
  while (static_cast<int>(summary.generated_ids.size()) < options.generate) {
    if (!summary.generated_ids.empty()) {
      token_ids.push_back(summary.generated_ids.back());
      logits = transformer.forward({&token_ids.back(), 1}, cache, &recorder);
    }
    summary.generated_ids.push_back(sampler.next(logits));
    summary.decode_seconds = seconds_since(decode_start) - (recorder.seconds() - written_before);
    if (options.on_progress) {
      const auto done = static_cast<double>(summary.generated_ids.size());
      options.on_progress({CaptureProgress::Stage::decode, done / options.generate,
                           done > 1 ? (done - 1) / summary.decode_seconds : 0});
    }
    summary.ended = is_over(ends, summary.generated_ids.back());
    if (summary.ended) break;
  }

  const auto later = std::span(token_ids).subspan(prompt.ids.size());
  if (!prompt.turns.empty() && !later.empty() && !leaves_turn_open(prompt, config, own_ends)) {
    writer.write_turn(static_cast<std::int32_t>(prompt_length), "assistant");
  }
  writer.finish(later, pieces_of(tokenizer, later));
  summary.output = options.output;
  summary.file_bytes = std::filesystem::file_size(options.output);
  summary.num_layers = config.num_layers;
  summary.prompt_tokens = static_cast<int>(prompt_length);
  summary.queries = static_cast<int>(static_cast<Index>(token_ids.size()) - first_captured);
  if (tokenizer != nullptr) {
    summary.generated_text = text_after(*tokenizer, prompt.ids, summary.generated_ids);
    if (summary.ended) summary.last_piece = tokenizer->piece(summary.generated_ids.back());
  }
  return summary;
}

}  // namespace kvreplay::tracer
