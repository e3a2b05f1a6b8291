// Which positions the heads of a layer keep: steps 1 to 5 of every policy of a run.
#pragma once

#include <vector>

#include "base/error.h"
#include "replay/engine.h"
#include "replay/layer_projection.h"
#include "replay/setting.h"

namespace kvreplay {

/// The kept sets of a layer's settings, drawn head by head and then, where heads depend on each other, together.
class LayerSelection {
 public:
  /// All must outlive it; `projection` may be null and is decomposed before heads are ranked. `combination_bytes`: what
  /// combinations of attention may take per KV head that is ranked at a time.
  LayerSelection(const TraceReader& trace, const std::vector<Setting>& settings, int layer, int eviction_position,
                 const LayerProjection* projection, Index combination_bytes);

  /// Draws what one KV head can draw without the others. Heads may be drawn by different threads at once.
  void rank_head(int kv_head);

  /// Draws the kept sets of the setting `index` whose heads depend on each other, once all heads are ranked; does
  /// nothing for other settings. Settings may be drawn by different threads at once.
  void select_together(int index);

  /// The kept sets of every setting, once all of them are drawn.
  std::vector<LayerSets> take() { return std::move(kept_); }

  /// The most bytes that rank_head() takes beside `combination_bytes`, and that one of these objects takes in all.
  static Index memory_of_head(const TraceReader& trace, const TraceReplay& outline,
                              const std::vector<Setting>& settings);
  static Index memory_of_layer(const TraceReplay& outline, const std::vector<Setting>& settings);

  /// The fewest `combination_bytes` that every policy can work with.
  static Index least_combination_bytes(const TraceReplay& outline, const std::vector<Setting>& settings);

 private:
  // Scores of one KV head after step 3; a part is empty where nothing asks for it.
  struct HeadScores {
    Matrix query;   // [group, P]: every query head's own
    Matrix shared;  // [1, P]: what the group shares
  };

  std::size_t prepare(const Head& head, std::size_t first) const;
  void smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw, HeadScores& scores) const;
  void check_numbers(const Matrix& scores, Protection protection) const;
  void keep_all(std::size_t setting, int kv_head);
  void keep_pattern(std::size_t setting, const HeadShape& shape);
  void select_locally(std::size_t setting, int kv_head, const HeadScores& scores);
  std::vector<int> allocate(const Setting& setting, const std::vector<HeadScores>& scores) const;
  std::vector<int> select_set(const Setting& setting, std::span<const float> scores, int capacity) const;
  std::vector<int> checked(std::vector<int> kept) const;
  Error in_context(const Setting& setting, int kv_head, const Error& error) const;

  const TraceReader& trace_;
  const std::vector<Setting>& settings_;
  int layer_;
  int prompt_;
  const LayerProjection* projection_;
  Index combination_bytes_;
  const ModelInfo& model_;
  std::vector<std::vector<HeadScores>> deferred_;  // [setting][KV head]: scores that wait for the other heads
  std::vector<LayerSets> kept_;                    // [setting]
};

}  // namespace kvreplay
