// In which order the rows that are left stand in the cache.
//
// Codes that gather what a top-k returns leave survivors by score, the best first. What pools over neighbours, cuts
// chunks or counts slots then sees neighbours in score at the next eviction, and not in the text.
#include "policy/policy.h"

namespace kvreplay {
namespace {

const MethodRegistration order([] {
  return Method{
      .name = "order",
      .step = Method::Step::schedule,
      .summary = "Leaves the rows of an evicted cache as the tokens came, or by score between what is protected.",
      .source = "structural",
      .parameters = {Parameter::choice("by", {"position", "score"}, "how rows stand after an eviction")
                         .of(Parameter::Step::schedule)
                         .or_unnamed()},
      .compose =
          [](const Arguments& a) {
            return Composition{.order = a.text("by") == "score" ? RowOrder::score : RowOrder::position};
          },
  };
});

}  // namespace
}  // namespace kvreplay
