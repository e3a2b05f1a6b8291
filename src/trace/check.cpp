#include "trace/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/printable.h"

namespace kvreplay {

std::optional<Contradiction> find_contradiction(const TraceInfo& info) {
  const ModelInfo& model = info.model;
  for (const auto& [name, value] : {std::pair{"num_layers", model.num_layers},
                                    {"num_attention_heads", model.num_attention_heads},
                                    {"num_key_value_heads", model.num_key_value_heads},
                                    {"head_dim", model.head_dim},
                                    {"hidden_size", model.hidden_size}}) {
    if (value < 1)
      return Contradiction{"/model", fmt::format("attribute '{}' is {}, but must be positive", name, value)};
  }
  if (model.num_attention_heads % model.num_key_value_heads != 0) {
    return Contradiction{"/model", fmt::format("{} query heads cannot share {} key/value heads evenly",
                                               model.num_attention_heads, model.num_key_value_heads)};
  }
  if (!std::isfinite(model.softmax_scale) || model.softmax_scale <= 0) {
    return Contradiction{"/model",
                         fmt::format("attribute 'softmax_scale' is {}, but must be positive", model.softmax_scale)};
  }
  if (!std::isfinite(model.attn_logit_softcapping) || model.attn_logit_softcapping < 0) {
    return Contradiction{"/model", fmt::format("attribute 'attn_logit_softcapping' is {}, but must be 0 or positive",
                                               model.attn_logit_softcapping)};
  }
  if (!std::isfinite(model.rope_theta)) {
    return Contradiction{"/model", fmt::format("attribute 'rope_theta' is {}", model.rope_theta)};
  }
  if (model.sliding_window < 0) {
    return Contradiction{
        "/model", fmt::format("attribute 'sliding_window' is {}, but must be 0 or positive", model.sliding_window)};
  }
  const auto& windows = info.layer_sliding_window;
  if (!windows.empty() && windows.size() != static_cast<std::size_t>(model.num_layers)) {
    return Contradiction{"/layers", fmt::format("{} sliding windows for {} layers", windows.size(), model.num_layers)};
  }
  for (std::size_t layer = 0; layer < windows.size(); ++layer) {
    if (windows[layer] < 0) {
      return Contradiction{fmt::format("/layers/{}", layer),
                           fmt::format("attribute 'sliding_window' is {}, but must be 0 or positive", windows[layer])};
    }
  }

  if (info.token_ids.empty()) return Contradiction{"/tokens/ids", "is empty"};
  const int tokens = info.num_tokens();
  for (int i = 0; i < tokens; ++i) {
    const auto id = info.token_ids[static_cast<std::size_t>(i)];
    if (id < 0)
      return Contradiction{"/tokens/ids", fmt::format("the token at position {} has the negative id {}", i, id)};
  }
  if (info.prompt_length < 1 || info.prompt_length > tokens) {
    return Contradiction{"/tokens/ids", fmt::format("attribute 'prompt_length' is {}, but there are {} tokens",
                                                    info.prompt_length, tokens)};
  }
  if (!info.token_pieces.empty() && info.token_pieces.size() != info.token_ids.size()) {
    return Contradiction{"/tokens/pieces",
                         fmt::format("has {} pieces for {} tokens", info.token_pieces.size(), tokens)};
  }

  const auto ascending = [&](const char* path,
                             const std::vector<std::int32_t>& positions) -> std::optional<Contradiction> {
    for (std::size_t i = 0; i < positions.size(); ++i) {
      if (positions[i] < 0 || positions[i] >= tokens) {
        return Contradiction{path, fmt::format("element {} is {}, outside the {} tokens", i, positions[i], tokens)};
      }
      if (i > 0 && positions[i] <= positions[i - 1]) {
        return Contradiction{path, fmt::format("positions must ascend, but {} follows {} at element {}", positions[i],
                                               positions[i - 1], i)};
      }
    }
    return std::nullopt;
  };
  if (info.query_positions.empty()) return Contradiction{"/query_positions", "is empty; capture at least one query"};
  if (auto found = ascending("/query_positions", info.query_positions)) return found;
  if (auto found = ascending("/tokens/turn_starts", info.turn_starts)) return found;

  for (std::size_t i = 0; i < info.spans.size(); ++i) {
    const Span& span = info.spans[i];
    if (span.start < 0 || span.end > tokens || span.start >= span.end) {
      return Contradiction{"/annotations/spans", fmt::format("span {} ('{}') is [{}, {}), not a range of the {} tokens",
                                                             i, printable(span.label), span.start, span.end, tokens)};
    }
  }
  return std::nullopt;
}

std::vector<Index> shape_of(const TraceInfo& info, HeadTensor tensor) {
  const ModelInfo& model = info.model;
  if (tensor == HeadTensor::keys || tensor == HeadTensor::values) {
    return {model.num_key_value_heads, info.num_tokens(), model.head_dim};
  }
  return {model.num_attention_heads, info.num_queries(), model.head_dim};
}

std::string name_of(HeadTensor tensor) {
  switch (tensor) {
    case HeadTensor::keys:
      return "keys";
    case HeadTensor::values:
      return "values";
    case HeadTensor::queries:
      return "queries";
    case HeadTensor::outputs:
      return "outputs";
  }
  return "";
}

namespace {

// Index of the first element all of whose exponent bits are set, which only NaN and infinity have.
template <class Bits>
std::optional<std::size_t> find_exponent(std::span<const std::byte> elements, Bits exponent) {
  const auto load = [](const std::byte* from) {
    Bits bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
  };
  // Counted in blocks, without an exit from the inner loop, so that it runs as vector instructions.
  constexpr std::size_t kBlock = 4096;
  const std::size_t size = elements.size() / sizeof(Bits);
  for (std::size_t start = 0; start < size; start += kBlock) {
    const std::byte* block = elements.data() + start * sizeof(Bits);
    const std::size_t count = std::min(kBlock, size - start);
    Bits found = 0;
    for (std::size_t i = 0; i < count; ++i) {
      found |= static_cast<Bits>((load(block + i * sizeof(Bits)) & exponent) == exponent ? 1 : 0);
    }
    if (found == 0) continue;
    std::size_t first = 0;
    while ((load(block + first * sizeof(Bits)) & exponent) != exponent) ++first;
    return start + first;
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::size_t> find_non_finite(std::span<const float> values) {
  return find_exponent<std::uint32_t>(std::as_bytes(values), 0x7f800000);
}

std::optional<std::size_t> find_non_finite(DType type, std::span<const std::byte> stored) {
  switch (type) {
    case DType::float32:
      return find_exponent<std::uint32_t>(stored, 0x7f800000);
    case DType::float16:
      return find_exponent<std::uint16_t>(stored, 0x7c00);
    case DType::bfloat16:
      return find_exponent<std::uint16_t>(stored, 0x7f80);
  }
  return std::nullopt;
}

}  // namespace kvreplay
