#include "policy/softmax.h"

#include <algorithm>

namespace kvreplay {

void scale_logits(Eigen::Ref<Matrix> logits, double softmax_scale, double softcapping) {
  logits *= static_cast<float>(softmax_scale);
  if (softcapping > 0) {
    const auto cap = static_cast<float>(softcapping);
    logits = (logits.array() / cap).tanh() * cap;
  }
}

void causal_softmax(Eigen::Ref<Eigen::RowVectorXf> row, Index position, Index sliding_window) {
  softmax_within(row, first_visible(position, sliding_window), std::min<Index>(position + 1, row.size()));
}

void softmax_within(Eigen::Ref<Eigen::RowVectorXf> row, Index first, Index end) {
  end = std::max(first, end);
  if (end > first) {
    auto visible = row.segment(first, end - first);
    visible = (visible.array() - visible.maxCoeff()).exp();
    visible /= visible.sum();
  }
  row.head(first).setZero();
  row.tail(row.size() - end).setZero();
}

}  // namespace kvreplay
