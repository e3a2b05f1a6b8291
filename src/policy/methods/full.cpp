// The full cache: nothing is evicted.
#include <numeric>

#include "policy/policy.h"

namespace kvreplay {
namespace {

class Full : public Pattern {
 public:
  CapacityRule capacity_rule() const override { return CapacityRule::everything; }

  std::vector<int> keep(const HeadShape& shape, int /*member*/, int /*capacity*/) const override {
    std::vector<int> kept(static_cast<std::size_t>(shape.rows()));
    std::iota(kept.begin(), kept.end(), 0);
    return kept;
  }
};

const MethodRegistration full([] {
  return Method{
      .name = "full",
      .summary = "Keeps every position, whatever the capacity: the reference with error 0.",
      .source = "baseline",
      .parameters = {},
      .compose = [](const Arguments&) { return Composition{.rule = std::make_shared<Full>()}; },
  };
});

}  // namespace
}  // namespace kvreplay
