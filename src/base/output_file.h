// Results that are complete or absent, never half-written.
#pragma once

#include <filesystem>
#include <string_view>

namespace kvreplay {

/// A file that is written under a temporary name beside its place and renamed when it is whole.
/// Destroyed before commit(), it takes what was written away again and leaves the place as it was.
class OutputFile {
 public:
  /// Reserves a fresh temporary name in the folder of `path`.
  /// Throws Error if that folder does not exist or cannot be written to.
  explicit OutputFile(std::filesystem::path path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  /// Where to write.
  const std::filesystem::path& temporary() const { return temporary_; }

  /// Where the result will stand.
  const std::filesystem::path& path() const { return path_; }

  /// Brings the written bytes to the disk and puts the file in its place, replacing what stood there. Throws Error.
  void commit();

  /// Writes `text` to `path` as a whole. Throws Error.
  static void write_text(const std::filesystem::path& path, std::string_view text);

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  bool committed_ = false;
};

}  // namespace kvreplay
