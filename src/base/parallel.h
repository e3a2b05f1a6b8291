// Loops over independent pieces of work.
#pragma once

#include <omp.h>

#include <cstddef>
#include <exception>
#include <vector>

namespace kvreplay {

/// Calls work(0) … work(count − 1), spread over OpenMP's threads, or over `threads` of them where that is not 0, each
/// piece whole on one thread. Pieces must not touch each other's results; then the outcome does not depend on the
/// number of threads. If pieces throw, the exception of the lowest of them is thrown after all have ended.
template <class Work>
void parallel_for(int count, const Work& work, int threads = 0) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(count));
  const int used = threads > 0 ? threads : omp_get_max_threads();
#pragma omp parallel for schedule(dynamic, 1) num_threads(used)
  for (int i = 0; i < count; ++i) {
    try {
      work(i);
    } catch (...) {
      failures[static_cast<std::size_t>(i)] = std::current_exception();
    }
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace kvreplay
