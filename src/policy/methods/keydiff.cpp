// KeyDiff (arXiv 2504.15364): keys unlike the others are worth keeping.
//
// Score of position n: −cos(k_n, k̄), where k̄ is the mean of all keys brought to length 1 (paper, section 3; the
// anchor as kvpress computes it). The paper evicts block by block while the prompt is read; here, as in kvpress, all of
// the prompt is ranked at once.
#include <algorithm>

#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

// Below this a length counts as this, as PyTorch's cosine_similarity does.
constexpr float kSmallestNorm = 1e-8f;

class KeyDiff : public Ranking {
 public:
  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    const Matrix& keys = head.keys();
    const Eigen::VectorXf norms = keys.rowwise().norm();
    Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(keys.cols());
    for (Index n = 0; n < keys.rows(); ++n) sum += (keys.row(n) / std::max(norms(n), 1e-12f)).cast<double>();
    const Eigen::RowVectorXf anchor = (sum / static_cast<double>(keys.rows())).cast<float>();
    const float anchor_norm = std::max(anchor.norm(), kSmallestNorm);
    for (Index n = 0; n < keys.rows(); ++n) {
      scores[static_cast<std::size_t>(n)] =
          -keys.row(n).dot(anchor) / (std::max(norms(n), kSmallestNorm) * anchor_norm);
    }
  }
};

const MethodRegistration keydiff([] {
  return Method{
      .name = "keydiff",
      .summary = "Keeps the positions whose keys point away from the average key.",
      .source = "arXiv 2504.15364, section 3",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.rule = std::make_shared<KeyDiff>()}; },
  };
});

const MethodRegistration kvpress_decoding_code([] {
  return Method{
      .name = "keydiff@kvpress-decoding",
      .summary = kvpress::decoding("The average key is that of the present cache; the newest token may go."),
      .source = "github.com/NVIDIA/kvpress, decoding_press.py over keydiff_press.py",
      .parameters = {kvpress::interval_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<KeyDiff>(),
                               .schedule = kvpress::decoding_schedule(a.integer("interval")),
                               .order = RowOrder::protected_first};
          },
      .variant_of = "keydiff",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
