// A run that is held in memory: what a live run decides over and measures, as replays do over a trace.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "trace/captured_run.h"
#include "tracer/kv_cache.h"
#include "tracer/transformer.h"

namespace kvreplay::tracer {

/// What of a run is held beside its keys and values.
struct HeldParts {
  Index prompt_queries = 0;     ///< the last so many queries before the eviction
  bool attention_mass = false;  ///< what each position received from all queries before the eviction
  bool outputs = true;          ///< of the queries after the eviction
};

/// A run of `first` tokens, at whose end a cache is evicted, and of those that come after: watched in two passes of the
/// model, of which the second one runs on a cache that shares everything that the first one left.
class HeldRun final : public CapturedRun, public ForwardObserver {
 public:
  /// `info` is of the tokens before the eviction at `eviction_position` and says nothing of queries; its prompt may be
  /// longer. The model must outlive it.
  HeldRun(const Model& model, TraceInfo info, int eviction_position, std::string name, std::string digest,
          const HeldParts& parts);

  /// What the first pass runs on: room for the tokens before the eviction.
  KvCache& before() { return before_; }
  const KvCache& before() const { return before_; }

  /// Between the passes: `ids` and their texts, or none, come after. What the second pass runs on.
  KvCache& follow_with(std::span<const std::int32_t> ids, const std::vector<std::string>& pieces);

  int eviction_position() const { return eviction_position_; }

  /// Tokens after the eviction.
  Index later() const { return info_.num_tokens() - eviction_position_; }

  /// The positions of everything that layers hold at the eviction, one set per KV head, layer-major.
  std::vector<std::vector<int>> everything() const;

  bool wants_attention_mass() const override { return parts_.attention_mass && after_ == nullptr; }
  bool wants_residual_norms() const override { return true; }
  void on_attention(const LayerAttention& attention, KvCache& cache) override;
  void on_residual(int layer, Index first_position, std::span<const float> norms) override;

  std::string name() const override { return name_; }
  std::string digest() const override { return digest_; }
  const TraceInfo& info() const override { return info_; }
  Matrix read(int layer, HeadTensor tensor, int head, Index first, Index count) const override;
  void read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const override;
  void prefetch(int /*layer*/, HeadTensor /*tensor*/, int /*head*/) const override {}
  bool reads_directly(int /*layer*/, HeadTensor /*tensor*/) const override { return true; }
  bool reads_projection_directly(int /*layer*/) const override { return true; }
  DType element_type() const override { return DType::float32; }
  bool has_output_projection(int /*layer*/) const override { return true; }
  Matrix read_output_projection(int layer, int head) const override;
  void read_projection_rows(int layer, Index first_row, Index count, float* out) const override;
  bool has_attention_mass(int /*layer*/) const override { return parts_.attention_mass; }
  std::vector<float> read_attention_mass(int layer, int head) const override;

 private:
  // What one layer's attention saw and produced.
  struct Layer {
    Buffer queries_before;    // [held queries before the eviction, H·D]
    Buffer queries_after;     // [later, H·D]
    Buffer outputs_after;     // the same
    std::vector<float> mass;  // [H, eviction position], or empty
  };

  Index held_before() const { return parts_.prompt_queries; }
  Index query_width() const { return Index{model_.config.num_attention_heads} * model_.config.head_dim; }

  const Model& model_;
  TraceInfo info_;
  int eviction_position_;
  std::string name_;
  std::string digest_;
  HeldParts parts_;
  KvCache before_;
  std::unique_ptr<KvCache> after_;
  std::vector<Layer> layers_;
};

}  // namespace kvreplay::tracer
