// A layer of a trace, as policies see it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "policy/decision.h"
#include "policy/head.h"
#include "replay/eviction.h"
#include "replay/layer_projection.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// Reads one (layer, KV head) of a trace on request, cut off at the eviction position: what stands behind it only
/// oracles can see. The reader must outlive it. Not for use by several threads at once.
class TraceHead : public HeadSource {
 public:
  /// `eviction.position` is in [1, T]. Takes projection factors from `projection`, where it is given and decomposed.
  TraceHead(const CapturedRun& trace, int layer, int kv_head, const Eviction& eviction,
            const LayerProjection* projection = nullptr);

  const HeadShape& shape() const override { return shape_; }
  const CachePositions& entries() const override { return entries_; }
  void read_keys(Index first, Index count, float* rows) const override;
  void read_values(Index first, Index count, float* rows) const override;
  std::span<const int> query_positions() const override { return query_positions_; }
  Matrix queries(int member, Index first, Index count) const override;
  bool has_output_projection() const override;
  Matrix output_projection(int member) const override;
  Matrix projection_factor(int member) const override;
  std::optional<std::vector<float>> attention_mass(int member) const override;
  std::span<const int> later_positions() const override { return later_; }
  Matrix later_queries(int member) const override;
  Matrix later_keys() const override;
  std::span<const int> evaluation_positions() const override { return evaluation_.positions; }
  Matrix evaluation_queries(int member) const override;
  Matrix evaluation_keys() const override;
  Matrix evaluation_values() const override;

 private:
  void read(HeadTensor tensor, Buffer& unpacked, Index first, Index count, float* rows) const;

  const CapturedRun& trace_;
  const LayerProjection* projection_;
  HeadShape shape_;
  CachePositions entries_;  // everything before the eviction
  std::span<const int> query_positions_;
  std::span<const int> later_;  // captured queries of the prompt from the eviction on
  EvaluationQueries evaluation_;
  mutable Buffer unpacked_keys_;  // [N, D] where parts of them cannot be read alone
  mutable Buffer unpacked_values_;
};

/// A layer of a trace, cut off at the eviction position.
class TraceLayer : public LayerSource {
 public:
  /// The reader must outlive it, and so must `projection`, which may be null and is decomposed before heads are used.
  /// So must what `surveys` show: of every setting those of the layers alike, or none at all.
  TraceLayer(const CapturedRun& trace, int layer, const Eviction& eviction, const LayerProjection* projection = nullptr,
             std::vector<std::span<const LayerSurvey>> surveys = {});

  const HeadShape& shape() const override { return shape_; }
  std::unique_ptr<HeadSource> head(int kv_head) const override;
  std::string name() const override { return trace_.name(); }
  std::span<const LayerSurvey> surveys(std::size_t setting, const Setting& of) const override;

  /// The most bytes that one of its heads takes beside what a policy asks of it.
  static Index memory_of_head(const CapturedRun& trace, int eviction_position);

 private:
  const CapturedRun& trace_;
  Eviction eviction_;
  const LayerProjection* projection_;
  std::vector<std::span<const LayerSurvey>> surveys_;
  HeadShape shape_;
};

/// The shape of a trace's head at an eviction position.
HeadShape head_shape(const TraceInfo& info, int layer, int kv_head, int eviction_position);

/// How many positions each layer holds at an eviction position: [L].
std::vector<int> held_positions(const TraceInfo& info, int eviction_position);

}  // namespace kvreplay
