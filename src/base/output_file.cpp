#include "base/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <system_error>

#include "base/digest.h"
#include "base/error.h"

namespace kvreplay {
namespace {

// Temporary files and folders that stand on the disk. Whoever makes, renames or removes one holds the lock.
std::mutex& unfinished_lock() {
  static std::mutex lock;
  return lock;
}
std::set<std::filesystem::path>& unfinished() {
  static std::set<std::filesystem::path> files;
  return files;
}

// The process's own streams by name, as in /dev/stdout: whatever they lead to, nothing can be put in its place.
bool is_stream(const std::filesystem::path& path) { return path.string().starts_with("/proc/"); }

// Renaming onto a symbolic link would replace the link instead of the file that it leads to.
std::filesystem::path follow_links(std::filesystem::path path) {
  constexpr int kLongestChain = 40;  // as Linux allows
  std::error_code failure;           // told by whoever makes the file
  for (int i = 0; i < kLongestChain && !is_stream(path) && std::filesystem::is_symlink(path, failure); ++i) {
    path = path.parent_path() / std::filesystem::read_symlink(path, failure);
  }
  return path;
}

}  // namespace

std::filesystem::path with_suffix(const std::filesystem::path& path, std::string_view suffix) {
  const std::string name = path.filename().string();
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const long limit = ::pathconf(folder.c_str(), _PC_NAME_MAX);
  const auto longest = static_cast<std::size_t>(limit > 0 ? limit : NAME_MAX);
  // What is too long by itself is told by whoever makes the file.
  if (name.size() + suffix.size() <= longest || name.size() > longest) {
    return path.parent_path() / (name + std::string(suffix));
  }
  Digest digest;
  digest.add(name);
  const std::string end = "~" + digest.text() + std::string(suffix);
  std::size_t kept = longest - end.size();
  while (kept > 0 && (static_cast<unsigned char>(name[kept]) & 0xc0) == 0x80) --kept;  // whole characters
  return path.parent_path() / (name.substr(0, kept) + end);
}

OutputFile::OutputFile(std::filesystem::path path) : path_(std::move(path)), destination_(follow_links(path_)) {
  const auto refuse = [this](std::string_view reason) { return Error(fmt::format("{}: {}", path_.string(), reason)); };
  if (path_.empty()) throw Error("the name of a file to write is empty");
  std::error_code failure;  // what cannot be asked cannot be made either, which mkstemp tells
  const std::filesystem::file_status status = std::filesystem::status(destination_, failure);
  if (std::filesystem::is_directory(status)) throw refuse("is a folder; name a file to write");
  if (std::filesystem::exists(status)) {
    if (!std::filesystem::is_regular_file(status) || is_stream(destination_))
      throw refuse("is a device or a pipe; name a file to write");
    if (::access(destination_.c_str(), W_OK) != 0) throw refuse("is write-protected; name another file");
  }
  const std::lock_guard guard(unfinished_lock());
  std::string name = with_suffix(destination_, ".tmp-XXXXXX").string();
  const int file = ::mkstemp(name.data());
  if (file < 0) throw refuse(fmt::format("cannot be written: {}", std::strerror(errno)));
  // mkstemp makes files that only their owner can read; results are as readable as any other file.
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::fchmod(file, 0666 & ~mask);
  ::close(file);
  temporary_ = name;
  unfinished().insert(temporary_);
}

OutputFile::~OutputFile() {
  if (committed_) return;
  const std::lock_guard guard(unfinished_lock());
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
  unfinished().erase(temporary_);
}

void OutputFile::commit() {
  const int file = ::open(temporary_.c_str(), O_RDONLY);
  const bool synced = file >= 0 && ::fsync(file) == 0;
  const int reason = errno;
  if (file >= 0) ::close(file);
  if (!synced) throw Error(fmt::format("{}: cannot be written: {}", path_.string(), std::strerror(reason)));
  const std::lock_guard guard(unfinished_lock());
  std::error_code failure;
  std::filesystem::rename(temporary_, destination_, failure);
  if (failure) throw Error(fmt::format("{}: cannot be put in its place: {}", path_.string(), failure.message()));
  unfinished().erase(temporary_);
  committed_ = true;
}

std::unique_lock<std::mutex> OutputFile::hold_off_abandoning() { return std::unique_lock(unfinished_lock()); }

std::unique_lock<std::mutex> OutputFile::abandon_all() {
  std::unique_lock lock(unfinished_lock());
  for (const std::filesystem::path& file : unfinished()) {
    std::error_code ignored;
    std::filesystem::remove_all(file, ignored);
  }
  return lock;
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

OutputFolder::OutputFolder(std::filesystem::path path) : path_(std::move(path)) {
  if (path_.empty()) throw Error("the name of a folder to write is empty");
  std::filesystem::path plain = path_;
  if (!plain.has_filename()) plain = plain.parent_path();  // "report/"
  destination_ = follow_links(plain);
  std::error_code failure;  // what cannot be asked cannot be made either, which mkdtemp tells
  const std::filesystem::file_status status = std::filesystem::status(destination_, failure);
  if (std::filesystem::exists(status) && !std::filesystem::is_directory(status)) {
    throw Error(fmt::format("{}: is a file; name a folder to write", path_.string()));
  }
  const std::lock_guard guard(unfinished_lock());
  std::string name = with_suffix(destination_, ".tmp-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) {
    throw Error(fmt::format("{}: cannot be written: {}", path_.string(), std::strerror(errno)));
  }
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::chmod(name.c_str(), 0777 & ~mask);  // mkdtemp's are their owner's alone
  temporary_ = name;
  unfinished().insert(temporary_);
}

OutputFolder::~OutputFolder() {
  if (committed_) return;
  const std::lock_guard guard(unfinished_lock());
  std::error_code ignored;
  std::filesystem::remove_all(temporary_, ignored);
  unfinished().erase(temporary_);
}

std::filesystem::path OutputFolder::add_folder(const std::string& name) const {
  const std::lock_guard guard(unfinished_lock());
  std::error_code failure;
  std::filesystem::create_directory(temporary_ / name, failure);
  if (failure) throw Error(fmt::format("{}: cannot be written: {}", (path_ / name).string(), failure.message()));
  return temporary_ / name;
}

void OutputFolder::commit() {
  const std::lock_guard guard(unfinished_lock());
  std::error_code failure;
  const auto refuse = [this](const std::error_code& reason) {
    return Error(fmt::format("{}: cannot be put in its place: {}", path_.string(), reason.message()));
  };
  bool exchanged = false;
#ifdef RENAME_EXCHANGE
  exchanged = ::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, destination_.c_str(), RENAME_EXCHANGE) == 0;
#endif
  if (!exchanged) {
    // A folder that holds something cannot be renamed onto: the old one steps aside, and comes back where the new one
    // cannot take its place.
    const std::filesystem::path old = with_suffix(temporary_, "-old");
    const bool replaces = std::filesystem::exists(destination_, failure);
    if (replaces) std::filesystem::rename(destination_, old, failure);
    if (failure) throw refuse(failure);
    std::filesystem::rename(temporary_, destination_, failure);
    if (failure) {
      std::error_code ignored;
      if (replaces) std::filesystem::rename(old, destination_, ignored);
      throw refuse(failure);
    }
    if (replaces) std::filesystem::rename(old, temporary_, failure);
  }
  // What stood there now stands under the temporary name, if anything does.
  std::filesystem::remove_all(temporary_, failure);
  unfinished().erase(temporary_);
  committed_ = true;
}

TextOutput::TextOutput(const std::filesystem::path& path)
    : output_(path),
      // Reading too, so that it is not made anew where it has just been abandoned.
      stream_(output_.temporary(), std::ios::binary | std::ios::in | std::ios::out) {
  if (!stream_) fail();
}

void TextOutput::add(std::string_view text) {
  if (!stream_.write(text.data(), static_cast<std::streamsize>(text.size()))) fail();
}

void TextOutput::finish() {
  stream_.close();
  if (!stream_) fail();
  output_.commit();
}

void TextOutput::fail() const {
  throw Error(fmt::format("{}: cannot be written: {}", output_.path().string(), std::strerror(errno)));
}

}  // namespace kvreplay
