// Loops over independent pieces of work.
#pragma once

#include <cstddef>
#include <exception>
#include <vector>

namespace kvreplay {

/// Calls work(0) … work(count − 1), spread over OpenMP's threads, each piece whole on one thread. Pieces must not touch
/// each other's results; then the outcome does not depend on the number of threads. If pieces throw, the exception of
/// the lowest of them is thrown after all have ended.
template <class Work>
void parallel_for(int count, const Work& work) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(count));
#pragma omp parallel for schedule(dynamic, 1)
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
