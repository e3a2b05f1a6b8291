#include <stdexcept>

#include "policy/plugin.h"

namespace kvreplay {
namespace {

const MethodRegistration throws([]() -> Method { throw std::runtime_error("the table of weights\nis missing"); });

}  // namespace
}  // namespace kvreplay
