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
  const Index first = first_visible(position, sliding_window);
  const Index count = std::min(position + 1, static_cast<Index>(row.size())) - first;
  auto visible = row.segment(first, count);
  visible = (visible.array() - visible.maxCoeff()).exp();
  visible /= visible.sum();
  row.head(first).setZero();
  row.tail(row.size() - first - count).setZero();
}

}  // namespace kvreplay
