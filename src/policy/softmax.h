// Attention weights from logits, one documented way for policies and measures.
#pragma once

#include "base/matrix.h"

namespace kvreplay {

/// Brings raw q·k products to logits, in place: scaled, and with `softcapping` c > 0 bent to c·tanh(x/c).
void scale_logits(Eigen::Ref<Matrix> logits, double softmax_scale, double softcapping);

/// Turns a row of logits into attention weights, in place. The query at `position` sees positions up to its own, the
/// last `sliding_window` of them where that is not 0; all others get exactly 0. The maximum is subtracted first;
/// exponentials are float32 and summed in float32, pairwise within vector lanes.
void causal_softmax(Eigen::Ref<Eigen::RowVectorXf> row, Index position, Index sliding_window);

/// The same for a row of which the query sees the columns [first, end): all others get exactly 0.
void softmax_within(Eigen::Ref<Eigen::RowVectorXf> row, Index first, Index end);

/// The first position that the query at `position` sees.
inline Index first_visible(Index position, Index sliding_window) {
  return sliding_window > 0 && position >= sliding_window ? position - sliding_window + 1 : 0;
}

}  // namespace kvreplay
