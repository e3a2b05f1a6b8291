// Plain attention over the observation window: the indicators that ReST-KV's ablation compares with (arXiv 2605.08840,
// section on ablations).
//
// Score of position n: the window's attention, smoothed in time and in space; with values=true times ‖v_n‖, before the
// spatial smoothing. With the defaults it is SnapKV's score.
#include <algorithm>

#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

struct AttentionParameters {
  int window;
  Temporal temporal;
  double alpha;
  Spatial spatial;
  int kernel;
  double beta;
  bool values;
};

class Attention : public Ranking {
 public:
  explicit Attention(AttentionParameters parameters) : p_(parameters) {}

  Protection protection() const override { return {.window = p_.window}; }
  Requirements requirements() const override {
    Requirements requirements{.needs = {Need::window(p_.window)}, .combinations = {combination()}};
    if (p_.values) requirements.needs.push_back({Need::Kind::keys_or_values});
    return requirements;
  }
  bool depends_on_capacity() const override { return p_.spatial == Spatial::adaptive; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.combined_attention(member, combination()).attention, scores.begin());
    for (std::size_t n = 0; p_.values && n < scores.size(); ++n) {
      scores[n] *= head.values().row(static_cast<Index>(n)).norm();
    }
  }

  void smooth(const Head& head, int member, int capacity, std::span<float> scores) const override {
    smooth_in_space(p_.spatial, p_.kernel, p_.beta, head, member, p_.window, capacity, scores);
  }

 private:
  WindowCombination combination() const { return {.weights = temporal_weights(p_.temporal, p_.alpha, p_.window)}; }

  AttentionParameters p_;
};

const MethodRegistration attention([] {
  return Method{
      .name = "attention",
      .summary =
          "Keeps what the observation window attends to, without looking at what removing it would do; values=true "
          "weighs by the length of the value.",
      .source = "arXiv 2605.08840, ablation of the indicator",
      .parameters =
          {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
               .of(Parameter::Step::window),
           Parameter::choice("temporal", {"mean", "ema", "last", "reversed-ema"}, "how queries are combined")
               .of(Parameter::Step::time),
           Parameter::real("alpha", 0.3, 0, 1, "weight of the newest query in the moving average")
               .of(Parameter::Step::time),
           Parameter::choice("spatial", {"avg", "max", "none", "adaptive"}, "how positions are combined")
               .of(Parameter::Step::space),
           Parameter::odd_integer("kernel", 5, 1, "width of the spatial window, in positions")
               .of(Parameter::Step::space),
           Parameter::real("beta", 2000, 1, 1e9, "spatial=adaptive: drift that widens the window by a step")
               .of(Parameter::Step::space),
           Parameter::flag("values", false, "multiply by the length of the value").of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Attention>(AttentionParameters{
                                   .window = a.integer("window"),
                                   .temporal = temporal_named(a.text("temporal")),
                                   .alpha = a.real("alpha"),
                                   .spatial = spatial_named(a.text("spatial")),
                                   .kernel = a.integer("kernel"),
                                   .beta = a.real("beta"),
                                   .values = a.flag("values"),
                               })};
          },
      .ablation = {.of = "restkv", .step = Parameter::Step::score},
  };
});

}  // namespace
}  // namespace kvreplay
