// A name that no spec can hold.
#include "policy/plugin.h"

KVREPLAY_POLICY_PLUGIN() {
  return {
      {.name = "two words", .summary = "", .source = "", .parameters = {}, .compose = [](const kvreplay::Arguments&) {
         return kvreplay::Composition{};
       }}};
}
