// Compiled for the interface's next version.
#include <cstdlib>

#include "policy/plugin_interface.h"

namespace kvreplay {
namespace {

const MethodRegistration never_asked_for([]() -> Method { std::abort(); });

}  // namespace
}  // namespace kvreplay

extern "C" const kvreplay::PolicyPlugin kvreplay_policy_plugin;
constinit const kvreplay::PolicyPlugin kvreplay_policy_plugin{
    .interface_version = kvreplay::kPolicyInterfaceVersion + 1, .methods = kvreplay::MethodRegistration::methods};
