#include "trace/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/printable.h"
#include "trace/layer_fields.h"

namespace kvreplay {

namespace {

// The first field of a layer that is out of its bounds.
class FieldCheck {
 public:
  FieldCheck(std::string path, int layer) : path_(std::move(path)), layer_(layer) {}

  template <class Number>
  void number(const char* name, const Number& value, Bound bound) {
    const char* must = nullptr;
    if (bound == Bound::earlier_layer) {
      if (value < -1 || value >= layer_) must = "the number of an earlier layer";
    } else if (bound == Bound::positive) {
      if (!std::isfinite(static_cast<double>(value)) || value <= 0) must = "positive";
    } else if (!std::isfinite(static_cast<double>(value)) || value < 0) {
      must = "0 or positive";
    }
    if (must != nullptr) report(path_, fmt::format("attribute '{}' is {}, but must be {}", name, value, must));
  }

  void text(const char*, const std::string&) {}

  void list(const char* name, const std::vector<float>& values, Index elements) {
    if (values.empty()) return;
    const std::string path = fmt::format("{}/{}", path_, name);
    if (static_cast<Index>(values.size()) != elements) {
      report(path, fmt::format("has {} elements instead of {}", values.size(), elements));
    } else if (const auto at = find_non_finite(values)) {
      report(path, fmt::format("element {} is {}", *at, values[*at]));
    }
  }

  void norm(const char* name, const RmsNorm& norm, Index elements) {
    list(name, norm.weight, elements);
    if (!std::isfinite(norm.epsilon) || norm.epsilon < 0) {
      report(fmt::format("{}/{}", path_, name),
             fmt::format("attribute 'epsilon' is {}, but must be 0 or positive", norm.epsilon));
    }
  }

  const std::optional<Contradiction>& found() const { return found_; }

 private:
  void report(std::string path, std::string reason) {
    if (!found_) found_ = Contradiction{std::move(path), std::move(reason)};
  }

