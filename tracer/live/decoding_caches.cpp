#include "tracer/live/decoding_caches.h"

#include <algorithm>
#include <numeric>

namespace kvreplay::tracer {

namespace {

// Of combinations of the window's attention that a head computes together.
constexpr Index kCombinationBytes = Index{64} << 20;

}  // namespace

DecodingCaches::DecodingCaches(const HeldRun& run, const Setting& setting,
                               std::span<const std::unique_ptr<LayerProjection>> projections)
    : run_(run),
      setting_(setting),
      projections_(projections),
      next_position_(run.eviction_position()),
      layers_(static_cast<std::size_t>(run.info().model.num_layers)) {}

void DecodingCaches::begin(int layer) {
  Layer& of = layers_[static_cast<std::size_t>(layer)];
  const Eviction eviction{run_.eviction_position(), run_.eviction_position()};
  of.prompt = std::make_unique<TraceLayer>(run_, layer, eviction, projections_[static_cast<std::size_t>(layer)].get());
  std::vector<int> heads(static_cast<std::size_t>(of.prompt->shape().num_kv_heads));
  std::iota(heads.begin(), heads.end(), 0);
  of.decoding =
      std::make_unique<LayerDecoding>(*of.prompt, std::span(&setting_, 1), std::move(heads), kCombinationBytes, true);
}

void DecodingCaches::attend(int layer, const float* keys, const float* values, const float* queries, float* outputs) {
  LayerDecoding& decoding = *layers_[static_cast<std::size_t>(layer)].decoding;
  decoding.step({.position = static_cast<int>(next_position_), .keys = keys, .values = values, .queries = queries});
  std::ranges::copy(decoding.output(0), outputs);
}

std::vector<Residency> DecodingCaches::take() {
  std::vector<Residency> sets;
  for (Layer& layer : layers_) {
    const std::vector<DecodedSetting> decoded = layer.decoding->take();
    for (const CacheHistory& history : decoded.front().sets) {
      sets.emplace_back(history.positions, history.until, run_.eviction_position(), history.from);
    }
  }
  return sets;
}

}  // namespace kvreplay::tracer
