// Compiled for the interface's next version.
#include <cstdlib>

#include "policy/plugin.h"

namespace {
std::vector<kvreplay::Method> methods() { std::abort(); }  // must never be asked for
}  // namespace

extern "C" const kvreplay::PolicyPlugin kvreplay_policy_plugin;
constinit const kvreplay::PolicyPlugin kvreplay_policy_plugin{
    .interface_version = kvreplay::kPolicyInterfaceVersion + 1, .methods = methods};
