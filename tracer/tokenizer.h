// Text to token ids and back, for models with a SentencePiece tokenizer.model.
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

class Tokenizer {
 public:
  /// Whether the folder has a tokenizer that this class reads.
  static bool exists_in(const std::filesystem::path& folder);

  /// Reads tokenizer.model, and from tokenizer_config.json whether BOS stands before a text (it does where nothing is
  /// said, as in Llama). `bos_token_id` is used where tokenizer.model has none of its own. Throws Error.
  Tokenizer(const std::filesystem::path& folder, std::optional<std::int32_t> bos_token_id);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Tokenizes UTF-8 text as it is: names of control tokens in it are ordinary text. Throws Error.
  Encoding encode(std::string_view text) const;

  /// The text of `ids`, without control tokens. Ids that the tokenizer does not know are left out.
  std::string decode(std::span<const std::int32_t> ids) const;

  /// What a single token stands for, as valid UTF-8: bytes that are none, control tokens and unknown ids are named in
  /// angle brackets.
  std::string piece(std::int32_t id) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay::tracer
