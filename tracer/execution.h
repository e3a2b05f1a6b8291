// How the work of inference is done: by which kernels, on which threads.
#pragma once

#include <functional>
#include <memory>

#include "base/matrix.h"
#include "tracer/kernels.h"

namespace kvreplay::tracer {

/// Kernels and threads that share work in pieces. Work ends when its pieces are done, whichever threads came to do
/// them, and nobody waits by spinning: inference is thousands of short pieces in sequence, and on a machine that others
/// use as well, OpenMP's barriers make every one of them wait for a time slice (measured: 10 times slower).
class Execution {
 public:
  /// `threads` is at least 1, the calling one included.
  explicit Execution(int threads, const Kernels& kernels = best_kernels());
  ~Execution();
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;

  const Kernels& kernels() const { return kernels_; }
  int threads() const { return threads_; }

  /// Calls work(0, w) … work(pieces − 1, w), each once and each whole on one thread, w in [0, threads) telling those
  /// apart that run at the same time, and returns when all are done. Pieces must not touch each other's results; then
  /// these do not depend on the number of threads. `multiplications` is about how much work all of it is: little stays
  /// on the calling thread. Throws what a piece throws. One call at a time, and none from inside a piece.
  void share(Index pieces, Index multiplications, const std::function<void(Index piece, int worker)>& work) const;

 private:
  struct Pool;

  const Kernels& kernels_;
  int threads_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace kvreplay::tracer
