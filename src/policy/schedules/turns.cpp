// Eviction at every turn of a conversation: before its first token comes, the cache is cut to the capacity again.
//
// Turns grow as long as they are, so that a cache holds the capacity and a turn at most. Where the trace marks none
// after the eviction position, there is nothing to go by.
#include "policy/policy.h"

namespace kvreplay {
namespace {

const MethodRegistration turns([] {
  return Method{
      .name = "turns",
      .step = Method::Step::schedule,
      .summary = "Evicts again before every turn of the conversation that the trace marks.",
      .source = "structural",
      .parameters = {Parameter::choice(
                         "attention", {"live", "full"},
                         "what queries pay to the rows: over these alone, or as in the run without eviction")
                         .of(Parameter::Step::schedule)},
      .compose =
          [](const Arguments& a) {
            Composition step;
            step.schedule = Schedule{
                .phase = Schedule::Phase::turns,
                .attention = a.text("attention") == "full" ? Schedule::Attention::full : Schedule::Attention::live};
            return step;
          },
  };
});

}  // namespace
}  // namespace kvreplay
