// Memory of this process, as the system counts it.
#pragma once

#include <string>

#include "base/matrix.h"

namespace kvreplay {

/// Bytes that are in memory now, and the most that ever were: program and libraries, heap and stacks. 0 where the
/// system does not say.
Index resident_memory();
Index peak_resident_memory();

/// From now on memory that is given up soon goes back to the system, where the C library can be told so. Costs time
/// where much is given up and taken again.
void give_memory_back();

/// Gives back what lies unused between what is in use. Does nothing before give_memory_back() was called.
void trim_memory();

/// Buffers that were given up keep so many bytes, unless Buffer::keep_at_most() says otherwise.
constexpr Index kBuffersKept = Index{256} << 20;

/// As size_text(), but never less: whoever gives what it says gives enough.
std::string enough_text(Index bytes);

}  // namespace kvreplay
