#include "trace/identity.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/digest.h"
#include "trace/layer_fields.h"

namespace kvreplay {

std::string trace_digest(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  const ModelInfo& model = info.model;
  Digest digest;
  for (const std::string& text : {model.name, model.architecture, info.created_by, info.created_at, info.source}) {
    digest.add(text);
  }
  for (const int number : {model.num_layers, model.num_attention_heads, model.num_key_value_heads, model.head_dim,
                           model.hidden_size, model.sliding_window, info.prompt_length}) {
    digest.add(fmt::format("{}", number));
  }
  for (const double number : {model.rope_theta, model.softmax_scale, model.attn_logit_softcapping}) {
    digest.add(fmt::format("{}", number));
  }
  for (const auto* numbers : {&info.token_ids, &info.turn_starts, &info.query_positions}) {
    digest.add(fmt::format("{}", fmt::join(*numbers, ",")));
  }
  std::vector<int> windows;
  for (const LayerInfo& layer : info.layers) windows.push_back(layer.rule.sliding_window);
  digest.add(fmt::format("{}", fmt::join(windows, ",")));
  // What the first version did not have adds nothing where it is not there, so that digests stay what they were.
  for (int l = 0; l < model.num_layers; ++l) {
    const LayerInfo& layer = info.layers[static_cast<std::size_t>(l)];
    if (!layer.attends) digest.add(fmt::format("layer {} does not attend", l));
    for (const LayerField& field : fields_of_its_own(info, l)) {
      if (field.name != "sliding_window") digest.add(fmt::format("layer {} {} {}", l, field.name, field.value));
    }
  }
  for (const RotaryTable& table : info.rotary) {
    digest.add(fmt::format("rotary {} {} {} {}", table.name, table.attention_scaling, name_of(table.layout),
                           fmt::join(table.inverse_frequencies, ",")));
  }
  for (const std::string& role : info.turn_roles) digest.add("role " + role);
  for (const std::string& answer : info.answers) digest.add("answer " + answer);
  for (const std::string& piece : info.token_pieces) digest.add(piece);
  for (const Span& span : info.spans) {
    digest.add(fmt::format("{},{},{}", span.start, span.end, span.label));
    if (!span.group.empty()) digest.add("group " + span.group);
  }
  for (const StoredTensor& tensor : trace.stored_tensors()) {
    digest.add(
        fmt::format("{} {} {} {}", tensor.path, name_of(tensor.type), fmt::join(tensor.shape, ","), tensor.xxh64));
  }
  return digest.text();
}

std::string tokens_digest(std::span<const std::int32_t> ids) {
  Digest digest;
  digest.add_bytes(reinterpret_cast<const char*>(ids.data()), ids.size_bytes());
  return digest.text();
}

std::string TraceReader::digest() const { return trace_digest(*this); }

bool has_tensor_digests(const TraceReader& trace) {
  return std::ranges::none_of(trace.stored_tensors(), [](const StoredTensor& tensor) { return tensor.xxh64.empty(); });
}

}  // namespace kvreplay
