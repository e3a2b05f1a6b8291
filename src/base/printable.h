// Text from files, fit for a terminal and for one line of an error.
#pragma once

#include <string>
#include <string_view>

namespace kvreplay {

/// `text` with control characters, and bytes that are not UTF-8, written as \n, \t or \x1b. A file's name for a model
/// could otherwise move the cursor or recolour what follows.
std::string printable(std::string_view text);

}  // namespace kvreplay
