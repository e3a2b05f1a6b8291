// The processes that this one was started with.
#pragma once

#include <memory>

#include "sweep/ranks.h"

namespace kvreplay::cli {

/// Those of mpirun, where kvreplay is built with MPI and mpirun or the like started it; otherwise this process alone.
/// Throws UsageError where there are others that a build without MPI could not work together with. To be called once.
std::unique_ptr<Ranks> launched_ranks();

}  // namespace kvreplay::cli
