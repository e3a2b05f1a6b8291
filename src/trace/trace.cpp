#include "trace/trace.h"

#include <algorithm>

namespace kvreplay {

std::string name_of(RotaryTable::Layout layout) { return layout == RotaryTable::Layout::half ? "half" : "interleaved"; }

LayerInfo ModelInfo::layer() const {
  LayerInfo info;
  info.num_attention_heads = num_attention_heads;
  info.num_key_value_heads = num_key_value_heads;
  info.key_dim = head_dim;
  info.value_dim = head_dim;
  info.rule = {.softmax_scale = softmax_scale,
               .attn_logit_softcapping = attn_logit_softcapping,
               .sliding_window = sliding_window};
  return info;
}

const RotaryTable* TraceInfo::rotary_of(const LayerInfo& layer) const {
  const auto table = std::ranges::find(rotary, layer.rotary, &RotaryTable::name);
  return layer.rotary.empty() || table == rotary.end() ? nullptr : &*table;
}

std::vector<LayerInfo> layers_with_windows(const ModelInfo& model, std::span<const int> sliding_windows) {
  std::vector<LayerInfo> layers;
  for (const int window : sliding_windows) layers.emplace_back(model.layer()).rule.sliding_window = window;
  return layers;
}

}  // namespace kvreplay
