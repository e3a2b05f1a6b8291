// KVzip (arXiv 2505.23416), offline: what reconstructing the context would look at is what it needs.
//
// The model is asked to repeat the context behind it; a position is worth the largest attention that any query of the
// request and of the repetition pays to it (paper, section 3). Here the prompt of the trace is the context, the request
// and the context again, and the eviction is at the context's end: the later prompt queries are the repetition's, over
// everything before them, as in the authors' code with one chunk. Sinks are always kept.
//
// Positions of all layers and heads compete for one budget by these scores (across=model); across=layer lets the heads
// of a layer compete, as kvpress's layerwise does, and across=none gives every head the same.
//
// It is query-agnostic but not free: it needs that second reading. What repeats the context stays in the cache behind
// the eviction, where the codes drop it, so that evaluation queries can look at it as well; capture the question before
// the repetition, or compare scores and kept sets alone.
#include <algorithm>
#include <utility>

#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

// What is read once for all query heads of a group.
struct AllKeys {
  auto operator<=>(const AllKeys&) const = default;
};

class KVzip : public Ranking {
 public:
  explicit KVzip(int sinks) : sinks_(sinks) {}

  Protection protection() const override { return {.sinks = sinks_}; }
  Requirements requirements() const override { return {.needs = {{Need::Kind::later_prompt}}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const HeadShape& shape = head.shape();
    // Everything that a later query sees: the entries of the cache and, behind them, the later prompt.
    const Matrix& keys = head.once(AllKeys{}, [&head] {
      const Matrix past = head.entry_keys();
      const Matrix later = head.later_keys();
      Matrix all(past.rows() + later.rows(), past.cols());
      all << past, later;
      return all;
    });
    const Index entries = head.entries().size();
    const auto first_row = static_cast<std::size_t>(entries - head.rows());
    std::ranges::fill(scores, 0.0f);
    head.attend(
        member, head.later_queries(member), keys,
        [&](Index query) {
          const int position = shape.next_position + static_cast<int>(query);
          const Index beyond = shape.rule.first_visible(position) - shape.next_position;  // of the later prompt
          return std::pair(beyond > 0 ? entries + beyond : head.visible(position).first, entries + query + 1);
        },
        [&](Index /*query*/, std::span<const float> weights) {
          for (std::size_t n = 0; n < scores.size(); ++n) scores[n] = std::max(scores[n], weights[first_row + n]);
        });
  }

 private:
  int sinks_;
};

std::shared_ptr<const Budget> competition(const std::string& across) {
  if (across == "none") return nullptr;
  return make_policy(across == "model" ? "random+global" : "random+adakv(floor=0,normalize=false,across=kv)").budget;
}

Composition compose(const Arguments& a) {
  return {.rule = std::make_shared<KVzip>(a.integer("sinks")),
          .budget = competition(a.text("across")),
          .share = Share::max,
          .notes = {"kvzip: scored by the prompt's own queries after the eviction, which repeat the context and stay "
                    "cached behind it"}};
}

std::vector<Parameter> parameters() {
  return {Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection),
          Parameter::choice("across", {"model", "layer", "none"}, "which heads compete for positions")
              .of(Parameter::Step::budget)};
}

const MethodRegistration kvzip([] {
  return Method{
      .name = "kvzip",
      .summary = "Keeps what the prompt looks at when it repeats the context that ends at the eviction.",
      .source = "arXiv 2505.23416, section 3",
      .parameters = parameters(),
      .compose = compose,
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "kvzip@kvpress",
      .summary =
          "One kept set per KV head, the largest score of its group; positions of all layers and heads compete. Of a "
          "context longer than its chunk of 2048 kvpress attends chunk by chunk, which is not done here.",
      .source = "github.com/NVIDIA/kvpress, kvzip_press.py",
      .parameters = parameters(),
      .compose =
          [](const Arguments& a) {
            Composition policy = compose(a);
            policy.granularity = Granularity::kv;
            policy.share_rule = kvpress::positions_of_share;
            return policy;
          },
      .variant_of = "kvzip",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
