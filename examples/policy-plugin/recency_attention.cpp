// Recency-weighted attention: what is attended to, and the rather the younger it is.
//
// Score of position n of a prompt of P: a[n] · 2^(−(P − 1 − n) / half_life), where a is the mean attention of the last
// `window` queries. A half-life far beyond the prompt leaves SnapKV's score before pooling, a short one the most recent
// positions.
#include <algorithm>
#include <cmath>

#include "policy/plugin.h"

namespace kvreplay {
namespace {

class RecencyAttention : public Ranking {
 public:
  RecencyAttention(int window, double half_life) : window_(window), half_life_(half_life) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}, .combinations = {mean()}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.combined_attention(member, mean()).attention, scores.begin());
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const auto age = static_cast<double>(scores.size() - 1 - n);
      scores[n] *= static_cast<float>(std::exp2(-age / half_life_));
    }
  }

 private:
  // Every query of the window counts alike.
  WindowCombination mean() const {
    return {.weights = std::vector<float>(static_cast<std::size_t>(window_), 1.0f / static_cast<float>(window_))};
  }

  int window_;
  double half_life_;
};

const MethodRegistration recency_attention([] {
  return Method{
      .name = "recency-attention",
      .summary = "Keeps what the observation window attends to, weighted by how recent it is.",
      .source = "examples/policy-plugin",
      .parameters = {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::real("half_life", 1000, 1e-3, 1e12, "age at which attention counts half, in positions")
                         .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<RecencyAttention>(a.integer("window"), a.real("half_life"))};
          },
  };
});

}  // namespace
}  // namespace kvreplay
