// Attention weights from products q·k, one documented way for all that does not work in blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/attention_rule.h"
#include "base/matrix.h"

namespace kvreplay {

/// What an Eigen expression consists of: float or double.
template <class Expression>
using ScalarOf = typename std::remove_cvref_t<Expression>::Scalar;

/// Brings products q·k to logits, in place: scaled, and with a cap c bent to c·tanh(x/c).
template <class Logits>
void scale_logits(Logits&& logits, const AttentionRule& rule) {
  logits *= static_cast<ScalarOf<Logits>>(rule.softmax_scale);
  if (rule.attn_logit_softcapping > 0) {
    const auto cap = static_cast<ScalarOf<Logits>>(rule.attn_logit_softcapping);
    logits = (logits.array() / cap).tanh() * cap;
  }
}

/// Replaces the elements [first, end) of a row of logits by exp(logit − m), m being the largest of them and of the
/// sink's; all others become exactly 0. Returns exp(sink − m), what the sink adds to the sum of the others: 0 for a
/// sink of −∞, which is none.
template <class Row>
ScalarOf<Row> exponentiate(Row&& row, Index first, Index end,
                           ScalarOf<Row> sink = -std::numeric_limits<ScalarOf<Row>>::infinity()) {
  if (end <= first) {
    row.setZero();
    return std::isfinite(sink) ? 1 : 0;
  }
  auto seen = row.segment(first, end - first);
  const ScalarOf<Row> largest = std::max(seen.maxCoeff(), sink);
  seen = (seen.array() - largest).exp();
  row.head(first).setZero();
  row.tail(row.size() - end).setZero();
  return std::exp(sink - largest);
}

/// Turns a row of logits into attention weights, in place: the softmax of the elements [first, end), exactly 0
/// elsewhere, and everywhere where there are none. Exponentials are summed in the row's own precision, pairwise within
/// vector lanes.
template <class Row>
void softmax(Row&& row, Index first, Index end, ScalarOf<Row> sink = -std::numeric_limits<ScalarOf<Row>>::infinity()) {
  const ScalarOf<Row> sink_weight = exponentiate(row, first, end, sink);
  if (end <= first) return;
  auto seen = row.segment(first, end - first);
  seen /= seen.sum() + sink_weight;
}

}  // namespace kvreplay
