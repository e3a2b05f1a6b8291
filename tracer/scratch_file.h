// Bytes that wait on the disk until they are wanted again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace kvreplay::tracer {

/// A file without a name: it is gone with this object, and with the process, however that ends.
class ScratchFile {
 public:
  /// Stands beside `output`, whose disk it shares. Throws Error, as does append(), as if `output` could not be written.
  explicit ScratchFile(std::filesystem::path output);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  /// Writes behind what is there and gives the place of the first byte. Throws Error if the disk is full.
  std::int64_t append(std::span<const std::byte> bytes);

  /// Reads what was appended. Throws Error.
  void read(std::int64_t place, std::span<std::byte> bytes) const;

 private:
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path output_;
  int file_ = -1;
  std::int64_t end_ = 0;
};

}  // namespace kvreplay::tracer
