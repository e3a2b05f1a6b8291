// Byte-pair encoding: a word's characters, joined two at a time in the order of a list of merges.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvreplay::tracer {

/// The order of merges and what becomes of characters without a token are those of Hugging Face's tokenizers.
class Bpe {
 public:
  struct Options {
    std::optional<std::string> unknown_token;  ///< for characters without a token; without it they are dropped
    bool fuse_unknown = false;                 ///< one unknown token for unknown characters in a row
    bool byte_fallback = false;                ///< spell characters without a token in tokens such as <0x0A>
    bool ignore_merges = false;                ///< a word that is a token is that token, whatever the merges
  };

  /// A token of a word.
  struct Token {
    std::int32_t id = 0;
    std::size_t length = 0;  ///< bytes of the word
  };

  struct StringHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  using Vocabulary = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

  Bpe() = default;
  Bpe(Bpe&&) = default;
  Bpe& operator=(Bpe&&) = default;

  /// `merges` in order of preference. Throws Error if one joins what is not in the vocabulary, or if two tokens have
  /// one id.
  Bpe(Vocabulary vocabulary, const std::vector<std::pair<std::string, std::string>>& merges, Options options);

  /// Replaces `tokens` by those of a word, which is UTF-8. Time is n log n in its length. Throws Error where an unknown
  /// token is needed that the vocabulary lacks.
  void encode(std::string_view word, std::vector<Token>& tokens) const;

  std::optional<std::int32_t> id_of(std::string_view token) const;

  /// Null for an id without a token.
  const std::string* token(std::int32_t id) const;

  std::size_t size() const { return vocabulary_.size(); }

 private:
  struct Merge {
    std::uint32_t rank = 0;
    std::int32_t id = 0;  ///< of what the two become
  };

  // Two ids as one number, spread over all its bits.
  struct PairHash {
    std::size_t operator()(std::uint64_t pair) const {
      pair ^= pair >> 32;
      pair *= 0x9e3779b97f4a7c15u;
      return static_cast<std::size_t>(pair ^ pair >> 29);
    }
  };

  static std::uint64_t pair_of(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  void spell(std::string_view word, std::vector<Token>& tokens) const;
  bool spell_in_bytes(std::string_view character, std::vector<Token>& tokens) const;
  const Merge* merge_of(std::int32_t left, std::int32_t right) const;

  Vocabulary vocabulary_;
  std::unordered_map<std::int32_t, const std::string*> tokens_;
  std::unordered_map<std::uint64_t, Merge, PairHash> merges_;
  std::optional<std::int32_t> byte_tokens_[256];
  std::optional<std::int32_t> unknown_;
  Options options_;
};

}  // namespace kvreplay::tracer
