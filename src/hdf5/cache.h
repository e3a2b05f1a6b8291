// What HDF5 keeps of files in memory.
#pragma once

#include "base/matrix.h"

namespace kvreplay::hdf5 {

/// Up to so many bytes of unpacked chunks are kept of every dataset that is not read directly, ...
constexpr Index kChunksKept = Index{1} << 20;

/// ... and none of files that are opened from now on; nor memory that it gave up. Before other threads open any.
void keep_little();

/// The most bytes that an open file takes: its metadata that HDF5 keeps, and what belongs to that.
constexpr Index kFileMemory = Index{6} << 20;

}  // namespace kvreplay::hdf5
