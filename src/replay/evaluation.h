// What eviction does to the output of one head: evicted attention against full attention for the evaluation queries.
#pragma once

#include <span>
#include <vector>

#include "base/buffer.h"
#include "policy/head.h"
#include "replay/eviction.h"
#include "replay/measure.h"
#include "replay/residency.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// Measures what is left of one KV head's cache. An evaluation query at position t sees what Residency says: after one
/// eviction the kept set and all positions from the eviction on, up to t. Logits and weighted values are summed in
/// float32, over blocks of 512 positions the latter; blocks, and sums of attention, in double. Sets that are equal are
/// measured once.
class HeadEvaluation {
 public:
  /// The reader must outlive it.
  HeadEvaluation(const CapturedRun& trace, int layer, int kv_head, const Eviction& eviction);

  /// Measures `residencies` ([member][set], as many for each query head of the group). `outputs` [E, group · D]
  /// receives the full output of the query heads side by side, `differences` (one [E, group · D] per set) what eviction
  /// adds to it: ô − o; and `numbers` (one per set) this head's part of the measures per head and query, whose
  /// vectors hold the layer's [H, E]. Reads keys and values up to the last evaluation query; throws Error as
  /// CapturedRun::read does, and, naming the query, where attention leaves float32's range.
  /// `steps`: of each set what measures over time are calculated from, but for what is evicted, [H, E] of the layer
  /// like the numbers, or null where nobody asks.
  /// `given`: of each set ô of the whole layer from the eviction position on, [steps, H · D], where it does not
  /// follow from the residency, or null.
  void measure(std::span<const std::vector<const Residency*>> residencies, std::span<const Matrix* const> given,
               Eigen::Ref<Matrix> outputs, std::span<Eigen::Ref<Matrix>> differences, std::span<LayerNumbers> numbers,
               std::span<std::vector<StepOutcome>* const> steps) const;

  /// The most bytes that measuring takes for `tokens` positions; `over_time`: also what `steps` are.
  static Index memory(const ModelInfo& model, Index tokens, bool over_time = false);

 private:
  struct Attention;
  struct Sums;
  class MostAttended;
  void attend(Attention& attention, Buffer& values, std::vector<Sums>& before, std::vector<Sums>& after) const;
  void add(std::span<const int> positions, std::span<const int> until, std::span<const Residency::Gap> gaps, int member,
           const Attention& attention, const Buffer& values, Sums& sums) const;
  bool add_residents(const Residency& residency, int member, const Attention& attention, const Buffer& values,
                     Sums& kept, Sums& since) const;
  void count_top(const Residency& residency, int member, const Attention& attention, MostAttended& most_attended,
                 std::span<StepOutcome> steps) const;
  void add_range(Index count, const Attention& attention, const float* weights, Index step, const float* rows,
                 Sums& sums) const;
  Eigen::RowVectorXd attend_directly(int query_head, Index query, const Residency& residency,
                                     const Buffer& values) const;

  const CapturedRun& trace_;
  HeadShape shape_;
  EvaluationQueries queries_;
  Index tokens_;  // last evaluation position + 1
  Index width_;   // floats of a row of keys or values, zeros beyond the head dimension
};

}  // namespace kvreplay
