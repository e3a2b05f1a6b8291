// The caches of a policy that evicts while a running model's tokens come.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "policy/decoding.h"
#include "replay/layer_projection.h"
#include "replay/residency.h"
#include "replay/trace_source.h"
#include "tracer/live/held_run.h"
#include "tracer/transformer.h"

namespace kvreplay::tracer {

/// One setting's caches of all layers: each begins with the prompt of a run, and decides over what the model computes
/// on what is left of it.
class DecodingCaches final : public TokenAttention {
 public:
  /// `run` has read its prompt, and `setting` has a schedule; both must outlive it, and so must `projections`, of every
  /// layer its factors or null. Surveys the prompt where the setting's budget does.
  DecodingCaches(const HeldRun& run, const Setting& setting,
                 std::span<const std::unique_ptr<LayerProjection>> projections);

  /// Evicts the prompt of a layer where it is due: before its first token. Layers may begin on different threads.
  /// Throws Error as LayerDecoding does.
  void begin(int layer);

  Index next_position() const override { return next_position_; }
  void advance() override { ++next_position_; }
  void attend(int layer, const float* keys, const float* values, const float* queries, float* outputs) override;

  /// How long each set kept its positions, layer-major.
  std::vector<Residency> take();

 private:
  struct Layer {
    std::vector<LayerSurvey> alike;  // surveys of the layers that hold as much
    std::unique_ptr<TraceLayer> prompt;
    std::unique_ptr<LayerDecoding> decoding;
  };

  const HeldRun& run_;
  const Setting& setting_;
  std::span<const std::unique_ptr<LayerProjection>> projections_;
  Index next_position_;
  std::vector<LayerSurvey> surveys_;  // [L], where the budget surveys
  std::vector<Layer> layers_;
};

}  // namespace kvreplay::tracer
