#include "tracer/execution.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kvreplay::tracer {

namespace {

// Below this, waking a thread takes longer than doing its share.
constexpr Index kWorthSharing = 500'000;

// Work that is being shared. A thread that comes late may still hold it when the work is over, but then finds no piece
// and does not touch `work`.
struct Job {
  const std::function<void(Index, int)>& work;
  const Index pieces;
  std::atomic<Index> next = 0;
  std::atomic<Index> unfinished;
  std::exception_ptr failure;

  Job(const std::function<void(Index, int)>& shared_work, Index count)
      : work(shared_work), pieces(count), unfinished(count) {}
};

}  // namespace

struct Execution::Pool {
  std::mutex mutex;
  std::condition_variable work_came;
  std::condition_variable work_ended;
  std::shared_ptr<Job> job;
  bool stopping = false;
  std::vector<std::thread> workers;

  void take_pieces(Job& current, int worker) {
    for (Index piece = current.next++; piece < current.pieces; piece = current.next++) {
      try {
        current.work(piece, worker);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!current.failure) current.failure = std::current_exception();
      }
      if (--current.unfinished == 0) {
        const std::lock_guard lock(mutex);
        work_ended.notify_one();
      }
    }
  }

  void serve(int worker) {
    std::shared_ptr<Job> last;
    std::unique_lock lock(mutex);
    while (true) {
      work_came.wait(lock, [&] { return stopping || (job != nullptr && job != last); });
      if (stopping) return;
      last = job;
      lock.unlock();
      take_pieces(*last, worker);
      lock.lock();
    }
  }

  void share(Index pieces, const std::function<void(Index, int)>& work) {
    const auto current = std::make_shared<Job>(work, pieces);
    {
      const std::lock_guard lock(mutex);
      job = current;
    }
    work_came.notify_all();
    take_pieces(*current, 0);
    std::unique_lock lock(mutex);
    work_ended.wait(lock, [&] { return current->unfinished == 0; });
    job = nullptr;
    if (current->failure) std::rethrow_exception(current->failure);
  }
};

Execution::Execution(int threads) : threads_(threads), pool_(std::make_unique<Pool>()) {
  for (int worker = 1; worker < threads; ++worker) {
    pool_->workers.emplace_back([pool = pool_.get(), worker] { pool->serve(worker); });
  }
}

Execution::~Execution() {
  {
    const std::lock_guard lock(pool_->mutex);
    pool_->stopping = true;
  }
  pool_->work_came.notify_all();
  for (std::thread& worker : pool_->workers) worker.join();
}

void Execution::share(Index pieces, Index multiplications,
                      const std::function<void(Index piece, int worker)>& work) const {
  if (threads_ == 1 || pieces == 1 || multiplications < kWorthSharing) {
    for (Index piece = 0; piece < pieces; ++piece) work(piece, 0);
  } else {
    pool_->share(pieces, work);
  }
}

}  // namespace kvreplay::tracer
