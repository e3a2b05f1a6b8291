// Which positions rows have once others have gone: those of their tokens, or their places in the cache.
//
// StreamingLLM (arXiv 2309.17453, section 3.2) and H2O's rolling code cache keys before rotation and rotate each by its
// place in the cache, the query by the last one, so that distances are those within the cache. Here the rotation of a
// trace's rows is taken off with its rotary table, and that of their places put on.
#include "policy/policy.h"

namespace kvreplay {
namespace {

const MethodRegistration positions([] {
  return Method{
      .name = "positions",
      .step = Method::Step::schedule,
      .summary = "Leaves keys and queries at their tokens' positions, or turns them to their places in the cache.",
      .source = "arXiv 2309.17453, section 3.2",
      .parameters = {Parameter::choice("are", {"original", "reindexed"}, "positions after an eviction")
                         .of(Parameter::Step::schedule)
                         .or_unnamed()},
      .compose =
          [](const Arguments& a) {
            return Composition{.row_positions =
                                   a.text("are") == "reindexed" ? RowPositions::reindexed : RowPositions::original};
          },
  };
});

}  // namespace
}  // namespace kvreplay
