// One of its methods has a built-in one's name.
#include "policy/plugin.h"

namespace kvreplay {
namespace {

Method nothing(const std::string& name) {
  return {.name = name, .summary = "", .source = "", .parameters = {}, .compose = [](const Arguments&) {
            return Composition{};
          }};
}

const MethodRegistration beside([] { return nothing("beside-snapkv"); });
const MethodRegistration taken([] { return nothing("snapkv"); });

}  // namespace
}  // namespace kvreplay
