#include "tracer/tokenizer/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/tokenizer/backend.h"
#include "tracer/tokenizer/tokenizer_json.h"

namespace kvreplay::tracer {

namespace {

constexpr const char* kJsonFile = "tokenizer.json";
constexpr const char* kSentencePieceFile = "tokenizer.model";

}  // namespace

std::string with_bytes_named(std::string_view text) {
  std::string named;
  while (!text.empty()) {
    const std::size_t end = std::min(find_invalid_utf8(text).value_or(text.size()), text.find('\0'));
    named += text.substr(0, end);
    if (end >= text.size()) break;
    named += fmt::format("<0x{:02X}>", static_cast<unsigned char>(text[end]));
    text.remove_prefix(end + 1);
  }
  return named;
}

bool Tokenizer::exists_in(const std::filesystem::path& folder) {
  return std::filesystem::exists(folder / kJsonFile) || std::filesystem::exists(folder / kSentencePieceFile);
}

Tokenizer::Tokenizer(const std::filesystem::path& folder, std::optional<std::int32_t> bos_token_id) {
  if (!exists_in(folder)) {
    throw Error(fmt::format("{}: holds neither {} nor {} (SentencePiece); give the prompt's token ids with --tokens",
                            folder.string(), kJsonFile, kSentencePieceFile));
  }
  if (std::filesystem::exists(folder / kJsonFile)) {
    file_name_ = kJsonFile;
    backend_ = read_tokenizer_json(folder / kJsonFile);
    reads_special_tokens_ = true;
  } else {
    file_name_ = kSentencePieceFile;
    backend_ = read_sentencepiece(folder / kSentencePieceFile, bos_token_id);
  }
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

Encoding Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  return backend_->encode(text, add_special_tokens);
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const { return backend_->decode(ids); }

std::string Tokenizer::piece(std::int32_t id) const { return backend_->piece(id); }

}  // namespace kvreplay::tracer
