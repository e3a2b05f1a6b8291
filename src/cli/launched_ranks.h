// The processes that this one was started with.
#pragma once

#include <memory>

#include "sweep/ranks.h"

namespace kvreplay::cli {

/// Those of mpirun, where kvreplay is built with MPI and mpirun or the like started it; otherwise this process alone.
/// Throws UsageError where there are others that a build without MPI could not work together with. To be called once.
std::unique_ptr<Ranks> launched_ranks();

/// How many threads one of these processes works with: `asked`, or where that is 0, its share of the processors.
int threads_of(int asked, const Ranks& ranks);

}  // namespace kvreplay::cli
