// Text from files, fit for a terminal and for one line of an error.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "base/matrix.h"

namespace kvreplay {

/// `text` with control characters, and bytes that are not UTF-8, written as \n, \t or \x1b. A file's name for a model
/// could otherwise move the cursor or recolour what follows.
std::string printable(std::string_view text);

/// Offset of the first byte that is not part of a UTF-8 character, or nothing where all of `text` is UTF-8.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// A number of bytes for a person: "512 B", "22.8 MiB".
std::string size_text(Index bytes);

}  // namespace kvreplay
