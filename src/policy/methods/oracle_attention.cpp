// Oracle: the positions that the evaluation queries will attend to most.
//
// Score of position n: the full attention that it receives from all evaluation queries, Σ_t A[t, n]. It bounds
// attention recall: at equal capacity per head and granularity query no kept set has a higher sum of recall over the
// queries. It does not bound the output error, since values count there too.
#include <algorithm>

#include "policy/policy.h"

namespace kvreplay {
namespace {

class OracleAttention : public Ranking {
 public:
  Requirements requirements() const override { return {.needs = {{Need::Kind::evaluation_queries}}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.evaluation_attention(member), scores.begin());
  }
};

const MethodRegistration attention_oracle([] {
  return Method{
      .name = "oracle-attention",
      .summary = "ORACLE: keeps what the evaluation queries attend to most; no policy can know it.",
      .source = "a bound on attention recall",
      .parameters = {},
      .compose =
          [](const Arguments&) { return Composition{.rule = std::make_shared<OracleAttention>(), .oracle = true}; },
  };
});

}  // namespace
}  // namespace kvreplay
