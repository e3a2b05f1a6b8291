#include "tracer/tokenizer/aligned_text.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "base/error.h"

namespace kvreplay::tracer {

namespace {

std::string in_form_c(std::string_view text) {
  utf8proc_uint8_t* result = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &result, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (length < 0) throw Error(fmt::format("normalizing a text to NFC: {}", utf8proc_errmsg(length)));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  return {reinterpret_cast<const char*>(result), static_cast<std::size_t>(length)};
}

// Whether normalization may join the character to what stands before it: it would be a mark, or a vowel or a final
// consonant of a Hangul syllable.
bool may_join_previous(char32_t code_point) {
  const auto value = static_cast<utf8proc_int32_t>(code_point);
  if (value < 0x300) return false;
  if (value >= 0x1160 && value < 0x1200) return true;
  if (utf8proc_get_property(value)->combining_class != 0) return true;
  const auto category = utf8proc_category(value);
  return category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC || category == UTF8PROC_CATEGORY_ME;
}

// Bytes until the next character that joins nothing before it. `text` is not empty.
std::size_t leading_cluster(std::string_view text) {
  std::size_t length = leading_character(text);
  while (length < text.size() && may_join_previous(leading_code_point(text.substr(length)))) {
    length += leading_character(text.substr(length));
  }
  return length;
}

}  // namespace

AlignedText AlignedText::copy(std::string_view source, TextRange part) {
  AlignedText copied;
  copied.text = source.substr(part.begin, part.end - part.begin);
  copied.origins.reserve(copied.text.size());
  for (std::size_t at = part.begin; at < part.end;) {
    const std::size_t length = leading_character(source.substr(at));
    copied.origins.insert(copied.origins.end(), length, TextRange{at, at + length});
    at += length;
  }
  return copied;
}

AlignedText AlignedText::slice(TextRange range) const {
  AlignedText part;
  part.append(*this, range);
  return part;
}

void AlignedText::append(std::string_view added, TextRange origin) {
  text += added;
  origins.insert(origins.end(), added.size(), origin);
}

void AlignedText::append(const AlignedText& other, TextRange range) {
  text.append(other.text, range.begin, range.end - range.begin);
  origins.insert(origins.end(), other.origins.begin() + static_cast<std::ptrdiff_t>(range.begin),
                 other.origins.begin() + static_cast<std::ptrdiff_t>(range.end));
}

TextRange AlignedText::origin_of(TextRange range) const {
  TextRange whole{origin_at(range.begin), origin_at(range.begin)};
  for (std::size_t at = range.begin; at < range.end; ++at) {
    const TextRange& origin = origins[at];
    if (origin.begin == origin.end) continue;
    if (whole.begin == whole.end) whole = origin;
    whole.begin = std::min(whole.begin, origin.begin);
    whole.end = std::max(whole.end, origin.end);
  }
  return whole;
}

std::size_t AlignedText::origin_at(std::size_t at) const {
  if (at < origins.size()) return origins[at].begin;
  return origins.empty() ? 0 : origins.back().end;
}

AlignedText replaced(const AlignedText& from, const TextPattern& pattern, std::string_view content) {
  std::vector<TextRange> matches;
  pattern.find(from.text, matches);
  if (matches.empty()) return from;
  AlignedText to;
  to.text.reserve(from.text.size());
  to.origins.reserve(from.text.size());
  std::size_t reached = 0;
  for (const TextRange& match : matches) {
    to.append(from, {reached, match.begin});
    to.append(content, from.origin_of(match));
    reached = match.end;
  }
  to.append(from, {reached, from.text.size()});
  return to;
}

AlignedText composed(const AlignedText& from) {
  const std::string whole = in_form_c(from.text);
  if (whole == from.text) return from;
  // Cluster by cluster, to know what came from where.
  AlignedText to;
  to.text.reserve(whole.size());
  to.origins.reserve(whole.size());
  for (std::size_t at = 0; at < from.text.size();) {
    const std::size_t length = leading_cluster(std::string_view(from.text).substr(at));
    const TextRange cluster{at, at + length};
    const std::string_view before = std::string_view(from.text).substr(at, length);
    const std::string after = length > 1 ? in_form_c(before) : std::string(before);
    if (after == before) {
      to.append(from, cluster);
    } else {
      to.append(after, from.origin_of(cluster));
    }
    at += length;
  }
  if (to.text == whole) return to;
  // A newer Unicode than the rule above knows.
  AlignedText coarse;
  coarse.append(whole, from.origin_of({0, from.text.size()}));
  return coarse;
}

std::size_t leading_character(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text.front());
  const std::size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  return std::min(length, text.size());
}

char32_t leading_code_point(std::string_view text) {
  const std::size_t length = leading_character(text);
  const auto lead = static_cast<unsigned char>(text.front());
  char32_t code_point = length == 1 ? lead : lead & (0x7fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    code_point = code_point << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
  }
  return code_point;
}

std::string utf8(char32_t code_point) {
  std::string text;
  if (code_point < 0x80) {
    text += static_cast<char>(code_point);
    return text;
  }
  const int following = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xff00u >> (following + 1) & 0xffu) | code_point >> (6 * following));
  for (int i = following - 1; i >= 0; --i) text += static_cast<char>(0x80u | (code_point >> (6 * i) & 0x3fu));
  return text;
}

}  // namespace kvreplay::tracer
