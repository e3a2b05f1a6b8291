// Compiled with a smaller alignment of matrices.
#include <cstdlib>

#include "policy/plugin_interface.h"

namespace kvreplay {
namespace {

const MethodRegistration never_asked_for([]() -> Method { std::abort(); });

constexpr BinaryLayout other_layout() {
  BinaryLayout layout;
  layout.matrix_alignment = 16;
  return layout;
}

}  // namespace
}  // namespace kvreplay

extern "C" const kvreplay::PolicyPlugin kvreplay_policy_plugin;
constinit const kvreplay::PolicyPlugin kvreplay_policy_plugin{.layout = kvreplay::other_layout(),
                                                              .methods = kvreplay::MethodRegistration::methods};
