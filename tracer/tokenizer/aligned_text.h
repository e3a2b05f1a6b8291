// Text that was made from another text, and where in that each of its bytes comes from.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "tracer/tokenizer/text_pattern.h"

namespace kvreplay::tracer {

/// UTF-8 text, and for each of its bytes the range of the source's bytes that it stands for: the whole character, or
/// nothing for what was put in.
struct AlignedText {
  std::string text;
  std::vector<TextRange> origins;

  /// `part` of `source`, which is UTF-8, as it stands there.
  static AlignedText copy(std::string_view source, TextRange part);

  AlignedText slice(TextRange range) const;

  /// Adds text that stands for `origin`.
  void append(std::string_view added, TextRange origin);

  /// Adds a part of another text.
  void append(const AlignedText& other, TextRange range);

  /// What the bytes of `range` stand for together.
  TextRange origin_of(TextRange range) const;

  /// Where in the source a text that begins at byte `at` begins.
  std::size_t origin_at(std::size_t at) const;
};

/// `from` with `content` in place of everything that `pattern` matches.
AlignedText replaced(const AlignedText& from, const TextPattern& pattern, std::string_view content);

/// `from` in Unicode's normalization form C.
AlignedText composed(const AlignedText& from);

/// Bytes of the character that the UTF-8 text begins with. The text is not empty.
std::size_t leading_character(std::string_view text);

/// Code point of the character that the UTF-8 text begins with. The text is not empty.
char32_t leading_code_point(std::string_view text);

/// A code point in UTF-8.
std::string utf8(char32_t code_point);

}  // namespace kvreplay::tracer
