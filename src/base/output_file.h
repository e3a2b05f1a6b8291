// Results that are complete or absent, never half-written.
#pragma once

#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <string_view>

namespace kvreplay {

/// `path` with `suffix` behind its name. Where names in its folder cannot be that long, the end of the name gives way,
/// and a digest of the whole stands there, so that different names stay different.
std::filesystem::path with_suffix(const std::filesystem::path& path, std::string_view suffix);

/// A file that is written under a temporary name beside its place and renamed when it is whole.
/// Destroyed before commit(), it takes what was written away again and leaves the place as it was.
class OutputFile {
 public:
  /// Reserves a fresh temporary name in the folder of `path`. Where `path` is a symbolic link, what it leads to is
  /// meant. Throws Error if that folder does not exist or cannot be written to, and if what stands there must not be
  /// replaced: a folder, a device or pipe, a write-protected file.
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

  /// Holds abandon_all() off as long as the lock lives: for who creates the temporary file anew, as a library may that
  /// is given its name, and would leave it behind if it had been removed just before.
  [[nodiscard]] static std::unique_lock<std::mutex> hold_off_abandoning();

  /// Removes what all files and folders of the process have written and not committed, and holds everybody else off as
  /// long as the lock lives. For a process that is about to be ended by a signal, which runs no destructors.
  [[nodiscard]] static std::unique_lock<std::mutex> abandon_all();

 private:
  std::filesystem::path path_;         ///< as given: for messages
  std::filesystem::path destination_;  ///< with symbolic links followed
  std::filesystem::path temporary_;
  bool committed_ = false;
};

/// A folder with the same promises: filled under a temporary name beside its place and renamed when it is whole.
class OutputFolder {
 public:
  /// Makes the temporary folder. What stands at `path` is replaced by commit(); whether it may be is for the caller to
  /// say. Throws Error where the folder around it does not exist or cannot be written to, and where a file stands
  /// there.
  explicit OutputFolder(std::filesystem::path path);
  ~OutputFolder();
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

  /// Where to write. Files are to be written as OutputFile, and folders made by add_folder(): so none appears while
  /// this one is being abandoned.
  const std::filesystem::path& temporary() const { return temporary_; }

  /// Makes the folder `name` in it, and returns where that stands. Throws Error.
  std::filesystem::path add_folder(const std::string& name) const;

  /// Where the result will stand.
  const std::filesystem::path& path() const { return path_; }

  /// Puts the folder in its place; what stood there is gone afterwards. Throws Error, with the place as it was.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path destination_;
  std::filesystem::path temporary_;
  bool committed_ = false;
};

/// A text that is written piece by piece, with an OutputFile's promises.
class TextOutput {
 public:
  explicit TextOutput(const std::filesystem::path& path);

  /// Throws Error.
  void add(std::string_view text);

  /// Puts the file in its place. Throws Error.
  void finish();

 private:
  [[noreturn]] void fail() const;

  OutputFile output_;
  std::ofstream stream_;
};

}  // namespace kvreplay
