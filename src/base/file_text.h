// Small files as a whole.
#pragma once

#include <filesystem>
#include <string>

namespace kvreplay {

/// All bytes of a file. Throws Error that names it, for a folder too.
std::string file_text(const std::filesystem::path& file);

}  // namespace kvreplay
