// The measures as docs/measures.md defines them, in double and one query at a time.
#pragma once

#include <functional>
#include <vector>

#include "base/matrix.h"
#include "support/random_trace.h"

namespace kvreplay::test {

/// [H · E], [E], [H · E], [H · E] and, where the shape tells of the residual stream, [E].
struct DefinedMeasures {
  std::vector<double> head_error, layer_error, attention_recall, cosine, residual_error;
  std::vector<double> recurrence = {};       ///< [H · E]
  std::vector<Eigen::VectorXd> change = {};  ///< [E]: of what the layer adds to the residual stream
};

/// The positions that are still cached, ascending, when the query at `position` attends, itself included.
using CachedPositions = std::function<std::vector<int>(int query_head, int position)>;

/// Of one layer, over the captured queries from `evaluate_from` on. Of what is cached, queries see what their sliding
/// window lets them.
DefinedMeasures by_definition(const RandomTrace& shape, const RandomTrace::Tensors& tensors, int layer,
                              int evaluate_from, const CachedPositions& cached_positions);

}  // namespace kvreplay::test
