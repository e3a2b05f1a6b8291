// Its second method has a built-in one's name.
#include "policy/plugin.h"

KVREPLAY_POLICY_PLUGIN() {
  const auto nothing = [](const kvreplay::Arguments&) { return kvreplay::Composition{}; };
  return {{.name = "beside-snapkv", .summary = "", .source = "", .parameters = {}, .compose = nothing},
          {.name = "snapkv", .summary = "", .source = "", .parameters = {}, .compose = nothing}};
}
