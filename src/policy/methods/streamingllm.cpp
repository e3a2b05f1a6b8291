// StreamingLLM (arXiv 2309.17453): attention sinks and the most recent positions.
//
// The first few tokens draw attention that has nowhere else to go; without them a window attention collapses (paper,
// section 3). Kept are `sinks` first positions and the last capacity − sinks. KVCache-Factory, and the ReST-KV release
// after it, keep the first capacity − window and the last `window` positions instead; that is
// streamingllm(sinks=<capacity − window>).
#include "policy/policy.h"

namespace kvreplay {
namespace {

class StreamingLLM : public Pattern {
 public:
  explicit StreamingLLM(int sinks) : sinks_(sinks) {}

  int minimum_capacity() const override { return std::max(1, sinks_); }

  std::vector<int> keep(const HeadShape& shape, int /*member*/, int capacity) const override {
    std::vector<int> kept;
    const int first_recent = std::max(0, shape.prompt_length - (capacity - sinks_));
    for (int position = 0; position < std::min(sinks_, shape.prompt_length); ++position) kept.push_back(position);
    for (int position = std::max(sinks_, first_recent); position < shape.prompt_length; ++position) {
      kept.push_back(position);
    }
    return kept;
  }

 private:
  int sinks_;
};

const MethodRegistration streamingllm({
    .name = "streamingllm",
    .summary = "Keeps the first positions, which act as attention sinks, and the most recent ones.",
    .source = "arXiv 2309.17453, section 3",
    .parameters = {Parameter::integer("sinks", 4, 0, "first positions that are always kept")},
    .compose =
        [](const Arguments& a) {
          return Composition{.pattern = std::make_shared<StreamingLLM>(a.integer("sinks"))};
        },
});

}  // namespace
}  // namespace kvreplay
