// DropKV (kvpress #284 and #285, September 2026): what the window's outputs lose when a position goes, query by query.
//
// Without position j the output of query i moves by p_ij/(1 − p_ij) · (o_i − v_j), with p the softmax attention and
// o_i = Σ_j p_ij v_j. Squared and added up over the window of the last queries (issue 284):
//   s_j = Σ_i (p_ij / (1 − p_ij))² · ‖v_j − o_i‖²
// Lengths are taken before the output projection. 1 − p counts as `epsilon` where it is less, as in the pull request;
// it also pools scores over `kernel` positions, which the formula does not: kernel=1 is the formula.
#include <algorithm>

#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

class DropKV : public Ranking {
 public:
  DropKV(int window, int kernel, double epsilon)
      : window_(window), kernel_(kernel), epsilon_(static_cast<float>(epsilon)) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}, .combinations = queries()}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::fill(scores, 0.0f);
    for (const WindowCombination& query : queries()) {
      const CombinedAttention one = head.combined_attention(member, query);
      for (std::size_t j = 0; j < scores.size(); ++j) {
        const float p = one.attention[j];
        const float moved = p / std::max(1 - p, epsilon_) * one.distance[j];
        scores[j] += moved * moved;
      }
    }
  }

  void smooth(const Head& head, int /*member*/, int /*capacity*/, std::span<float> scores) const override {
    pool(Spatial::average, kernel_, before_window(head, scores, window_));
  }

 private:
  // Each query of the window alone, with its own output.
  std::vector<WindowCombination> queries() const {
    return each_query_alone(window_, WindowCombination::Distance::values, true);
  }

  int window_;
  int kernel_;
  float epsilon_;
};

const MethodRegistration dropkv([] {
  return Method{
      .name = "dropkv",
      .summary = "Keeps the positions whose removal alone would change the outputs of the window's queries most.",
      .source = "github.com/NVIDIA/kvpress, issue 284 and pull request 285",
      .parameters =
          {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
               .of(Parameter::Step::window),
           Parameter::odd_integer("kernel", 1, 1, "positions whose scores are averaged").of(Parameter::Step::space),
           Parameter::real("epsilon", 1e-6, 1e-30, 1, "the least that 1 - attention counts as")
               .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<DropKV>(a.integer("window"), a.integer("kernel"), a.real("epsilon"))};
          },
  };
});

}  // namespace
}  // namespace kvreplay
