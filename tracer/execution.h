// The threads that do the work of inference.
#pragma once

#include <functional>
#include <memory>

#include "base/matrix.h"

namespace kvreplay::tracer {

/// Threads that share work in pieces. Work ends when its pieces are done, whichever threads came to do
/// them, and nobody waits by spinning: inference is thousands of short pieces in sequence, and on a machine that others
/// use as well, OpenMP's barriers make every one of them wait for a time slice (measured: 10 times slower).
class Execution {
 public:
  /// `threads` is at least 1, the calling one included.
  explicit Execution(int threads);
  ~Execution();
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;

  int threads() const { return threads_; }

  /// Calls work(0, w) … work(pieces − 1, w), each once and each whole on one thread, w in [0, threads) telling those
  /// apart that run at the same time, and returns when all are done. Pieces must not touch each other's results; then
  /// these do not depend on the number of threads. `multiplications` is about how much work all of it is: little stays
  /// on the calling thread. Throws what a piece throws. One call at a time, and none from inside a piece.
  void share(Index pieces, Index multiplications, const std::function<void(Index piece, int worker)>& work) const;

 private:
  struct Pool;

  int threads_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace kvreplay::tracer
