// Key norm (arXiv 2406.11430): keys of small length draw much attention later.
//
// Score of position n: −‖k_n‖ (paper, section 3). Nothing is protected. The authors leave some layers alone by default;
// the codes that compare with it do not, and nor do we.
#include "policy/policy.h"
#include "policy/published_code.h"

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

const MethodRegistration kvpress_decoding_code([] {
  return Method{
      .name = "knorm@kvpress-decoding",
      .summary = kvpress::decoding("Nothing is protected: the newest token may go."),
      .source = "github.com/NVIDIA/kvpress, decoding_press.py over knorm_press.py",
      .parameters = {kvpress::interval_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<KeyNorm>(),
                               .schedule = kvpress::decoding_schedule(a.integer("interval")),
                               .order = RowOrder::protected_first};
          },
      .variant_of = "knorm",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
