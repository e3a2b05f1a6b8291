#include "replay/replayable.h"

#include <fmt/format.h>

#include <optional>

namespace kvreplay {
namespace {

// What of a layer cannot be replayed, as the rest of a sentence; nothing where all can.
std::optional<std::string> obstacle(const ModelInfo& model, const LayerInfo& layer) {
  if (!layer.attends) return "is missing, as in models whose layers do not all attend";
  if (layer.cache_of >= 0) return fmt::format("reads the cache of layer {} (cache_of)", layer.cache_of);
  if (layer.values_in_keys > 0) return "has its values in its keys (values_in_keys)";
  const struct {
    const char* name;
    int own;
    const char* of_all;
    int models;
  } numbers[] = {
      {"num_attention_heads", layer.num_attention_heads, "num_attention_heads", model.num_attention_heads},
      {"num_key_value_heads", layer.num_key_value_heads, "num_key_value_heads", model.num_key_value_heads},
      {"key_dim", layer.key_dim, "head_dim", model.head_dim},
      {"value_dim", layer.value_dim, "head_dim", model.head_dim},
  };
  for (const auto& number : numbers) {
    if (number.own == number.models) continue;
    return fmt::format("has {} {} where the model's {} is {}", number.name, number.own, number.of_all, number.models);
  }
  if (layer.output_gate_dim > 0) return "has a gate between its outputs and the projection (output_gate)";
  if (!layer.projection_norm.weight.empty()) return "has a norm before its projection (projection_norm)";
  return std::nullopt;
}

}  // namespace

std::string replay_obstacle(const TraceInfo& info) {
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    const auto found = obstacle(info.model, info.layers[static_cast<std::size_t>(layer)]);
    if (found) return fmt::format("/layers/{}: {}, which replays cannot take into account", layer, *found);
  }
  return "";
}

}  // namespace kvreplay
