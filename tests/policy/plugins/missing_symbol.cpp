// Needs what this kvreplay does not have.
#include "policy/plugin.h"

namespace kvreplay {
std::vector<Method> methods_of_a_later_version();
}

KVREPLAY_POLICY_PLUGIN() { return kvreplay::methods_of_a_later_version(); }
