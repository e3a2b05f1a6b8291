#include "base/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>

#include "base/error.h"

namespace kvreplay {

OutputFile::OutputFile(std::filesystem::path path) : path_(std::move(path)) {
  if (std::filesystem::is_directory(path_)) {
    throw Error(fmt::format("{}: is a folder; name a file to write", path_.string()));
  }
  std::string name = path_.string() + ".tmp-XXXXXX";
  const int file = ::mkstemp(name.data());
  if (file < 0) throw Error(fmt::format("{}: cannot be written: {}", path_.string(), std::strerror(errno)));
  // mkstemp makes files that only their owner can read; results are as readable as any other file.
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::fchmod(file, 0666 & ~mask);
  ::close(file);
  temporary_ = name;
}

OutputFile::~OutputFile() {
  if (committed_) return;
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
}

void OutputFile::commit() {
  const int file = ::open(temporary_.c_str(), O_RDONLY);
  const bool synced = file >= 0 && ::fsync(file) == 0;
  const int reason = errno;
  if (file >= 0) ::close(file);
  if (!synced) throw Error(fmt::format("{}: cannot be written: {}", path_.string(), std::strerror(reason)));
  std::error_code failure;
  std::filesystem::rename(temporary_, path_, failure);
  if (failure) throw Error(fmt::format("{}: cannot be put in its place: {}", path_.string(), failure.message()));
  committed_ = true;
}

void OutputFile::write_text(const std::filesystem::path& path, std::string_view text) {
  OutputFile output(path);
  const int file = ::open(output.temporary().c_str(), O_WRONLY | O_TRUNC);
  bool written = file >= 0;
  while (written && !text.empty()) {
    const ssize_t count = ::write(file, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      written = false;
    } else {
      text.remove_prefix(static_cast<std::size_t>(count));
    }
  }
  const int reason = errno;
  if (file >= 0) ::close(file);
  if (!written) throw Error(fmt::format("{}: cannot be written: {}", path.string(), std::strerror(reason)));
  output.commit();
}

}  // namespace kvreplay
