// Positions that are kept whatever a policy thinks of them: attention sinks and the newest positions, inside the
// budget.
//
// Codes of one method differ in what they never evict, and often that is what tells their results apart: under the same
// protection policies are compared by their choice alone, and random+protect(…) is the floor of it. The first and the
// last positions before the eviction are kept, together with what the method itself protects; all count towards the
// capacity. A pattern is drawn as large as the places that are left allow.
#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

const MethodRegistration protect([] {
  return Method{
      .name = "protect",
      .step = Method::Step::protection,
      .summary = "Keeps the first and the last positions whatever their scores, inside the capacity.",
      .source = "structural",
      .parameters =
          {Parameter::integer("first", 4, 0, "first positions that are always kept").of(Parameter::Step::protection),
           Parameter::integer("last", 0, 0, "last positions that are always kept").of(Parameter::Step::protection)},
      .compose =
          [](const Arguments& a) {
            const Protection protection{.sinks = a.integer("first"), .window = a.integer("last")};
            if (protection.count() == 0) throw UsageError("protect: first and last are 0, so it protects nothing");
            return Composition{.protect = protection};
          },
  };
});

}  // namespace
}  // namespace kvreplay
