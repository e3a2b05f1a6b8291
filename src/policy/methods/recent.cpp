// The most recent positions, and nothing else.
#include <numeric>

#include "policy/policy.h"

namespace kvreplay {
namespace {

class Recent : public Pattern {
 public:
  std::vector<int> keep(const HeadShape& shape, int /*member*/, int capacity) const override {
    std::vector<int> kept(static_cast<std::size_t>(std::min(capacity, shape.rows())));
    std::iota(kept.begin(), kept.end(), shape.rows() - static_cast<int>(kept.size()));
    return kept;
  }
};

const MethodRegistration recent([] {
  return Method{
      .name = "recent",
      .summary = "Keeps the last positions: a sliding window over the prompt.",
      .source = "baseline",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.rule = std::make_shared<Recent>()}; },
      .baseline = Method::Baseline::floor,
  };
});

}  // namespace
}  // namespace kvreplay