  std::string path_;
  int layer_;
  std::optional<Contradiction> found_;
};

// What fields of a layer, each possible by itself, cannot be together.
std::optional<std::string> find_conflict(const TraceInfo& info, int number) {
  const LayerInfo& layer = info.layers[static_cast<std::size_t>(number)];
  if (layer.num_attention_heads % layer.num_key_value_heads != 0) {
    return fmt::format("{} query heads cannot share {} key/value heads evenly", layer.num_attention_heads,
                       layer.num_key_value_heads);
  }
  if (layer.values_in_keys > 0 && (layer.values_in_keys > layer.key_dim || layer.values_in_keys != layer.value_dim)) {
    return fmt::format("its values of {} dimensions cannot be the first {} of {} of its keys", layer.value_dim,
                       layer.values_in_keys, layer.key_dim);
  }
  if (layer.output_gate_dim != 0 && layer.output_gate_dim != 1 && layer.output_gate_dim != layer.value_dim) {
    return fmt::format("output_gate has {} factors for outputs of {} dimensions", layer.output_gate_dim,
                       layer.value_dim);
  }
  if (layer.cache_of >= 0) {
    const LayerInfo& owner = info.layers[static_cast<std::size_t>(layer.cache_of)];
    if (!owner.attends || owner.cache_of >= 0) {
      return fmt::format("attribute 'cache_of' is {}, but that layer has no cache of its own", layer.cache_of);
    }
    if (layer.num_key_value_heads != owner.num_key_value_heads || layer.key_dim != owner.key_dim ||
        layer.value_dim != owner.value_dim || layer.values_in_keys != owner.values_in_keys) {
      return fmt::format("attribute 'cache_of' is {}, but that layer's cache has another shape", layer.cache_of);
    }
  }
  if (!layer.rotary.empty()) {
    const auto table = std::ranges::find(info.rotary, layer.rotary, &RotaryTable::name);
    if (table == info.rotary.end()) {
      return fmt::format("attribute 'rotary' is '{}', which is not in /rotary", printable(layer.rotary));
    }
    if (table->rotated_dims() > layer.key_dim) {
      return fmt::format("its rotary embedding turns {} dimensions, but keys have {}", table->rotated_dims(),
                         layer.key_dim);
    }
  }
  return std::nullopt;
}

std::optional<Contradiction> find_contradiction_of_layers(const TraceInfo& info) {
  if (info.layers.empty()) return std::nullopt;
  if (info.layers.size() != static_cast<std::size_t>(info.model.num_layers)) {
    return Contradiction{
        "/layers", fmt::format("{} are described, but the model has {}", info.layers.size(), info.model.num_layers)};
  }
  for (int number = 0; number < info.model.num_layers; ++number) {
    const LayerInfo& layer = info.layers[static_cast<std::size_t>(number)];
    if (!layer.attends) continue;
    FieldCheck check(fmt::format("/layers/{}", number), number);
    visit_layer_fields(layer, info, check);
    if (check.found()) return check.found();
    if (auto conflict = find_conflict(info, number)) {
      return Contradiction{fmt::format("/layers/{}", number), *std::move(conflict)};
    }
  }
  if (std::ranges::none_of(info.layers, &LayerInfo::attends)) return Contradiction{"/layers", "no layer attends"};
  return std::nullopt;
}

std::optional<Contradiction> find_contradiction_of_rotary(const TraceInfo& info) {
  for (const RotaryTable& table : info.rotary) {
    const std::string path = fmt::format("/rotary/{}", printable(table.name));
    if (table.name.empty() || table.name == "." || table.name.find('/') != std::string::npos) {
      return Contradiction{"/rotary", fmt::format("'{}' is no name for a table", printable(table.name))};
    }
    if (table.inverse_frequencies.empty()) return Contradiction{path, "is empty"};
    if (const auto at = find_non_finite(table.inverse_frequencies)) {
      return Contradiction{path, fmt::format("element {} is {}", *at, table.inverse_frequencies[*at])};
    }
    if (!std::isfinite(table.attention_scaling) || table.attention_scaling <= 0) {
      return Contradiction{
          path, fmt::format("attribute 'attention_scaling' is {}, but must be positive", table.attention_scaling)};
    }
  }
  return std::nullopt;
}

}  // namespace

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
  if (!std::isfinite(model.rope_theta)) {
    return Contradiction{"/model", fmt::format("attribute 'rope_theta' is {}", model.rope_theta)};
  }
  FieldCheck check("/model", 0);
  const LayerInfo defaults = model.layer();
  visit_layer_fields(defaults, info, check);
  if (check.found()) return check.found();
  if (auto found = find_contradiction_of_rotary(info)) return found;
  if (auto found = find_contradiction_of_layers(info)) return found;

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
  if (!info.turn_roles.empty() && info.turn_roles.size() != info.turn_starts.size()) {
    return Contradiction{"/tokens/turn_starts", fmt::format("attribute 'roles' has {} elements for {} turns",
                                                            info.turn_roles.size(), info.turn_starts.size())};
  }

  for (std::size_t i = 0; i < info.spans.size(); ++i) {
    const Span& span = info.spans[i];
    if (span.start < 0 || span.end > tokens || span.start >= span.end) {
      return Contradiction{"/annotations/spans", fmt::format("span {} ('{}') is [{}, {}), not a range of the {} tokens",
                                                             i, printable(span.label), span.start, span.end, tokens)};
    }
  }
  return std::nullopt;
}

std::vector<Index> shape_of(const TraceInfo& info, int layer, HeadTensor tensor) {
  const LayerInfo of = info.layer(layer);
  switch (tensor) {
    case HeadTensor::keys:
      return {of.num_key_value_heads, info.num_tokens(), of.key_dim};
    case HeadTensor::values:
      return {of.num_key_value_heads, info.num_tokens(), of.value_dim};
    case HeadTensor::queries:
      return {of.num_attention_heads, info.num_queries(), of.key_dim};
    case HeadTensor::outputs:
      return {of.num_attention_heads, info.num_queries(), of.value_dim};
  }
  return {};
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
