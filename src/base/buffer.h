// Large float arrays that are used for a moment and needed again at once.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

#include "base/matrix.h"

namespace kvreplay {

/// Uninitialised floats, aligned to 64 bytes. A thread keeps the memory of the buffers that it has given up, up to
/// kKept of them, and hands it to the next that fit: fresh pages from the system cost as much as filling them.
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

  /// Gives back to the system what the calling thread keeps.
  static void trim();

  static constexpr std::size_t kKept = 16;

 private:
  void release();

  float* data_ = nullptr;
  Index size_ = 0;
  std::size_t capacity_ = 0;  // bytes
};

}  // namespace kvreplay
