// What eviction does to the output of one head: evicted attention against full attention for the evaluation queries.
#pragma once

#include <span>
#include <vector>

#include "base/buffer.h"
#include "policy/head.h"
#include "trace/reader.h"

namespace kvreplay {

/// The captured queries at or after an eviction position.
struct EvaluationQueries {
  Index first = 0;                 ///< index of the first among the trace's query_positions
  std::span<const int> positions;  ///< [E], ascending

  int count() const { return static_cast<int>(positions.size()); }
};

/// Those of a trace for an eviction position; none where no query was captured from there on.
EvaluationQueries evaluation_queries(const TraceInfo& info, int eviction_position);

/// How one query head fares with one kept set, per evaluation query: [E] each.
struct HeadMeasures {
  std::vector<float> head_error;        ///< ‖ô − o‖ / ‖o‖; where o is 0: 0 if ô is 0 too, else 1
  std::vector<float> attention_recall;  ///< full-cache attention mass on what is still cached
  std::vector<float> cosine;            ///< of ô and o; where one is 0: 1 if both are, else 0
};

/// Measures kept sets of one KV head. The cache of an evaluation query at position t is the kept set and all positions
/// from the eviction on, up to t. Logits and weighted values are summed in float32, over blocks of 512 positions the
/// latter; blocks, and sums of attention, in double. Sets that are equal are measured once.
class HeadEvaluation {
 public:
  /// Reads keys and values up to the last evaluation query. Throws Error as TraceReader::read does.
  HeadEvaluation(const TraceReader& trace, int layer, int kv_head, int eviction_position);

  /// Measures `kept_sets` for the group's query head `member`. `outputs` [E, D] receives the full output, `differences`
  /// (one [E, D] per kept set) what eviction adds to it: ô − o. Throws Error, naming the query, where attention leaves
  /// float32's range.
  std::vector<HeadMeasures> measure(int member, std::span<const std::vector<int>* const> kept_sets,
                                    Eigen::Ref<Matrix> outputs, std::span<Eigen::Ref<Matrix>> differences) const;

  /// The most bytes that an evaluation takes for `tokens` positions.
  static Index memory(const ModelInfo& model, Index tokens);

 private:
  // Queries that are measured together, and what the full cache is to them.
  struct Block;
  void attend(int member, Index first, Block& block) const;
  void sum_over(std::span<const int> positions, const Block& block, Block& sums) const;
  Eigen::RowVectorXd attend_directly(int member, Index query, std::span<const int> kept) const;

  const TraceReader& trace_;
  HeadShape shape_;
  EvaluationQueries queries_;
  Index tokens_;   // last evaluation position + 1
  Index width_;    // floats of a row of keys or values, zeros beyond the head dimension
  Buffer keys_;    // [tokens, width]
  Buffer values_;  // [tokens, width]
};

}  // namespace kvreplay
