// Tokens that are looked for in the text itself, before it is divided into words: special tokens, mostly.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tracer/tokenizer/text_pattern.h"

namespace kvreplay::tracer {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool single_word = false;  ///< only where no letter, digit or underscore stands next to it
  bool lstrip = false;       ///< takes the white space before it along
  bool rstrip = false;       ///< takes the white space after it along
  bool normalized = true;    ///< looked for in the normalized text, in its own normalized form
  bool special = false;      ///< left out of decoded text
};

/// Finds tokens in text: from left to right, the longest first.
class AddedTokens {
 public:
  /// A part of a text: a token, or text between tokens.
  struct Part {
    TextRange range;
    const AddedToken* token = nullptr;
  };

  AddedTokens();

  /// Looks for `pattern`, which is not empty, as `token`. Throws Error if another token has the same pattern.
  void add(std::string_view pattern, const AddedToken& token);

  bool empty() const { return tokens_.empty(); }

  /// `text`, which is UTF-8, in parts that cover it. Parts overlap only where white space that one token took along
  /// begins another token.
  std::vector<Part> split(std::string_view text) const;

 private:
  // A node of a tree whose edges are bytes.
  struct Node {
    std::vector<std::pair<unsigned char, std::size_t>> edges;  // in order
    std::optional<std::size_t> token;
  };

  struct Match {
    std::size_t length = 0;
    const AddedToken* token = nullptr;
  };

  std::optional<Match> longest_at_beginning(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_;
  bool begins_token_[256] = {};
};

}  // namespace kvreplay::tracer
