// The prompt stays: only what is generated is evicted.
//
// Codes for long generations differ in this most of all: some cut the prompt like everything else, some never touch it
// and count it in the capacity, and some give the capacity to what is generated alone.
#include "policy/policy.h"

namespace kvreplay {
namespace {

const MethodRegistration pin([] {
  return Method{
      .name = "pin",
      .step = Method::Step::schedule,
      .summary = "Keeps the whole prompt under a schedule; its positions are counted in the capacity, or not.",
      .source = "structural",
      .parameters = {Parameter::choice("what", {"prompt"}, "what stays").of(Parameter::Step::schedule).or_unnamed(),
                     Parameter::flag("counted", true,
                                     "the capacity includes the prompt; false: it is for what comes after it")
                         .of(Parameter::Step::schedule)},
      .compose = [](const Arguments& a) { return Composition{.pin = {.prompt = true, .counted = a.flag("counted")}}; },
  };
});

}  // namespace
}  // namespace kvreplay
