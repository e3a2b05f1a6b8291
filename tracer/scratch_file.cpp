#include "tracer/scratch_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"

namespace kvreplay::tracer {

ScratchFile::ScratchFile(std::filesystem::path output) : output_(std::move(output)) {
  std::string name = output_.string() + ".tmp-XXXXXX";
  file_ = ::mkstemp(name.data());
  if (file_ < 0) fail("written");
  ::unlink(name.c_str());
}

ScratchFile::~ScratchFile() { ::close(file_); }

std::int64_t ScratchFile::append(std::span<const std::byte> bytes) {
  const std::int64_t place = end_;
  while (!bytes.empty()) {
    const ssize_t count = ::pwrite(file_, bytes.data(), bytes.size(), end_);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail("written");
    end_ += count;
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
  return place;
}

void ScratchFile::read(std::int64_t place, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t count = ::pread(file_, bytes.data(), bytes.size(), place);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail("made from what waits beside it");
    place += count;
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void ScratchFile::fail(const char* what) const {
  throw Error(fmt::format("{}: cannot be {}: {}", output_.string(), what, std::strerror(errno)));
}

}  // namespace kvreplay::tracer
