#include "base/file_text.h"

#include <fmt/format.h>

#include <array>
#include <fstream>
#include <system_error>

#include "base/error.h"

namespace kvreplay {

std::string file_text(const std::filesystem::path& file) {
  std::error_code ignored;
  if (std::filesystem::is_directory(file, ignored)) {
    throw Error(fmt::format("{}: is a folder, not a file", file.string()));
  }
  std::ifstream stream(file, std::ios::binary);
  std::string text;
  std::array<char, 1 << 14> part;
  while (stream.read(part.data(), part.size()) || stream.gcount() > 0) {
    text.append(part.data(), static_cast<std::size_t>(stream.gcount()));
  }
  if (!stream.eof()) throw Error(fmt::format("{}: cannot be read", file.string()));
  return text;
}

}  // namespace kvreplay
