// Compiled with a smaller alignment of matrices.
#include <cstdlib>

#include "policy/plugin.h"

namespace {

std::vector<kvreplay::Method> methods() { std::abort(); }  // must never be asked for

constexpr kvreplay::BinaryLayout other_layout() {
  kvreplay::BinaryLayout layout;
  layout.matrix_alignment = 16;
  return layout;
}

}  // namespace

extern "C" const kvreplay::PolicyPlugin kvreplay_policy_plugin;
constinit const kvreplay::PolicyPlugin kvreplay_policy_plugin{.layout = other_layout(), .methods = methods};
