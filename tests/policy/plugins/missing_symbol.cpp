// Needs what this kvreplay does not have.
#include "policy/plugin.h"

namespace kvreplay {

Method method_of_a_later_version();

namespace {

const MethodRegistration later([] { return method_of_a_later_version(); });

}  // namespace
}  // namespace kvreplay
