// Large float arrays that are used for a moment and needed again at once.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

#include "base/matrix.h"

namespace kvreplay {

/// Uninitialised floats, aligned to 64 bytes. The memory of buffers that were given up is kept, by default up to 256
/// MiB of it, and handed to the next that fit, of whatever thread: fresh pages from the system cost as much as filling
/// them.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Index size);
  ~Buffer() { release(); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  float* data() { return data_; }
  const float* data() const { return data_; }
  Index size() const { return size_; }
  std::span<float> part(Index first, Index count) { return {data_ + first, static_cast<std::size_t>(count)}; }
  std::span<const float> part(Index first, Index count) const {
    return {data_ + first, static_cast<std::size_t>(count)};
  }

  /// How much memory is kept from now on.
  static void keep_at_most(Index bytes);

  /// Gives back to the system what is kept.
  static void give_back();

 private:
  void release();

  float* data_ = nullptr;
  Index size_ = 0;
  std::size_t capacity_ = 0;  // bytes
};

}  // namespace kvreplay
