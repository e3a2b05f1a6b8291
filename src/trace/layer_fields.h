// What a file says of a layer: one list, which reading, writing, checking, comparing and showing go through.
#pragma once

#include <string>
#include <vector>

#include "trace/trace.h"

namespace kvreplay {

/// What a number may be.
enum class Bound {
  positive,
  not_negative,
  earlier_layer,  ///< −1 for none, or the number of a layer before
};

/// Tells `visit` of every field that a group /layers/<l> may have, beside its tensors. `Layer` is LayerInfo, const or
/// not. The visitor has:
///   number(name, member, bound)   int or double, an attribute; where a layer has none, /model's attribute of that name
///                                 holds, and where that is absent too, what ModelInfo::layer() says
///   text(name, member)            a string, likewise
///   list(name, member, elements)  a one-dimensional dataset of float32, with as many elements or absent
///   norm(name, member, elements)  the same of an RmsNorm's weight, with an attribute `epsilon`
template <class Layer, class Visitor>
void visit_layer_fields(Layer& layer, const TraceInfo& info, Visitor&& visit) {
  visit.number("num_attention_heads", layer.num_attention_heads, Bound::positive);
  visit.number("num_key_value_heads", layer.num_key_value_heads, Bound::positive);
  visit.number("key_dim", layer.key_dim, Bound::positive);
  visit.number("value_dim", layer.value_dim, Bound::positive);
  visit.number("softmax_scale", layer.rule.softmax_scale, Bound::positive);
  visit.number("attn_logit_softcapping", layer.rule.attn_logit_softcapping, Bound::not_negative);
  visit.number("sliding_window", layer.rule.sliding_window, Bound::not_negative);
  visit.number("attention_chunk_size", layer.rule.attention_chunk_size, Bound::not_negative);
  visit.number("cache_of", layer.cache_of, Bound::earlier_layer);
  visit.number("values_in_keys", layer.values_in_keys, Bound::not_negative);
  visit.text("rotary", layer.rotary);
  const Index heads = layer.num_attention_heads;
  visit.list("sinks", layer.rule.sinks, heads);
  const Index value_dim = layer.values_in_keys > 0 ? layer.values_in_keys : layer.value_dim;
  visit.norm("projection_norm", layer.projection_norm, heads * value_dim);
  visit.norm("projection_output_norm", layer.projection_output_norm, Index{info.model.hidden_size});
  visit.list("residual_norm", layer.residual_norm, Index{info.num_queries()});
}

/// For visitors that leave some kinds of fields out.
struct LayerFieldVisitor {
  template <class Number>
  void number(const char*, Number&, Bound) {}
  template <class Text>
  void text(const char*, Text&) {}
  template <class List>
  void list(const char*, List&, Index) {}
  template <class Norm>
  void norm(const char*, Norm&, Index) {}
};

/// A field of a layer.
struct LayerField {
  std::string name;
  std::string value;  ///< as text; of a list, its elements
  bool is_list = false;
};

/// What a layer says otherwise than ModelInfo::layer().
std::vector<LayerField> fields_of_its_own(const TraceInfo& info, int layer);

}  // namespace kvreplay
