// A name that no spec can hold.
#include "policy/plugin.h"

namespace kvreplay {
namespace {

const MethodRegistration two_words([] {
  return Method{.name = "two words", .summary = "", .source = "", .parameters = {}, .compose = [](const Arguments&) {
                  return Composition{};
                }};
});

}  // namespace
}  // namespace kvreplay
