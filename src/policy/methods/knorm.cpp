// Key norm (arXiv 2406.11430): keys of small length draw much attention later.
//
// Score of position n: −‖k_n‖ (paper, section 3). Nothing is protected. The authors leave some layers alone by default;
// the codes that compare with it do not, and nor do we.
#include "policy/policy.h"

namespace kvreplay {
namespace {

class KeyNorm : public Ranking {
 public:
  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    for (std::size_t n = 0; n < scores.size(); ++n) scores[n] = -head.keys().row(static_cast<Index>(n)).norm();
  }
};

const MethodRegistration knorm([] {
  return Method{
      .name = "knorm",
      .summary = "Keeps the positions whose keys are shortest.",
      .source = "arXiv 2406.11430, section 3",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.rule = std::make_shared<KeyNorm>()}; },
  };
});

}  // namespace
}  // namespace kvreplay
