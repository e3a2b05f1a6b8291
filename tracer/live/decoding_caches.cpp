#include "tracer/live/decoding_caches.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace kvreplay::tracer {

namespace {

// Of combinations of the window's attention that a head computes together.
constexpr Index kCombinationBytes = Index{64} << 20;

LayerSurvey survey_of(const TraceLayer& layer, const Setting& setting) {
  const std::span<const Setting> one(&setting, 1);
  const RankingRequirements requirements(one, layer.shape().rows());
  const LayerDecision decision(layer, one, requirements, kCombinationBytes);
  LayerSurvey survey;
  for (int head = 0; head < layer.shape().num_kv_heads; ++head) {
    survey.push_back(std::move(decision.survey_head(head).front()));
  }
  return survey;
}

}  // namespace

DecodingCaches::DecodingCaches(const HeldRun& run, const Setting& setting,
                               std::span<const std::unique_ptr<LayerProjection>> projections)
    : run_(run),
      setting_(setting),
      projections_(projections),
      next_position_(run.eviction_position()),
      layers_(static_cast<std::size_t>(run.info().model.num_layers)) {
  if (!setting.policy->budget || !setting.policy->budget->surveys()) return;
  const Eviction eviction{run.eviction_position(), run.eviction_position()};
  for (int layer = 0; layer < run.info().model.num_layers; ++layer) {
    surveys_.push_back(
        survey_of(TraceLayer(run, layer, eviction, projections[static_cast<std::size_t>(layer)].get()), setting));
  }
}

void DecodingCaches::begin(int layer) {
  Layer& of = layers_[static_cast<std::size_t>(layer)];
  const Eviction eviction{run_.eviction_position(), run_.eviction_position()};
  std::vector<std::span<const LayerSurvey>> surveys;
  if (!surveys_.empty()) {
    const std::vector<int> held = held_positions(run_.info(), eviction.position);
    for (std::size_t other = 0; other < held.size(); ++other) {
      if (held[other] == held[static_cast<std::size_t>(layer)]) of.alike.push_back(surveys_[other]);
    }
    surveys.emplace_back(of.alike);
  }
  of.prompt = std::make_unique<TraceLayer>(run_, layer, eviction, projections_[static_cast<std::size_t>(layer)].get(),
                                           std::move(surveys));
  std::vector<int> heads(static_cast<std::size_t>(of.prompt->shape().num_kv_heads));
  std::iota(heads.begin(), heads.end(), 0);
  of.decoding = std::make_unique<LayerDecoding>(*of.prompt, std::span(&setting_, 1), std::move(heads),
                                                kCombinationBytes, LayerDecoding::Outputs::newest);
}

void DecodingCaches::attend(int layer, const float* keys, const float* values, const float* queries, float* outputs) {
  LayerDecoding& decoding = *layers_[static_cast<std::size_t>(layer)].decoding;
  decoding.step(
      {.position = static_cast<int>(next_position_),
       .keys = keys,
       .values = values,
       .queries = queries,
       .ends_turn = std::ranges::binary_search(run_.info().turn_starts, static_cast<int>(next_position_) + 1)});
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
