// What stands behind a Tokenizer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {

/// One kind of tokenizer; the functions are Tokenizer's.
class TokenizerBackend {
 public:
  virtual ~TokenizerBackend() = default;
  virtual Encoding encode(std::string_view text, bool add_special_tokens) const = 0;
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;
  virtual std::string piece(std::int32_t id) const = 0;
};

/// A SentencePiece tokenizer.model, and from tokenizer_config.json beside it whether BOS and EOS stand at the ends of a
/// text (where nothing is said BOS does, as in Llama). `bos_token_id` is used where tokenizer.model has none of its
/// own. Throws Error.
std::unique_ptr<TokenizerBackend> read_sentencepiece(const std::filesystem::path& path,
                                                     std::optional<std::int32_t> bos_token_id);

/// `text` as valid UTF-8 without zeros: bytes that are none are named in angle brackets, such as <0xE6>.
std::string with_bytes_named(std::string_view text);

}  // namespace kvreplay::tracer
