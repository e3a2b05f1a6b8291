// How far the scores of a layer's policies agree with what the evaluation queries attend to.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "policy/decision.h"
#include "replay/measure.h"
#include "replay/rank_agreement.h"

namespace kvreplay {

/// Compares scores with the oracle's importance, over the rows that a policy ranks: head by head, or for the whole
/// layer where it shares one set.
class LayerRankAgreement : public ScoreObserver {
 public:
  /// `is_compared`: of every setting, whether it is asked for. The settings must outlive it; `shape` is of the layer's
  /// first head.
  LayerRankAgreement(std::span<const Setting> settings, std::vector<bool> is_compared, const HeadShape& shape);
  ~LayerRankAgreement() override;

  void begin_head(const Head& head) override;
  void end_head(const Head& head) override;
  void head_scored(std::size_t setting, const Head& head, const HeadScores& scores, bool as_before) override;
  void layer_scored(std::size_t setting, std::span<const float> scores) override;

  /// Of every setting the measures of rank agreement: [H] where it is compared, NaN where the layer has no ranks.
  std::vector<LayerNumbers> take() { return std::move(numbers_); }

  /// The most bytes that it takes per head that is ranked, for the layer, and for a setting that shares over the layer.
  /// `tokens`: keys that the evaluation looks at.
  static Index memory_of_head(const HeadShape& shape, Index tokens);
  static Index memory_of_layer(const HeadShape& shape, std::span<const Setting> settings);
  static Index memory_of_setting(const HeadShape& shape);

 private:
  // What the evaluation queries of one KV head's group attend to, as far as scores were compared with it.
  class Importance;

  RankCorrelation agreement_of(std::size_t setting, const RankedValues& importance,
                               std::span<const float> scores) const;
  void put(std::size_t setting, int query_head, const RankCorrelation& agreement);

  std::span<const Setting> settings_;
  std::vector<bool> is_compared_;
  HeadShape shape_;
  std::vector<std::unique_ptr<Importance>> heads_;   // [KV head], while it is ranked
  std::map<Share, std::vector<Matrix>> importance_;  // [KV head]: what groups share, where the layer shares it on
  std::vector<LayerNumbers> numbers_;                // [setting]: [H]
};

}  // namespace kvreplay
