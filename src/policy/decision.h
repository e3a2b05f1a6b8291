// Which positions the heads of a layer keep at one eviction: scores, sharing, budget, selection. It knows no trace: in
// replay one stands behind the layer, in a live run the model's cache can. Settings with a schedule are left to
// LayerDecoding.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "policy/head.h"
#include "policy/setting.h"

namespace kvreplay {

/// Delivers the heads of one layer.
class LayerSource {
 public:
  virtual ~LayerSource() = default;

  /// Of the first KV head; the others differ in kv_head alone.
  virtual const HeadShape& shape() const = 0;

  /// Heads may be asked for, and used, by different threads at once; a head is for one of them. Lives no longer than
  /// this.
  virtual std::unique_ptr<HeadSource> head(int kv_head) const = 0;

  /// Where the layer is from, as messages begin: "run.h5".
  virtual std::string name() const = 0;

  /// What LayerDecision::survey_head() gave for the heads of every layer alike and the setting `setting`. A source that
  /// surveys no layers refuses, naming the budget.
  virtual std::span<const LayerSurvey> surveys(std::size_t setting, const Setting& of) const;
};

/// Scores of one KV head after step 3; a part is empty where nothing asks for it.
struct HeadScores {
  Matrix query;   ///< [group, R]: every query head's own
  Matrix shared;  ///< [1, R]: what the group shares
};

/// Step 3: what the heads behind `rows` [heads, R] share, [1, R]. Rows are taken in their order.
void combine(const Matrix& rows, Share share, Matrix& shared);

/// Row `row` of a matrix.
inline std::span<const float> row_of(const Matrix& matrix, Index row) {
  return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
}
inline std::span<float> row_of(Matrix& matrix, Index row) {
  return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
}

/// Looks at scores while they are there: scores of all positions are too many to be kept.
class ScoreObserver {
 public:
  virtual ~ScoreObserver() = default;

  /// A KV head is about to be ranked, and has been. Different heads may be by different threads at once.
  virtual void begin_head(const Head& head) = 0;
  virtual void end_head(const Head& head) = 0;

  /// The scores by which the setting `setting` chooses in this KV head; not asked of settings that share over the
  /// layer. `as_before`: they are those of the setting before.
  virtual void head_scored(std::size_t setting, const Head& head, const HeadScores& scores, bool as_before) = 0;

  /// The scores [R] by which a setting that shares over the layer chooses.
  virtual void layer_scored(std::size_t setting, std::span<const float> scores) = 0;
};

/// The kept sets of a layer's settings, drawn head by head and then, where heads depend on each other, together.
class LayerDecision {
 public:
  /// All must outlive it; `requirements` are those of the settings. `combination_bytes`: what combinations of attention
  /// may take per KV head that is ranked at a time. `observer` may be null.
  LayerDecision(const LayerSource& layer, std::span<const Setting> settings, const RankingRequirements& requirements,
                Index combination_bytes, ScoreObserver* observer = nullptr);

  /// What the budget of every setting finds out about one KV head, before any layer is divided; nothing for settings
  /// whose budget does not survey. Heads may be surveyed by different threads at once. Throws Error as
  /// decide_head() does.
  std::vector<std::vector<float>> survey_head(int kv_head) const;

  /// Draws what one KV head can draw without the others. Heads may be drawn by different threads at once. Throws Error,
  /// naming layer, policy and head, where one is not as its method needs it.
  void decide_head(int kv_head);

  /// Draws the kept sets of the setting `index` whose heads depend on each other, once all heads are ranked; does
  /// nothing for other settings. Settings may be drawn by different threads at once.
  void decide_together(int index);

  /// The kept sets of every setting, once all of them are drawn.
  std::vector<LayerSets> take() { return std::move(kept_); }

  /// The most bytes that decide_head() takes for scores, beside `combination_bytes` and what the source itself takes,
  /// in a head of this shape whose model has `hidden_size` channels and whose evaluation looks at `tokens` keys.
  static Index memory_of_head(const HeadShape& shape, const RankingRequirements& requirements, int hidden_size,
                              Index tokens);

  /// The most bytes that one of these objects takes in all.
  static Index memory_of_layer(const HeadShape& shape, std::span<const Setting> settings);

  /// The most bytes that decide_together() takes while it works on one setting.
  static Index memory_of_setting(const HeadShape& shape, std::span<const Setting> settings);

  /// The fewest `combination_bytes` that every policy can work with, and the most that are of any use.
  static Index least_combination_bytes(const HeadShape& shape, const RankingRequirements& requirements);
  static Index all_combination_bytes(const HeadShape& shape, const RankingRequirements& requirements);

 private:
  std::size_t prepare(const Head& head, std::size_t first) const;
  void smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw, HeadScores& scores) const;
  void check_numbers(const Matrix& scores, const Ranking& ranking, const HeadShape& shape) const;
  void keep_all(std::size_t setting, const HeadShape& shape);
  void keep_pattern(std::size_t setting, const HeadSource& head);
  void choose_locally(std::size_t setting, const HeadShape& shape, const HeadScores& scores);
  std::vector<int> allocate(std::size_t setting, const std::vector<HeadScores>& scores) const;
  std::vector<int> choose(const Setting& setting, const HeadShape& shape, std::span<const float> scores,
                          int capacity) const;
  static std::vector<int> positions_of(std::vector<int> rows, const HeadShape& shape, bool may_be_empty);
  Error in_context(const Setting& setting, int kv_head, const Error& error) const;

  const LayerSource& layer_;
  std::span<const Setting> settings_;
  const RankingRequirements& requirements_;
  const HeadShape& shape_;              // of the layer's first head
  int held_;                            // rows
  std::vector<HeadShape> head_shapes_;  // [KV head], once it is ranked: heads of an evicted cache hold unequal rows
  Index combination_bytes_;
  ScoreObserver* observer_;
  std::map<std::size_t, std::vector<HeadScores>> deferred_;  // [setting][KV head]: scores that wait for other heads
  std::vector<LayerSets> kept_;                              // [setting]
};

}  // namespace kvreplay
