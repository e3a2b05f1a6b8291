// One budget for the whole model: the best positions of all layers and heads together, by their scores.
//
// Layers and heads get as many positions as are among the best of all; each keeps its own best. Scores must be
// comparable between layers, as attention weights are and output lengths are not. What a policy protects every head
// keeps. Among equal scores the lower layer wins, then the lower head. Layers whose sliding window leaves them fewer
// positions compete among themselves. As KVzip (arXiv 2505.23416) prunes by default.
#include <algorithm>
#include <functional>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

class Global : public Budget {
 public:
  bool needs_scores() const override { return true; }
  bool surveys() const override { return true; }

  void check(const BudgetRequest& request) const override {
    if (request.granularity == Granularity::kv) return;
    throw Error("+global lets KV heads compete with what their groups share; ask for --heads kv");
  }

  // The scores that compete.
  std::vector<float> survey(const Head& /*head*/, std::span<const float> scores, Protection protection) const override {
    const auto ranked = scores.subspan(static_cast<std::size_t>(protection.sinks),
                                       scores.size() - static_cast<std::size_t>(protection.count()));
    return {ranked.begin(), ranked.end()};
  }

  std::vector<int> allocate(const BudgetRequest& request) const override {
    std::vector<float> all;
    for (const LayerSurvey& layer : request.surveys) {
      for (const std::vector<float>& head : layer) all.insert(all.end(), head.begin(), head.end());
    }
    const int is_protected = request.protection.count();
    const auto sets = static_cast<std::size_t>(request.num_kv_heads);
    const auto places =
        std::min(all.size(), static_cast<std::size_t>(request.capacity - is_protected) * sets * request.surveys.size());
    std::vector<int> capacities(sets, is_protected);
    if (places == 0) return capacities;
    std::ranges::nth_element(all, all.begin() + static_cast<std::ptrdiff_t>(places - 1), std::greater<>());
    const float lowest = all[places - 1];
    // Of those that are exactly as good as the last, so many are in.
    auto ties = static_cast<std::ptrdiff_t>(places) -
                std::count_if(all.begin(), all.end(), [lowest](float score) { return score > lowest; });
    for (int layer = 0; layer <= request.layer_among_alike; ++layer) {
      const LayerSurvey& heads = request.surveys[static_cast<std::size_t>(layer)];
      for (std::size_t head = 0; head < heads.size(); ++head) {
        const auto equal = std::ranges::count(heads[head], lowest);
        const auto taken = std::min(ties, equal);
        ties -= taken;
        if (layer < request.layer_among_alike) continue;
        const auto better = std::ranges::count_if(heads[head], [lowest](float score) { return score > lowest; });
        capacities[head] += static_cast<int>(better + taken);
      }
    }
    // A kept set is never empty.
    for (int& capacity : capacities) capacity = std::max(capacity, 1);
    return capacities;
  }
};

const MethodRegistration global([] {
  return Method{
      .name = "global",
      .step = Method::Step::budget,
      .summary = "Lets the positions of all layers and heads compete for one budget by their scores.",
      .source = "arXiv 2505.23416, section 3",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.budget = std::make_shared<Global>()}; },
  };
});

}  // namespace
}  // namespace kvreplay
