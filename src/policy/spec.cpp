#include "policy/spec.h"

#include <fmt/format.h>

#include <cctype>

#include "base/error.h"

namespace kvreplay {
namespace {

class SpecParser {
 public:
  explicit SpecParser(std::string_view text) : text_(text) {}

  std::vector<SpecPart> parse() {
    std::vector<SpecPart> parts;
    do {
      parts.push_back(part());
    } while (accept('+'));
    if (!at_end()) fail("'+' or the end");
    return parts;
  }

 private:
  SpecPart part() {
    SpecPart part{name("a name"), {}};
    if (!accept('(')) return part;
    if (accept(')')) return part;
    do {
      const std::size_t start = at_;
      std::string key = name("a parameter's name");
      const bool named = accept('=');
      if (!named && (!part.arguments.empty() || !(next_is(',') || next_is(')')))) {
        fail(fmt::format("'=' after '{}'", key));
      }
      if (!named) {
        at_ = start;
        key.clear();
      }
      std::string text = value();
      for (const auto& [earlier, ignored] : part.arguments) {
        if (earlier == key) {
          throw UsageError(fmt::format("policy '{}': parameter '{}' is given twice", text_, key));
        }
      }
      part.arguments.emplace_back(std::move(key), std::move(text));
    } while (accept(','));
    if (!accept(')')) fail("',' or ')'");
    return part;
  }

  std::string name(std::string_view expected) {
    skip_spaces();
    const std::size_t start = at_;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) != 0 || text_[at_] == '-' ||
                                  text_[at_] == '_' || text_[at_] == '@' || text_[at_] == '.')) {
      ++at_;
    }
    if (at_ == start) fail(expected);
    return std::string(text_.substr(start, at_ - start));
  }

  // Everything up to the ',' or ')' that ends this argument; a nested spec brings its own, balanced.
  std::string value() {
    skip_spaces();
    if (at_ < text_.size() && text_[at_] == '"') return quoted();
    const std::size_t start = at_;
    int depth = 0;
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (depth == 0 && (c == ',' || c == ')')) break;
      if (c == '(') ++depth;
      if (c == ')') --depth;
    }
    std::size_t end = at_;
    while (end > start && std::isspace(static_cast<unsigned char>(text_[end - 1])) != 0) --end;
    if (end == start) fail("a value");
    return std::string(text_.substr(start, end - start));
  }

  std::string quoted() {
    std::string value;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\' && at_ + 1 < text_.size()) ++at_;
      value += text_[at_];
    }
    if (at_ == text_.size()) fail("a closing '\"'");
    ++at_;
    return value;
  }

  bool accept(char c) {
    skip_spaces();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  bool next_is(char c) {
    skip_spaces();
    return at_ < text_.size() && text_[at_] == c;
  }

  bool at_end() {
    skip_spaces();
    return at_ == text_.size();
  }

  void skip_spaces() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) ++at_;
  }

  [[noreturn]] void fail(std::string_view expected) const {
    const std::string found = at_ < text_.size() ? fmt::format("'{}'", text_.substr(at_)) : "the end";
    throw UsageError(
        fmt::format("policy '{}': expected {} at character {}, found {}; a spec reads "
                    "name(key=value,...)+name(...)",
                    text_, expected, at_ + 1, found));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

std::vector<SpecPart> parse_spec(std::string_view text) { return SpecParser(text).parse(); }

std::string quote_value(const std::string& value) {
  // A value that is balanced and free of separators at its top level, like a nested spec, stands as it is.
  int depth = 0;
  bool plain = !value.empty() && value.front() != '"' && std::isspace(static_cast<unsigned char>(value.front())) == 0 &&
               std::isspace(static_cast<unsigned char>(value.back())) == 0;
  for (const char c : value) {
    if (c == '(') ++depth;
    if ((c == ')' && --depth < 0) || (c == ',' && depth == 0)) plain = false;
  }
  if (plain && depth == 0) return value;
  std::string quoted = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + '"';
}

}  // namespace kvreplay
