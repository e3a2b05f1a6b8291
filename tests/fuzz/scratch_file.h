// The file that an input becomes.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace kvreplay {

/// A file that is opened by name, as a user would; overwritten for each input.
class ScratchFile {
 public:
  ScratchFile() : name_((std::filesystem::temp_directory_path() / "kvreplay-fuzz-XXXXXX").string()) {
    descriptor_ = ::mkstemp(name_.data());
    if (descriptor_ < 0) std::abort();
  }
  ~ScratchFile() {
    ::close(descriptor_);
    ::unlink(name_.c_str());
  }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  const std::string& fill(const std::uint8_t* data, std::size_t size) {
    const auto length = static_cast<off_t>(size);
    if (::ftruncate(descriptor_, 0) != 0 || ::pwrite(descriptor_, data, size, 0) != length) std::abort();
    return name_;
  }

 private:
  std::string name_;
  int descriptor_ = -1;
};

}  // namespace kvreplay
