// LagKV (arXiv 2504.04704): a chunk is judged by the chunk that follows it.
//
// After `sinks` positions the prompt is cut into chunks of `lag`. Keys of a chunk are scaled channel by channel by the
// range that the next chunk's keys span; a position's spread is the standard deviation over its scaled channels, and a
// softmax over the chunk makes it comparable. Values likewise; the score is the mean of both (paper, section 3). As
// kvpress does, only the rank within the chunk counts. Sinks are always kept. The last whole chunk and what follows it,
// which nothing judges, come before all others.
//
// Where the capacity does not hold all of this tail, its later positions go before its earlier ones (kvpress leaves
// that tie to chance, and can lose sinks with it): that is streamingllm, and so is every capacity on a prompt shorter
// than sinks + 2·lag. A channel whose range is 0 counts as 0. Of sinks that a sliding window has dropped nothing is
// kept, and chunks begin with the first position held.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/softmax.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

class LagKV : public Ranking {
 public:
  LagKV(int sinks, int lag) : sinks_(sinks), lag_(lag) {}

  Protection protection() const override { return {.sinks = sinks_}; }
  int unscored(const HeadShape& shape) const override { return shape.rows() - judged_of(shape); }

  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    const int prompt = head.rows();
    const int sinks = head.shape().held_of_first(sinks_);
    const int judged = judged_of(head.shape());
    // The tail first; ranks within chunks lie below 1. Without such ranks the scores after the sinks are those of
    // kvpress.
    const int reference = judged == 0 ? sinks : 0;
    const float lowest = judged == 0 ? 0.0f : 1.0f;
    for (int n = 0; n < prompt; ++n) {
      scores[static_cast<std::size_t>(n)] =
          n < sinks ? 3.0f : lowest + static_cast<float>(n - reference) / static_cast<float>(prompt - reference);
    }
    for (int first = sinks; first < sinks + judged; first += lag_) {
      const Eigen::VectorXf key = spread(head.keys(), first);
      const Eigen::VectorXf value = spread(head.values(), first);
      std::vector<int> order(static_cast<std::size_t>(lag_));
      std::iota(order.begin(), order.end(), 0);
      std::ranges::stable_sort(order, [&](int a, int b) { return key(a) + value(a) < key(b) + value(b); });
      for (int rank = 0; rank < lag_; ++rank) {
        scores[static_cast<std::size_t>(first + order[static_cast<std::size_t>(rank)])] =
            static_cast<float>(rank) / static_cast<float>(lag_);
      }
    }
  }

 private:
  // How many rows a following chunk judges.
  int judged_of(const HeadShape& shape) const {
    return std::max(0, (shape.rows() - shape.held_of_first(sinks_)) / lag_ - 1) * lag_;
  }

  // Softmax over the chunk at `first` of each position's spread over channels: [lag].
  Eigen::VectorXf spread(const Matrix& states, int first) const {
    const auto next = states.middleRows(first + lag_, lag_);
    const Eigen::RowVectorXf low = next.colwise().minCoeff();
    const Eigen::RowVectorXf range = next.colwise().maxCoeff() - low;
    Eigen::VectorXf deviation(lag_);
    const auto channels = static_cast<float>(states.cols());
    for (int n = 0; n < lag_; ++n) {
      Eigen::RowVectorXf scaled = states.row(first + n) - low;
      for (Index i = 0; i < scaled.size(); ++i) scaled(i) = range(i) > 0 ? scaled(i) / range(i) : 0;
      const float mean = scaled.sum() / channels;
      deviation(n) = std::sqrt((scaled.array() - mean).square().sum() / std::max(channels - 1, 1.0f));
    }
    softmax(deviation, 0, lag_);
    return deviation;
  }

  int sinks_;
  int lag_;
};

const MethodRegistration lagkv([] {
  return Method{
      .name = "lagkv",
      .summary = "Keeps positions whose keys and values stand out when scaled by the chunk that follows them.",
      .source = "arXiv 2504.04704, section 3",
      .parameters = {Parameter::integer("sinks", 4, 0, "first positions, always kept").of(Parameter::Step::protection),
                     Parameter::integer("lag", 128, 1, "positions per chunk").of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<LagKV>(a.integer("sinks"), a.integer("lag"))};
          },
  };
});

}  // namespace
}  // namespace kvreplay
