// Eviction while tokens come: every so many of them, or when a cache is so many rows above its capacity; or before
// every turn of a conversation.
//
// A step is one token: its key and value join the cache, its query attends, then the policy may evict. It does so
// `interval` steps after the last eviction, or with phase=position where (t + 1) mod interval is 0, once a head holds
// at least one row more than the capacity, `slack` if that is more. attend=after leaves the capacity: queries attend
// to up to interval rows more. attend=before makes room for the interval tokens that come, so that no query attends to
// more than the capacity. The prompt is evicted at its end, or with prompt=wait stays whole for the first interval.
//
// What policies see of a query's attention is over the rows that are left, as in published codes. With attention=full
// it is what the query pays to these in the run without eviction: what ranking by all keys would change.
//
// +turns cuts the cache to the capacity before a turn's first token comes. Turns are as long as they are, so that a
// cache holds the capacity and a turn at most. Where the trace marks none after the eviction position, there is nothing
// to go by.
#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

Parameter attention_parameter() {
  return Parameter::choice("attention", {"live", "full"},
                           "what queries pay to the rows: over these alone, or as in the run without eviction")
      .of(Parameter::Step::schedule);
}

Schedule::Attention attention_of(const Arguments& arguments) {
  return arguments.text("attention") == "full" ? Schedule::Attention::full : Schedule::Attention::live;
}

const MethodRegistration every([] {
  return Method{
      .name = "every",
      .step = Method::Step::schedule,
      .summary = "Evicts again and again while tokens come, and not only at the prompt's end.",
      .source = "structural",
      .parameters =
          {Parameter::integer("interval", 1, 1, "steps between evictions").of(Parameter::Step::schedule).or_unnamed(),
           Parameter::integer("slack", 0, 0, "rows above the capacity that are waited for")
               .of(Parameter::Step::schedule),
           Parameter::choice("phase", {"since-last", "position"},
                             "what the interval counts: steps since the last eviction, or all tokens")
               .of(Parameter::Step::schedule),
           Parameter::choice("attend", {"after", "before"},
                             "queries attend, then the policy evicts; or it makes room before tokens come")
               .of(Parameter::Step::schedule),
           Parameter::choice("prompt", {"cut", "wait"}, "evicted at its end, or whole for the first interval")
               .of(Parameter::Step::schedule),
           attention_parameter()},
      .compose =
          [](const Arguments& a) {
            Composition step;
            step.schedule = Schedule{
                .interval = a.integer("interval"),
                .slack = a.integer("slack"),
                .phase = a.text("phase") == "position" ? Schedule::Phase::position : Schedule::Phase::since_last,
                .attend = a.text("attend") == "before" ? Schedule::Attend::before : Schedule::Attend::after,
                .prompt = a.text("prompt") == "wait" ? Schedule::Prompt::wait : Schedule::Prompt::cut,
                .attention = attention_of(a)};
            if (step.schedule->slack > 0 && step.schedule->attend == Schedule::Attend::before) {
              throw UsageError("every: attend=before never lets a cache grow above its capacity; leave out slack");
            }
            return step;
          },
  };
});

const MethodRegistration turns([] {
  return Method{
      .name = "turns",
      .step = Method::Step::schedule,
      .summary = "Evicts again before every turn of the conversation that the trace marks.",
      .source = "structural",
      .parameters = {attention_parameter()},
      .compose =
          [](const Arguments& a) {
            Composition step;
            step.schedule = Schedule{.phase = Schedule::Phase::turns, .attention = attention_of(a)};
            return step;
          },
  };
});

}  // namespace
}  // namespace kvreplay
