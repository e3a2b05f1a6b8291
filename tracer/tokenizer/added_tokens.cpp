#include "tracer/tokenizer/added_tokens.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/tokenizer/aligned_text.h"

namespace kvreplay::tracer {

namespace {

// Unicode's property White_Space.
bool is_white_space(char32_t code_point) {
  return (code_point >= 0x09 && code_point <= 0x0d) || code_point == 0x20 || code_point == 0x85 || code_point == 0xa0 ||
         code_point == 0x1680 || (code_point >= 0x2000 && code_point <= 0x200a) || code_point == 0x2028 ||
         code_point == 0x2029 || code_point == 0x202f || code_point == 0x205f || code_point == 0x3000;
}

// Of the text, which is not empty.
std::string_view last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return text.substr(at);
}

std::size_t leading_space(std::string_view text) {
  std::size_t length = 0;
  while (length < text.size() && is_white_space(leading_code_point(text.substr(length)))) {
    length += leading_character(text.substr(length));
  }
  return length;
}

std::size_t trailing_space(std::string_view text) {
  const std::size_t size = text.size();
  while (!text.empty() && is_white_space(leading_code_point(last_character(text)))) {
    text.remove_suffix(last_character(text).size());
  }
  return size - text.size();
}

}  // namespace

AddedTokens::AddedTokens() : nodes_(1) {}

void AddedTokens::add(std::string_view pattern, const AddedToken& token) {
  std::size_t at = 0;
  for (const char each : pattern) {
    const auto byte = static_cast<unsigned char>(each);
    auto& edges = nodes_[at].edges;
    const auto edge = std::lower_bound(edges.begin(), edges.end(), std::pair<unsigned char, std::size_t>{byte, 0});
    if (edge != edges.end() && edge->first == byte) {
      at = edge->second;
      continue;
    }
    const std::size_t next = nodes_.size();
    edges.insert(edge, {byte, next});
    nodes_.emplace_back();
    at = next;
  }
  if (nodes_[at].token) {
    throw Error(fmt::format("the added tokens \"{}\" and \"{}\" stand for the same text",
                            printable(tokens_[*nodes_[at].token].content), printable(token.content)));
  }
  nodes_[at].token = tokens_.size();
  tokens_.push_back(token);
  begins_token_[static_cast<unsigned char>(pattern.front())] = true;
}

std::vector<AddedTokens::Part> AddedTokens::split(std::string_view text) const {
  std::vector<Part> parts;
  std::size_t reached = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto match = longest_at_beginning(text.substr(at));
    if (!match) {
      ++at;
      continue;
    }
    TextRange range{at, at + match->length};
    at = range.end;
    const AddedToken& token = *match->token;
    if (token.single_word &&
        ((range.begin > 0 && begins_with_word_character(last_character(text.substr(0, range.begin)))) ||
         (range.end < text.size() && begins_with_word_character(text.substr(range.end))))) {
      continue;
    }
    if (token.lstrip) range.begin = std::max(range.begin - trailing_space(text.substr(0, range.begin)), reached);
    if (token.rstrip) range.end += leading_space(text.substr(range.end));
    range.end = std::max(range.end, range.begin);
    if (reached < range.begin) parts.push_back({{reached, range.begin}, nullptr});
    parts.push_back({range, &token});
    reached = range.end;
  }
  if (reached != text.size()) parts.push_back({{reached, text.size()}, nullptr});
  return parts;
}

std::optional<AddedTokens::Match> AddedTokens::longest_at_beginning(std::string_view text) const {
  if (!begins_token_[static_cast<unsigned char>(text.front())]) return std::nullopt;
  std::optional<Match> longest;
  std::size_t at = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto& edges = nodes_[at].edges;
    const auto edge = std::lower_bound(edges.begin(), edges.end(), std::pair<unsigned char, std::size_t>{byte, 0});
    if (edge == edges.end() || edge->first != byte) break;
    at = edge->second;
    if (nodes_[at].token) longest = Match{i + 1, &tokens_[*nodes_[at].token]};
  }
  return longest;
}

}  // namespace kvreplay::tracer
