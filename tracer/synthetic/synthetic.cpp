#include "tracer/synthetic/synthetic.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "base/error.h"
#include "tracer/synthetic/generator.h"
#include "tracer/synthetic/random.h"

namespace kvreplay::tracer {

namespace {

constexpr int kHeavyHitterEvery = 512;
constexpr int kTokensPerSpan = 1024;  // of the prompt, for every piece of evidence
constexpr int kMostSpans = 8;
constexpr int kQueriesPerSpan = 4;    // that ask for the same evidence before the next one's turn
constexpr int kPromptWithSpans = 64;  // shorter ones have no evidence
constexpr int kVocabulary = 128'000;

int span_count(const SyntheticTrace& trace) {
  if (trace.prompt_tokens < kPromptWithSpans) return 0;
  return std::clamp(trace.prompt_tokens / kTokensPerSpan, 2, kMostSpans);
}

// Between 5 % and 90 % of the prompt, one in each of as many equal parts.
std::vector<Span> place_spans(const SyntheticTrace& trace) {
  const int count = span_count(trace);
  std::vector<Span> spans;
  const std::uint64_t places = stream(trace.seed, Stream::spans);
  for (int s = 0; s < count; ++s) {
    const double part = 0.85 * trace.prompt_tokens / count;
    const int length = std::min(8 + static_cast<int>(at(places, 2 * s) % 9), static_cast<int>(part) / 2);
    const double room = part - length;
    const int start = std::max(static_cast<int>(0.05 * trace.prompt_tokens + s * part +
                                                room * static_cast<double>(uniform(at(places, 2 * s + 1)))),
                               kSinks);
    spans.push_back({start, start + length, fmt::format("{}-evidence-{}", s % 2 == 0 ? "hinted" : "late", s)});
  }
  return spans;
}

}  // namespace

HeadRole role_of(int layer, int query_head) {
  constexpr std::array kRoles = {HeadRole::local, HeadRole::global, HeadRole::drifting, HeadRole::retrieval};
  return kRoles[static_cast<std::size_t>(layer + query_head) % kRoles.size()];
}

std::vector<int> heavy_hitters(const SyntheticTrace& trace) {
  const std::uint64_t draw = stream(trace.seed, Stream::heavy_hitters);
  std::vector<int> positions;
  for (int position = kSinks; position < trace.prompt_tokens; ++position) {
    if (at(draw, position) % kHeavyHitterEvery == 0) positions.push_back(position);
  }
  return positions;
}

std::optional<int> asked_span(const SyntheticTrace& trace, int position) {
  const int spans = span_count(trace);
  if (spans == 0 || position < trace.prompt_tokens - kHintingQueries) return std::nullopt;
  if (position >= trace.prompt_tokens) return (position - trace.prompt_tokens) / kQueriesPerSpan % spans;
  const int hinted = (spans + 1) / 2;
  return (position - trace.prompt_tokens + kHintingQueries) / kQueriesPerSpan % hinted * 2;
}

TraceInfo describe(const SyntheticTrace& trace) {
  const auto refuse = [](const std::string& reason) { throw UsageError(fmt::format("a synthetic trace {}", reason)); };
  if (trace.num_layers < 1 || trace.num_attention_heads < 1 || trace.num_key_value_heads < 1 || trace.hidden_size < 1) {
    refuse("needs at least one layer, query head, KV head and hidden dimension");
  }
  if (trace.num_attention_heads % trace.num_key_value_heads != 0) {
    refuse(fmt::format("cannot have {} query heads on {} KV heads: they must share them evenly",
                       trace.num_attention_heads, trace.num_key_value_heads));
  }
  if (trace.head_dim < 8) refuse(fmt::format("needs a head dimension of at least 8, not {}", trace.head_dim));
  if (trace.prompt_tokens < 1 || trace.later_tokens < 0 || trace.num_tokens() < 2) {
    refuse(fmt::format("needs a prompt and 2 tokens in all, not {} and {} after it", trace.prompt_tokens,
                       trace.later_tokens));
  }
  if (trace.query_window && *trace.query_window < 1) refuse("needs a query window of at least 1");

  TraceInfo info;
  info.model.name = "synthetic";
  info.model.architecture = "synthetic";
  info.model.num_layers = trace.num_layers;
  info.model.num_attention_heads = trace.num_attention_heads;
  info.model.num_key_value_heads = trace.num_key_value_heads;
  info.model.head_dim = trace.head_dim;
  info.model.hidden_size = trace.hidden_size;
  info.model.softmax_scale = 1 / std::sqrt(static_cast<double>(trace.head_dim));
  info.source = fmt::format("synthetic, seed {}: no model was run", trace.seed);
  info.prompt_length = trace.prompt_tokens;
  const std::uint64_t tokens = stream(trace.seed, Stream::tokens);
  for (int position = 0; position < trace.num_tokens(); ++position) {
    info.token_ids.push_back(static_cast<std::int32_t>(at(tokens, position) % kVocabulary));
  }
  const int first = trace.query_window ? std::max(0, trace.prompt_tokens - *trace.query_window) : 0;
  for (int position = first; position < trace.num_tokens(); ++position) info.query_positions.push_back(position);
  info.spans = place_spans(trace);
  const std::vector<double> frequencies = frequencies_of(trace);
  info.rotary = {{.name = "place", .inverse_frequencies = {frequencies.begin(), frequencies.end()}}};
  info.layers.assign(static_cast<std::size_t>(trace.num_layers), info.model.layer());
  for (LayerInfo& layer : info.layers) layer.rotary = "place";
  return info;
}

}  // namespace kvreplay::tracer
