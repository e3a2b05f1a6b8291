#include "replay/trace_source.h"

#include <algorithm>
#include <utility>

namespace kvreplay {
namespace {

// A trace that brings no tables is taken to have turned all dimensions at the plain frequencies of its base.
std::shared_ptr<const RotaryTable> rotary_of(const TraceInfo& info, const LayerInfo& layer) {
  if (const RotaryTable* const table = info.rotary_of(layer)) return std::make_shared<const RotaryTable>(*table);
  if (!info.rotary.empty() || info.model.rope_theta <= 0) return nullptr;
  return std::make_shared<const RotaryTable>(RotaryTable::plain(info.model.rope_theta, layer.key_dim));
}

}  // namespace

HeadShape head_shape(const TraceInfo& info, int layer, int kv_head, int eviction_position) {
  const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
  const std::vector<int> held = held_positions(info, eviction_position);
  const auto own = held.begin() + layer;
  return {
      .layer = layer,
      .num_layers = info.model.num_layers,
      .layer_among_alike = static_cast<int>(std::count(held.begin(), own, *own)),
      .layers_alike = static_cast<int>(std::ranges::count(held, *own)),
      .kv_head = kv_head,
      .num_kv_heads = of.num_key_value_heads,
      .group_size = of.group_size(),
      .head_dim = of.key_dim,
      .prompt_length = info.prompt_length,
      .next_position = eviction_position,
      .positions = {eviction_position - *own, *own},
      .rotary = rotary_of(info, of),
      .rule = of.rule,
  };
}

std::vector<int> held_positions(const TraceInfo& info, int eviction_position) {
  std::vector<int> held;
  for (const LayerInfo& layer : info.layers) {
    held.push_back(eviction_position - first_held_position(eviction_position, layer.rule));
  }
  return held;
}

TraceLayer::TraceLayer(const CapturedRun& trace, int layer, const Eviction& eviction, const LayerProjection* projection,
                       std::vector<std::span<const LayerSurvey>> surveys)
    : trace_(trace),
      eviction_(eviction),
      projection_(projection),
      surveys_(std::move(surveys)),
      shape_(head_shape(trace.info(), layer, 0, eviction.position)) {}

std::unique_ptr<HeadSource> TraceLayer::head(int kv_head) const {
  return std::make_unique<TraceHead>(trace_, shape_.layer, kv_head, eviction_, projection_);
}

std::span<const LayerSurvey> TraceLayer::surveys(std::size_t setting, const Setting& of) const {
  return surveys_.empty() ? LayerSource::surveys(setting, of) : surveys_[setting];
}

Index TraceLayer::memory_of_head(const CapturedRun& trace, int eviction_position) {
  // Unpacked tensors are kept whole, beside them one as it is stored and as it is unpacked.
  if (trace.reads_directly(0, HeadTensor::keys) && trace.reads_directly(0, HeadTensor::values)) return 0;
  return 4 * Index{eviction_position} * trace.info().model.head_dim * static_cast<Index>(sizeof(float));
}

TraceHead::TraceHead(const CapturedRun& trace, int layer, int kv_head, const Eviction& eviction,
                     const LayerProjection* projection)
    : trace_(trace),
      projection_(projection),
      shape_(head_shape(trace.info(), layer, kv_head, eviction.position)),
      entries_(0, eviction.position),
      evaluation_(kvreplay::evaluation_queries(trace.info(), eviction)) {
  const std::span<const int> positions = trace.info().query_positions;
  const auto before = std::ranges::lower_bound(positions, eviction.position) - positions.begin();
  query_positions_ = positions.first(static_cast<std::size_t>(before));
  const auto end = std::ranges::lower_bound(positions, trace.info().prompt_length) - positions.begin();
  if (end > before)
    later_ = positions.subspan(static_cast<std::size_t>(before), static_cast<std::size_t>(end - before));
}

void TraceHead::read_keys(Index first, Index count, float* rows) const {
  read(HeadTensor::keys, unpacked_keys_, first, count, rows);
}

void TraceHead::read_values(Index first, Index count, float* rows) const {
  read(HeadTensor::values, unpacked_values_, first, count, rows);
}

void TraceHead::read(HeadTensor tensor, Buffer& unpacked, Index first, Index count, float* rows) const {
  if (trace_.reads_directly(shape_.layer, tensor)) {
    trace_.read_rows(shape_.layer, tensor, shape_.kv_head, first, count, rows);
    return;
  }
  if (unpacked.size() == 0) {
    unpacked = Buffer(Index{shape_.next_position} * shape_.head_dim);
    trace_.read_rows(shape_.layer, tensor, shape_.kv_head, 0, shape_.next_position, unpacked.data());
  }
  std::copy_n(unpacked.data() + first * shape_.head_dim, count * shape_.head_dim, rows);
}

Matrix TraceHead::queries(int member, Index first, Index count) const {
  return trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member), first, count);
}

Matrix TraceHead::later_queries(int member) const {
  return trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member),
                     static_cast<Index>(query_positions_.size()), static_cast<Index>(later_.size()));
}

Matrix TraceHead::later_keys() const {
  return trace_.read(shape_.layer, HeadTensor::keys, shape_.kv_head, shape_.next_position,
                     shape_.prompt_length - shape_.next_position);
}

Matrix TraceHead::evaluation_queries(int member) const {
  return trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member), evaluation_.first,
                     evaluation_.count());
}

Matrix TraceHead::evaluation_keys() const {
  return trace_.read(shape_.layer, HeadTensor::keys, shape_.kv_head, 0, evaluation_.positions.back() + 1);
}

Matrix TraceHead::evaluation_values() const {
  return trace_.read(shape_.layer, HeadTensor::values, shape_.kv_head, 0, evaluation_.positions.back() + 1);
}

bool TraceHead::has_output_projection() const { return trace_.has_output_projection(shape_.layer); }

Matrix TraceHead::output_projection(int member) const {
  return trace_.read_output_projection(shape_.layer, shape_.query_head(member));
}

Matrix TraceHead::projection_factor(int member) const {
  return projection_ != nullptr ? projection_->factor(shape_.query_head(member))
                                : HeadSource::projection_factor(member);
}

std::optional<std::vector<float>> TraceHead::attention_mass(int member) const {
  // The recorded mass sums over all prompt queries; it answers for no earlier eviction.
  if (shape_.next_position != trace_.info().prompt_length || !trace_.has_attention_mass(shape_.layer)) {
    return std::nullopt;
  }
  return trace_.read_attention_mass(shape_.layer, shape_.query_head(member));
}

}  // namespace kvreplay
