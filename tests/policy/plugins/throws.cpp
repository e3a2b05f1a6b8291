#include <stdexcept>

#include "policy/plugin.h"

KVREPLAY_POLICY_PLUGIN() { throw std::runtime_error("the table of weights\nis missing"); }
