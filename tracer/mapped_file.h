// Files of weights, in memory without being copied.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace kvreplay::tracer {

/// A whole file, read-only, as long as this object lives.
class MappedFile {
 public:
  /// Throws Error if `path` is no file or cannot be read.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvreplay::tracer
