// RaaS, reasoning-aware attention sparsity (arXiv 2502.11147): conclusions that a train of thought has drawn are used
// for a while and then no more, as in a cache whose least recently used entry goes.
//
// Every generated row carries the time of the last step that used it: when it came, and whenever it is among the
// `share` of the generated rows that the step's query attends to most. The row with the oldest time goes, of several
// the one that stands first. The prompt always stays (paper, section 3), and is counted in the capacity.
//
// From the paper, row by row: no published code was found, and its variant for pages of rows is not here. Attention is
// the mean over the query heads that share the rows, of which the paper says nothing.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "policy/policy.h"

namespace kvreplay {
namespace {

// When each row of a KV head was last used.
class LastUses : public RankingMemory {
 public:
  LastUses(const HeadShape& shape, double share) : prompt_length_(shape.prompt_length), share_(share) {}

  void begin(const Head& head) override {
    for (int row = 0; row < head.rows(); ++row) add(head.positions()[row], head.shape().next_position - 1);
  }

  void observe(const CacheStep& step) override {
    add(step.position, step.position);
    const Eigen::RowVectorXf attention = step.attention->colwise().mean();
    std::vector<std::size_t> generated;
    for (std::size_t row = 0; row < positions_.size(); ++row) {
      if (positions_[row] >= prompt_length_) generated.push_back(row);
    }
    const auto used = static_cast<std::ptrdiff_t>(std::ceil(share_ * static_cast<double>(generated.size())));
    std::ranges::stable_sort(generated, [&attention](std::size_t a, std::size_t b) {
      return attention(static_cast<Index>(a)) > attention(static_cast<Index>(b));
    });
    for (auto row = generated.begin(); row != generated.begin() + used; ++row) last_use_[*row] = step.position;
  }

  void keep(std::span<const int> rows) override {
    const auto gather = [rows](std::vector<int>& of) {
      std::vector<int> left;
      for (const int row : rows) left.push_back(of[static_cast<std::size_t>(row)]);
      of = std::move(left);
    };
    gather(positions_);
    gather(last_use_);
  }

  // Rows from the one that was used least recently to the newest: each one's place among them.
  void rank(std::span<float> places) const {
    std::vector<std::size_t> order(last_use_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, {}, [this](std::size_t row) { return last_use_[row]; });
    for (std::size_t place = 0; place < order.size(); ++place) places[order[place]] = static_cast<float>(place);
  }

 private:
  void add(int position, int used) {
    positions_.push_back(position);
    last_use_.push_back(used);
  }

  int prompt_length_;
  double share_;
  std::vector<int> positions_;  // of the rows
  std::vector<int> last_use_;
};

class RaaS : public Ranking {
 public:
  explicit RaaS(double share) : share_(share) {}

  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<LastUses>(shape, share_);
  }

  // The same for all query heads of the group. Before a step has used anything, the newest rows are the most recent.
  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    if (const auto* const memory = dynamic_cast<const LastUses*>(head.memory())) {
      memory->rank(scores);
    } else {
      std::iota(scores.begin(), scores.end(), 0.0f);
    }
  }

 private:
  double share_;
};

const MethodRegistration raas([] {
  return Method{
      .name = "raas",
      .summary =
          "Keeps the prompt and, of what is generated, the rows that were among the most attended ones last: the least "
          "recently used one goes. From the paper: no published code was found.",
      .source = "arXiv 2502.11147, section 3",
      .parameters =
          {Parameter::real("share", 0.5, 0, 1, "of the generated rows that a step uses").of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<RaaS>(a.real("share")),
                               .granularity = Granularity::kv,
                               .schedule = Schedule{.attend = Schedule::Attend::before},
                               .pin = {.prompt = true}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
