// Text to token ids and back, with the tokenizer of a model in Hugging Face format.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay::tracer {

/// A tokenized text.
struct Encoding {
  std::vector<std::int32_t> ids;

  /// For each token, the half-open range of the text's bytes that it stands for: empty for what the tokenizer put in
  /// itself (BOS, a leading space), the whole character for each token of one that is spelled out in bytes.
  std::vector<std::pair<std::size_t, std::size_t>> bytes;
};

class TokenizerBackend;

class Tokenizer {
 public:
  /// Whether the folder has a tokenizer that this class reads, or refuses with a reason.
  static bool exists_in(const std::filesystem::path& folder);

  /// Reads tokenizer.json, or, where there is none, tokenizer.model: the choice that transformers makes. Whether BOS
  /// stands before a text says tokenizer.json; or tokenizer_config.json beside tokenizer.model, and where that says
  /// nothing it does, as in Llama. `bos_token_id` is used where tokenizer.model has none of its own. Throws Error.
  Tokenizer(const std::filesystem::path& folder, std::optional<std::int32_t> bos_token_id);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Tokenizes UTF-8 text, with BOS and EOS at its ends where the tokenizer puts them and `add_special_tokens` does not
  /// forbid it. Names of special tokens in the text are these tokens for tokenizer.json, as in Hugging Face's
  /// tokenizers, and ordinary text for tokenizer.model, as in SentencePiece. Throws Error.
  Encoding encode(std::string_view text, bool add_special_tokens = true) const;

  /// The text of `ids`, without special (control) tokens. Ids that the tokenizer does not know are left out.
  std::string decode(std::span<const std::int32_t> ids) const;

  /// What a single token stands for, as valid UTF-8: bytes that are none, control tokens and unknown ids are named in
  /// angle brackets.
  std::string piece(std::int32_t id) const;

  /// Whether names of special tokens in a text are these tokens.
  bool reads_special_tokens() const { return reads_special_tokens_; }

  /// The file that it was read from, without its folder.
  const std::string& file_name() const { return file_name_; }

 private:
  std::unique_ptr<TokenizerBackend> backend_;
  std::string file_name_;
  bool reads_special_tokens_ = false;
};

}  // namespace kvreplay::tracer
