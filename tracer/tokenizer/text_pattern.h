// What a tokenizer looks for in a text: a fixed text or a regular expression.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay::tracer {

/// A half-open range of a text's bytes.
struct TextRange {
  std::size_t begin = 0;
  std::size_t end = 0;

  bool operator==(const TextRange&) const = default;
};

/// The regular expressions of tokenizer.json are Oniguruma's: this is the same one for PCRE2, to be compiled with
/// PCRE2_UTF. Throws Error for whatever is not known to mean the same in both.
std::string pcre2_expression(std::string_view oniguruma);

/// Whether the text, which is UTF-8 and not empty, begins with a character of a word: a letter, a mark, a digit or a
/// connector such as the underscore (Unicode's definition, UTS 18 annex C).
bool begins_with_word_character(std::string_view text);

class TextPattern {
 public:
  /// Finds `text` itself, which is not empty.
  static TextPattern literal(std::string text);

  /// Finds matches of a regular expression in Oniguruma's syntax. Throws Error that quotes it if it is not supported.
  static TextPattern expression(std::string_view oniguruma);

  /// Appends the matches in `text`, which is UTF-8, from left to right; none is empty. Throws Error where the
  /// expression takes too many steps.
  void find(std::string_view text, std::vector<TextRange>& matches) const;

 private:
  struct Compiled;
  std::string literal_;
  std::shared_ptr<const Compiled> compiled_;  // null: literal_ is meant
};

}  // namespace kvreplay::tracer
