// A field of a CSV file.
#pragma once

#include <string>

namespace kvreplay {

/// `text` as RFC 4180 wants it: quoted where it holds a comma, a quote or the end of a line.
std::string csv_field(const std::string& text);

}  // namespace kvreplay
