// Files that are part of the program: the page and the script that draws pictures.
#pragma once

#include <string_view>

namespace kvreplay {

/// The contents of a file of notebooks-export/page/, or of pictures/render.py, by its name.
std::string_view embedded_file(std::string_view name);

}  // namespace kvreplay
