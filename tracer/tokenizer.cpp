#include "tracer/tokenizer.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file_text.h"
#include "base/printable.h"
#include "tracer/tokenizer_backend.h"
#include "tracer/tokenizer_json.h"

namespace kvreplay::tracer {

namespace {

constexpr const char* kJsonFile = "tokenizer.json";
constexpr const char* kSentencePieceFile = "tokenizer.model";

TokenizerConfig::EndToken read_end_token(const nlohmann::json& config, const std::string& name,
                                         const std::filesystem::path& path) {
  TokenizerConfig::EndToken end;
  const auto added = config.find("add_" + name);
  if (added != config.end() && !added->is_null()) {
    if (!added->is_boolean()) throw Error(fmt::format("{}: add_{} must be true or false", path.string(), name));
    end.added = added->get<bool>();
  }
  const auto token = config.find(name);
  if (token == config.end()) return end;
  end.named = true;
  if (token->is_string()) {
    end.name = token->get<std::string>();
  } else if (token->is_object() && token->contains("content") && (*token)["content"].is_string()) {
    end.name = (*token)["content"].get<std::string>();
  } else if (!token->is_null()) {
    throw Error(fmt::format("{}: {} must be the text of a token", path.string(), name));
  }
  return end;
}

}  // namespace

TokenizerConfig read_tokenizer_config(const std::filesystem::path& folder) {
  TokenizerConfig config;
  const auto path = folder / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return config;
  const auto content = nlohmann::json::parse(file_text(path), nullptr, false);
  if (!content.is_object()) throw Error(fmt::format("{}: is not a valid JSON object", path.string()));
  config.bos = read_end_token(content, "bos_token", path);
  config.eos = read_end_token(content, "eos_token", path);
  return config;
}

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
  const TokenizerConfig config = read_tokenizer_config(folder);
  if (std::filesystem::exists(folder / kJsonFile)) {
    file_name_ = kJsonFile;
    backend_ = read_tokenizer_json(folder / kJsonFile, config, bos_token_id);
  } else {
    file_name_ = kSentencePieceFile;
    backend_ = read_sentencepiece(folder / kSentencePieceFile, config, bos_token_id);
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
