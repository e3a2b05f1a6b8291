#include "tracer/live/held_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "policy/head.h"

namespace kvreplay::tracer {

namespace {

Buffer copy_of(std::span<const float> values) {
  Buffer copy(static_cast<Index>(values.size()));
  std::ranges::copy(values, copy.data());
  return copy;
}

}  // namespace

HeldRun::HeldRun(const Model& model, TraceInfo info, int eviction_position, std::string name, std::string digest,
                 const HeldParts& parts)
    : model_(model),
      info_(std::move(info)),
      eviction_position_(eviction_position),
      name_(std::move(name)),
      digest_(std::move(digest)),
      parts_(parts),
      before_(model.config.num_layers, model.config.num_key_value_heads, model.config.head_dim, eviction_position),
      layers_(static_cast<std::size_t>(model.config.num_layers)) {
  parts_.prompt_queries = std::min<Index>(parts_.prompt_queries, eviction_position);
  info_.query_positions.resize(static_cast<std::size_t>(parts_.prompt_queries));
  std::iota(info_.query_positions.begin(), info_.query_positions.end(),
            eviction_position - static_cast<int>(parts_.prompt_queries));
}

std::vector<std::vector<int>> HeldRun::everything() const {
  std::vector<std::vector<int>> sets;
  for (const LayerInfo& layer : info_.layers) {
    const int first = first_held_position(eviction_position_, layer.rule);
    std::vector<int> held(static_cast<std::size_t>(eviction_position_ - first));
    std::iota(held.begin(), held.end(), first);
    sets.insert(sets.end(), static_cast<std::size_t>(layer.num_key_value_heads), held);
  }
  return sets;
}

KvCache& HeldRun::follow_with(std::span<const std::int32_t> ids, const std::vector<std::string>& pieces) {
  info_.token_ids.resize(static_cast<std::size_t>(eviction_position_));
  info_.token_ids.insert(info_.token_ids.end(), ids.begin(), ids.end());
  if (!info_.token_pieces.empty()) {
    info_.token_pieces.resize(static_cast<std::size_t>(eviction_position_));
    info_.token_pieces.insert(info_.token_pieces.end(), pieces.begin(), pieces.end());
  }
  for (int position = eviction_position_; position < info_.num_tokens(); ++position) {
    info_.query_positions.push_back(position);
  }
  after_ = std::make_unique<KvCache>(before_, everything(), model_.config.num_key_value_heads,
                                     static_cast<Index>(ids.size()));
  return *after_;
}

void HeldRun::on_attention(const LayerAttention& attention, KvCache& /*cache*/) {
  Layer& layer = layers_[static_cast<std::size_t>(attention.layer)];
  if (after_ != nullptr) {
    layer.queries_after = copy_of(attention.queries);
    if (parts_.outputs) layer.outputs_after = copy_of(attention.outputs);
    return;
  }
  const auto skipped = static_cast<std::size_t>((attention.count - held_before()) * query_width());
  layer.queries_before = copy_of(attention.queries.subspan(skipped));
  layer.mass.assign(attention.attention_mass.begin(), attention.attention_mass.end());
}

void HeldRun::on_residual(int layer, Index /*first_position*/, std::span<const float> norms) {
  std::vector<float>& all = info_.layers[static_cast<std::size_t>(layer)].residual_norm;
  const std::span<const float> held = after_ != nullptr ? norms : norms.last(static_cast<std::size_t>(held_before()));
  all.insert(all.end(), held.begin(), held.end());
}

Matrix HeldRun::read(int layer, HeadTensor tensor, int head, Index first, Index count) const {
  Matrix rows(count, model_.config.head_dim);
  read_rows(layer, tensor, head, first, count, rows.data());
  return rows;
}

void HeldRun::read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const {
  const Index dim = model_.config.head_dim;
  const Layer& of = layers_[static_cast<std::size_t>(layer)];
  const bool is_key = tensor == HeadTensor::keys;
  if (is_key || tensor == HeadTensor::values) {
    const Index earlier = std::clamp<Index>(eviction_position_ - first, 0, count);
    if (earlier > 0) {
      const float* rows = is_key ? before_.keys(layer, head) : before_.values(layer, head);
      std::copy_n(rows + first * dim, earlier * dim, out);
    }
    if (earlier < count) {
      const float* rows = is_key ? after_->keys(layer, head) : after_->values(layer, head);
      std::copy_n(rows + (first + earlier - eviction_position_) * dim, (count - earlier) * dim, out + earlier * dim);
    }
    return;
  }
  for (Index row = 0; row < count; ++row) {
    const Index later = first + row - held_before();
    const float* from = nullptr;
    if (tensor == HeadTensor::outputs) {
      // Nobody asks for what is not evaluated, and nothing holds it.
      if (later < 0 || !parts_.outputs) throw Error(fmt::format("{}: these outputs are not held", name_));
      from = of.outputs_after.data() + later * query_width();
    } else {
      from = later < 0 ? of.queries_before.data() + (first + row) * query_width()
                       : of.queries_after.data() + later * query_width();
    }
    std::copy_n(from + head * dim, dim, out + row * dim);
  }
}

Matrix HeldRun::read_output_projection(int layer, int head) const {
  const Tensor& weight = model_.layers[static_cast<std::size_t>(layer)].output.weight;
  const Index dim = model_.config.head_dim;
  const auto element = static_cast<Index>(size_of(weight.type));
  Matrix columns(weight.rows(), dim);
  for (Index row = 0; row < weight.rows(); ++row) {
    to_float32(weight.type, weight.data + (row * weight.columns() + head * dim) * element,
               std::span(columns.data() + row * dim, static_cast<std::size_t>(dim)));
  }
  return columns;
}

void HeldRun::read_projection_rows(int layer, Index first_row, Index count, float* out) const {
  const Tensor& weight = model_.layers[static_cast<std::size_t>(layer)].output.weight;
  to_float32(weight.type, weight.data + first_row * weight.columns() * static_cast<Index>(size_of(weight.type)),
             std::span(out, static_cast<std::size_t>(count * weight.columns())));
}

std::vector<float> HeldRun::read_attention_mass(int layer, int head) const {
  const std::vector<float>& mass = layers_[static_cast<std::size_t>(layer)].mass;
  const auto first = mass.begin() + Index{head} * eviction_position_;
  return {first, first + eviction_position_};
}

}  // namespace kvreplay::tracer
