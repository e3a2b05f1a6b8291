// What stands behind a Tokenizer, and what tokenizer_config.json adds to it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "tracer/tokenizer.h"

namespace kvreplay::tracer {

/// One kind of tokenizer; the functions are Tokenizer's.
class TokenizerBackend {
 public:
  virtual ~TokenizerBackend() = default;
  virtual Encoding encode(std::string_view text, bool add_special_tokens) const = 0;
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;
  virtual std::string piece(std::int32_t id) const = 0;
};

/// The part of tokenizer_config.json that changes token ids.
struct TokenizerConfig {
  struct EndToken {
    std::optional<bool> added;        ///< whether it is put there, where that is said
    bool named = false;               ///< whether there is a word about which one it is
    std::optional<std::string> name;  ///< its text; nothing: there is none
  };
  EndToken bos;
  EndToken eos;
};

/// Reads `folder`/tokenizer_config.json, or gives what an empty one would say. Throws Error.
TokenizerConfig read_tokenizer_config(const std::filesystem::path& folder);

/// A SentencePiece tokenizer.model. `bos_token_id` is used where it has none of its own. Throws Error.
std::unique_ptr<TokenizerBackend> read_sentencepiece(const std::filesystem::path& path, const TokenizerConfig& config,
                                                     std::optional<std::int32_t> bos_token_id);

/// `text` as valid UTF-8 without zeros: bytes that are none are named in angle brackets, such as <0xE6>.
std::string with_bytes_named(std::string_view text);

}  // namespace kvreplay::tracer
