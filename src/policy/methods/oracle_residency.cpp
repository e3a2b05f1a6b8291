// Oracle: eviction that looks ahead, step by step, as Belady's rule for caches does (IBM Systems Journal 5 (2), 1966).
//
// Score of position n when queries up to t have attended: the full attention that it receives from the evaluation
// queries still to come, Σ_{t' > t} A[t', n]. At every eviction what has most of that stays. It is greedy: each
// eviction keeps what is worth most from there on, whatever later ones do, and what went does not come back. So it is
// no bound on attention recall, though hard to pass, and none on the output error. At one eviction it is
// oracle-attention.
#include <algorithm>
#include <vector>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

// Sums of attention over all later queries, at every kBlock-th one, and the attention of those between two of them.
class AttentionToCome : public RankingMemory {
 public:
  explicit AttentionToCome(int group_size) : members_(static_cast<std::size_t>(group_size)) {}

  void begin(const Head& head) override {
    const std::span<const int> positions = head.evaluation_positions();
    if (positions.empty()) throw Error("an oracle needs evaluation queries, and there are none");
    positions_.assign(positions.begin(), positions.end());
    next_position_ = head.shape().next_position;
    const auto tokens = static_cast<std::size_t>(positions_.back()) + 1;
    const std::size_t blocks = (positions_.size() + kBlock - 1) / kBlock;
    for (std::size_t member = 0; member < members_.size(); ++member) {
      Member& of = members_[member];
      of.after.assign(blocks, std::vector<double>(tokens, 0.0));
      for (std::size_t block = blocks; block-- > 1;) {
        of.after[block - 1] = of.after[block];
        for_each_query(head, static_cast<int>(member), block,
                       [&](std::size_t /*query*/, std::span<const float> weights) {
                         for (std::size_t n = 0; n < tokens; ++n)
                           of.after[block - 1][n] += static_cast<double>(weights[n]);
                       });
      }
    }
  }

  bool observes_attention() const override { return false; }
  void observe(const CacheStep& step) override { next_position_ = step.position + 1; }
  void keep(std::span<const int> /*rows*/) override {}

  // Of the rows of `head`.
  void add_to_come(const Head& head, int member, std::span<float> scores) const {
    const auto next =
        static_cast<std::size_t>(std::ranges::lower_bound(positions_, next_position_) - positions_.begin());
    if (next == positions_.size()) {
      std::ranges::fill(scores, 0.0f);
      return;
    }
    const std::size_t block = next / kBlock;
    const Member& of = members_[static_cast<std::size_t>(member)];
    if (of.block != block || of.rows.empty()) {
      of.block = block;
      of.rows.clear();
      for_each_query(head, member, block, [&](std::size_t /*query*/, std::span<const float> weights) {
        of.rows.emplace_back(weights.begin(), weights.end());
      });
    }
    for (std::size_t row = 0; row < scores.size(); ++row) {
      const auto position = static_cast<std::size_t>(head.positions()[static_cast<int>(row)]);
      double sum = of.after[block][position];
      for (std::size_t query = next % kBlock; query < of.rows.size(); ++query) {
        sum += static_cast<double>(of.rows[query][position]);
      }
      scores[row] = static_cast<float>(sum);
    }
  }

 private:
  static constexpr std::size_t kBlock = 64;

  struct Member {
    std::vector<std::vector<double>> after;        // [block][position]: of all queries behind the block
    mutable std::size_t block = 0;                 // the one that is worked on
    mutable std::vector<std::vector<float>> rows;  // of its queries, [position]
  };

  // Calls take(query, weights) for the queries of a block, in their order, with their full attention by position.
  template <class Take>
  void for_each_query(const Head& head, int member, std::size_t block, const Take& take) const {
    const auto first = static_cast<Index>(block * kBlock);
    const Index count = std::min<Index>(kBlock, static_cast<Index>(positions_.size()) - first);
    const Matrix queries = head.evaluation_queries(member).middleRows(first, count);
    head.attend(
        member, queries, head.evaluation_keys(),
        [&](Index query) {
          const Index position = positions_[static_cast<std::size_t>(first + query)];
          return std::pair(head.shape().rule.first_visible(position), position + 1);
        },
        [&](Index query, std::span<const float> weights) { take(static_cast<std::size_t>(query), weights); });
  }

  std::vector<int> positions_;  // of the evaluation queries
  int next_position_ = 0;       // of the first one to come
  std::vector<Member> members_;
};

class OracleResidency : public Ranking {
 public:
  Requirements requirements() const override { return {.needs = {{Need::Kind::evaluation_queries}}}; }

  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<AttentionToCome>(shape.group_size);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    if (const auto* const memory = dynamic_cast<const AttentionToCome*>(head.memory())) {
      memory->add_to_come(head, member, scores);
    } else {
      std::ranges::copy(head.evaluation_attention(member), scores.begin());
    }
  }
};

const MethodRegistration residency_oracle([] {
  return Method{
      .name = "oracle-residency",
      .summary =
          "ORACLE: after every token keeps what the evaluation queries to come attend to most; no policy can know "
          "it.",
      .source = "a greedy look-ahead over the captured queries",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            return Composition{.rule = std::make_shared<OracleResidency>(), .schedule = Schedule{}, .oracle = true};
          },
  };
});

}  // namespace
}  // namespace kvreplay
