// Which positions the heads of a layer keep: steps 1 to 5 of every policy of a run.
#pragma once

#include <map>
#include <vector>

#include "base/error.h"
#include "replay/engine.h"
#include "replay/layer_projection.h"
#include "replay/rank_agreement.h"
#include "replay/setting.h"

namespace kvreplay {

/// The kept sets of a layer's settings, drawn head by head and then, where heads depend on each other, together; and
/// how far their scores agree with the oracle's importance, where that is asked for.
class LayerSelection {
 public:
  /// All must outlive it; `requirements` are those of the settings, `projection` may be null and is decomposed before
  /// heads are ranked. `combination_bytes`: what combinations of attention may take per KV head that is ranked at a
  /// time.
  LayerSelection(const TraceReader& trace, const std::vector<Setting>& settings,
                 const RankingRequirements& requirements, int layer, const Eviction& eviction,
                 const LayerProjection* projection, Index combination_bytes);

  /// Draws what one KV head can draw without the others. Heads may be drawn by different threads at once.
  void rank_head(int kv_head);

  /// Draws the kept sets of the setting `index` whose heads depend on each other, once all heads are ranked; does
  /// nothing for other settings. Settings may be drawn by different threads at once.
  void select_together(int index);

  /// The kept sets and rank agreement of every setting, once all of them are drawn.
  std::vector<LayerResult> take() { return std::move(results_); }

  /// The most bytes that rank_head() takes beside `combination_bytes`, and that one of these objects takes in all.
  static Index memory_of_head(const TraceReader& trace, const TraceReplay& outline,
                              const std::vector<Setting>& settings, const RankingRequirements& requirements);
  static Index memory_of_layer(const TraceReplay& outline, const std::vector<Setting>& settings);

  /// The most bytes that select_together() takes while it works on one setting.
  static Index memory_of_setting(const TraceReplay& outline, const std::vector<Setting>& settings);

  /// The fewest `combination_bytes` that every policy can work with, and the most that are of any use.
  static Index least_combination_bytes(const TraceReplay& outline, const RankingRequirements& requirements);
  static Index all_combination_bytes(const TraceReplay& outline, const RankingRequirements& requirements);

 private:
  // Scores of one KV head after step 3; a part is empty where nothing asks for it.
  struct HeadScores {
    Matrix query;   // [group, R]: every query head's own
    Matrix shared;  // [1, R]: what the group shares
  };

  // What the evaluation queries of one KV head's group attend to, as far as scores were compared with it.
  class Importance;

  std::size_t prepare(const Head& head, std::size_t first) const;
  void smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw, HeadScores& scores) const;
  void check_numbers(const Matrix& scores, const Ranking& ranking) const;
  void keep_all(std::size_t setting, int kv_head);
  void keep_pattern(std::size_t setting, const HeadShape& shape);
  void select_locally(std::size_t setting, int kv_head, const HeadScores& scores);
  void compare_ranks(std::size_t setting, int kv_head, const HeadScores& scores, Importance& importance);
  void copy_agreement(std::size_t setting, int kv_head);
  void put_agreement(std::size_t setting, int query_head, const RankCorrelation& agreement);
  bool is_compared(const Setting& setting) const;
  RankCorrelation agreement_of(const Setting& setting, const RankedValues& importance,
                               std::span<const float> scores) const;
  std::vector<int> allocate(const Setting& setting, const std::vector<HeadScores>& scores) const;
  std::vector<int> select_set(const Setting& setting, std::span<const float> scores, int capacity) const;
  std::vector<int> positions_of(std::vector<int> rows, bool may_be_empty) const;
  Error in_context(const Setting& setting, int kv_head, const Error& error) const;

  const TraceReader& trace_;
  const std::vector<Setting>& settings_;
  const RankingRequirements& requirements_;
  Eviction eviction_;
  HeadShape shape_;  // of the layer's first head
  int held_;         // rows
  const LayerProjection* projection_;
  Index combination_bytes_;
  const ModelInfo& model_;
  std::map<std::size_t, std::vector<HeadScores>> deferred_;  // [setting][KV head]: scores that wait for other heads
  std::map<Share, std::vector<Matrix>> importance_;  // [KV head]: what groups share, where the layer shares it on
  std::vector<LayerResult> results_;                 // [setting]
};

}  // namespace kvreplay
