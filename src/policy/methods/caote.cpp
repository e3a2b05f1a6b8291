// CAOTE (arXiv 2504.14051): the exact change of the attention output when one token goes.
//
// Score of position n: a[n]/(1 − a[n]) · ‖o − v_n‖ with o = Σ_n a[n] v_n over all positions (paper, equation for c_j).
// The paper puts it on top of other methods' attention; here a is the observation window's attention, combined in time,
// which sums to 1 as the paper asks. Lengths are taken before the output projection, and nothing is pooled. A
// position with all of the attention comes first (removal_error).
#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

class Caote : public Ranking {
 public:
  Caote(int window, Temporal temporal, double alpha) : window_(window), temporal_(temporal), alpha_(alpha) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override {
    return {.needs = {Need::window(window_)}, .combinations = {combination()}};
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const CombinedAttention window = head.combined_attention(member, combination());
    for (std::size_t n = 0; n < scores.size(); ++n) {
      scores[n] = removal_error(window.attention[n], window.distance[n]);
    }
  }

 private:
  WindowCombination combination() const {
    return {.weights = temporal_weights(temporal_, alpha_, window_),
            .distance = WindowCombination::Distance::values,
            .whole_cache = true};
  }

  int window_;
  Temporal temporal_;
  double alpha_;
};

const MethodRegistration caote([] {
  return Method{
      .name = "caote",
      .summary = "Keeps the positions whose removal alone would change the attention output most.",
      .source = "arXiv 2504.14051, the CAOTE score",
      .parameters = {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::choice("temporal", {"mean", "ema", "last", "reversed-ema"}, "how queries are combined")
                         .of(Parameter::Step::time),
                     Parameter::real("alpha", 0.3, 0, 1, "weight of the newest query in the moving average")
                         .of(Parameter::Step::time)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Caote>(a.integer("window"), temporal_named(a.text("temporal")),
                                                               a.real("alpha"))};
          },
  };
});

}  // namespace
}  // namespace kvreplay
