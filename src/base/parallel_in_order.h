// Loops over independent pieces of work whose results are wanted one by one.
#pragma once

#include <omp.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvreplay {

/// Calls work(0) … work(count − 1), each on one of `threads` threads, of OpenMP's where that is 0, and done(i, result)
/// on the calling thread with what each returned, in order: as soon as the calling thread has ended the piece that it
/// works on itself, not once all have ended. At most 2 · threads − 1 pieces are begun and not done. Where work throws,
/// done is still called for all pieces before it; nothing is begun after an exception, of work or done, and the lowest
/// is thrown.
template <class Work, class Done>
void parallel_in_order(int count, const Work& work, const Done& done, int threads = 0) {
  using Result = std::invoke_result_t<const Work&, int>;
  const int used = std::clamp(threads > 0 ? threads : omp_get_max_threads(), 1, std::max(count, 1));
  std::vector<std::optional<Result>> results(static_cast<std::size_t>(count));
  std::exception_ptr failure;
  int begun = 0;
  int handed = 0;
  int end = count;  // where work stops
  std::mutex mutex;
  std::condition_variable changed;
  const auto fail = [&](int piece) {
    if (piece >= end) return;
    end = piece;
    failure = std::current_exception();
  };
#pragma omp parallel num_threads(used)
  {
    const bool calling = omp_get_thread_num() == 0;
    std::unique_lock guard(mutex);
    while (calling ? handed < end : begun < end) {
      if (calling && results[static_cast<std::size_t>(handed)]) {
        const int piece = handed;
        Result result = std::move(*results[static_cast<std::size_t>(piece)]);
        results[static_cast<std::size_t>(piece)].reset();
        guard.unlock();
        try {
          done(piece, std::move(result));
          guard.lock();
          ++handed;
        } catch (...) {
          guard.lock();
          fail(piece);
        }
      } else if (begun < std::min(end, handed + 2 * used - 1)) {
        const int piece = begun++;
        guard.unlock();
        try {
          Result result = work(piece);
          guard.lock();
          results[static_cast<std::size_t>(piece)] = std::move(result);
        } catch (...) {
          if (!guard.owns_lock()) guard.lock();
          fail(piece);
        }
      } else {
        changed.wait(guard);
        continue;
      }
      changed.notify_all();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace kvreplay
