#include "base/work.h"

#include <atomic>

namespace kvreplay {
namespace {

std::atomic<std::int64_t> bytes_read{0};
std::atomic<std::int64_t> operations_done{0};
std::atomic<std::int64_t> exponentials_taken{0};

}  // namespace

void count_bytes(std::int64_t bytes) { bytes_read.fetch_add(bytes, std::memory_order_relaxed); }

void count_operations(std::int64_t operations) { operations_done.fetch_add(operations, std::memory_order_relaxed); }

void count_exponentials(std::int64_t exponentials) {
  exponentials_taken.fetch_add(exponentials, std::memory_order_relaxed);
}

Work work_done() {
  return {.bytes = static_cast<double>(bytes_read.load(std::memory_order_relaxed)),
          .operations = static_cast<double>(operations_done.load(std::memory_order_relaxed)),
          .exponentials = static_cast<double>(exponentials_taken.load(std::memory_order_relaxed))};
}

}  // namespace kvreplay
