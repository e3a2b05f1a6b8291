// CriticalKV (arXiv 2502.03805): first what is attended to, then what also weighs in the output.
//
// A share `first` of the capacity goes to the positions with the highest scores of `base`. All others are ranked anew
// by (score + ε) · ‖W v_n‖₁, with W the head's part of the output projection (paper, algorithm 1; lengths averaged over
// the query heads that share a kept set, as kvpress does). Positions that the base protects count towards the first
// stage. Without an output projection in the trace, ‖v_n‖₁ stands in.
#include <algorithm>
#include <limits>

#include "base/error.h"
#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

// Positions whose projected values are held at a time.
constexpr Index kBlock = 256;

class CriticalKV : public Ranking {
 public:
  CriticalKV(std::shared_ptr<const Ranking> base, double first, double epsilon)
      : base_(std::move(base)), first_(first), epsilon_(static_cast<float>(epsilon)) {}

  Protection protection() const override { return base_->protection(); }
  // The second stage ranks anew what the base would put first.
  int unscored(const HeadShape& shape) const override {
    return first_ < 1 ? protection().held_by(shape).count() : base_->unscored(shape);
  }
  Requirements requirements() const override {
    Requirements requirements = base_->requirements();
    requirements.needs.push_back({Need::Kind::output_projection});
    requirements.needs.push_back({Need::Kind::keys_or_values});
    return requirements;
  }
  bool depends_on_capacity() const override { return true; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    base_->score(head, member, scores);
  }

  void smooth(const Head& head, int member, int capacity, std::span<float> scores) const override {
    base_->smooth(head, member, capacity, scores);
  }

  void refine(const Head& head, std::span<const int> members, int capacity, std::span<float> scores) const override {
    base_->refine(head, members, capacity, scores);
    const auto chosen_first = static_cast<int>(capacity * first_);
    const Protection held = protection().held_by(head.shape());
    std::vector<int> first = select_top(scores, held, std::max(chosen_first, held.count()));
    std::ranges::stable_sort(first, [base = std::vector<float>(scores.begin(), scores.end())](int a, int b) {
      return base[static_cast<std::size_t>(a)] > base[static_cast<std::size_t>(b)];
    });
    Eigen::VectorXf length = Eigen::VectorXf::Zero(static_cast<Index>(scores.size()));
    for (const int member : members) length += projected_lengths(head, member);
    length /= static_cast<float>(members.size());
    for (std::size_t n = 0; n < scores.size(); ++n) {
      scores[n] = (scores[n] + epsilon_) * length(static_cast<Index>(n));
    }
    // First stage before second, in the order of the base; finite, so that heads that share can still be combined.
    const float top = std::max(*std::ranges::max_element(scores), std::numeric_limits<float>::min());
    for (std::size_t rank = 0; rank < first.size(); ++rank) {
      const auto ahead = static_cast<float>(first.size() - rank) / static_cast<float>(first.size());
      scores[static_cast<std::size_t>(first[rank])] = top * (1 + ahead);
    }
  }

 private:
  // ‖W v_n‖₁ for every row: [R].
  static Eigen::VectorXf projected_lengths(const Head& head, int member) {
    const Matrix& values = head.values();
    if (!head.has_output_projection()) return values.cwiseAbs().rowwise().sum();
    const Matrix projection = head.output_projection(member);
    Eigen::VectorXf lengths(values.rows());
    for (Index at = 0; at < values.rows(); at += kBlock) {
      const Index rows = std::min(kBlock, values.rows() - at);
      lengths.segment(at, rows) = (values.middleRows(at, rows) * projection.transpose()).cwiseAbs().rowwise().sum();
    }
    return lengths;
  }

  std::shared_ptr<const Ranking> base_;
  double first_;
  float epsilon_;
};

const MethodRegistration criticalkv([] {
  return Method{
      .name = "criticalkv",
      .summary =
          "Gives part of the capacity to the best scores of another policy, and the rest to positions that also "
          "weigh much after the output projection.",
      .source = "arXiv 2502.03805, algorithm 1",
      .parameters = {Parameter::spec("base", "snapkv", "policy whose scores are refined").of(Parameter::Step::score),
                     Parameter::real("first", 0.5, 0, 1, "share of the capacity that goes by those scores alone")
                         .of(Parameter::Step::score),
                     Parameter::real("epsilon", 1e-4, 0, 1e6, "added to scores before the second stage")
                         .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            const Policy base = make_policy(a.text("base"));
            if (!base.ranking() || base.budget || base.selection || base.oracle) {
              throw UsageError("criticalkv: base must be a policy with scores and nothing after '+', not '" +
                               base.canonical + "'");
            }
            return Composition{.rule = std::make_shared<CriticalKV>(base.ranking(), a.real("first"), a.real("epsilon")),
                               .granularity = base.granularity,
                               .share = base.share,
                               .notes = base.notes};
          },
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "criticalkv@kvpress",
      .summary = kvpress::with_attention_path("Over SnapKV with kvpress's window of 64; one kept set per KV head."),
      .source = "github.com/NVIDIA/kvpress, criticalkv_press.py",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            return Composition{.rule = std::make_shared<CriticalKV>(make_policy("snapkv@kvpress").ranking(), 0.5, 1e-4),
                               .granularity = Granularity::kv,
                               .share = Share::mean,
                               .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "criticalkv",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
