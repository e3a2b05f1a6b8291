#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/file_text.h"
#include "tracer/tokenizer/backend.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

class SentencePieceTokenizer final : public TokenizerBackend {
 public:
  SentencePieceTokenizer(const std::filesystem::path& path, std::optional<std::int32_t> bos_token_id) {
    if (!processor_.LoadFromSerializedProto(file_text(path)).ok()) {
      throw Error(
          fmt::format("{}: is not a SentencePiece model; give the prompt's token ids with --tokens", path.string()));
    }
    const auto config_path = path.parent_path() / "tokenizer_config.json";
    json config = json::object();
    if (std::filesystem::exists(config_path)) {
      config = json::parse(file_text(config_path), nullptr, false);
      if (!config.is_object()) throw Error(fmt::format("{}: is not a valid JSON object", config_path.string()));
    }
    const auto says = [&](const char* key, bool absent) {
      if (!config.contains(key) || config[key].is_null()) return absent;
      if (!config[key].is_boolean())
        throw Error(fmt::format("{}: {} must be true or false", config_path.string(), key));
      return config[key].get<bool>();
    };
    if (says("add_bos_token", true)) {
      leading_bos_ = processor_.bos_id() >= 0 ? std::optional<std::int32_t>(processor_.bos_id()) : bos_token_id;
    }
    if (says("add_eos_token", false) && processor_.eos_id() >= 0) trailing_eos_ = processor_.eos_id();
  }

  Encoding encode(std::string_view text, bool add_special_tokens) const override {
    Encoding encoding;
    if (leading_bos_ && add_special_tokens) {
      encoding.ids.push_back(*leading_bos_);
      encoding.bytes.emplace_back(0, 0);
    }
    const auto proto = processor_.EncodeAsImmutableProto({text.data(), text.size()});
    for (const auto& piece : proto.pieces()) {
      encoding.ids.push_back(static_cast<std::int32_t>(piece.id()));
      encoding.bytes.emplace_back(piece.begin(), piece.end());
    }
    // SentencePiece gives a spelled-out character's range to its last byte alone.
    for (std::size_t token = encoding.ids.size(); token-- > 1;) {
      auto& [begin, end] = encoding.bytes[token - 1];
      if (begin == end && processor_.IsByte(encoding.ids[token - 1])) {
        encoding.bytes[token - 1] = encoding.bytes[token];
      }
    }
    if (trailing_eos_ && add_special_tokens) {
      encoding.ids.push_back(*trailing_eos_);
      encoding.bytes.emplace_back(text.size(), text.size());
    }
    return encoding;
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::vector<int> known;
    for (const std::int32_t id : ids) {
      if (id >= 0 && id < processor_.GetPieceSize() && !processor_.IsControl(id)) known.push_back(id);
    }
    return processor_.DecodeIds(known);
  }

  std::string piece(std::int32_t id) const override {
    if (id < 0 || id >= processor_.GetPieceSize()) return fmt::format("<{}>", id);
    const std::string& text = processor_.IdToPiece(id);
    if (processor_.IsByte(id)) {
      // Such as <0x0A>.
      const auto byte = std::strtoul(text.substr(3, 2).c_str(), nullptr, 16);
      return byte > 0 && byte < 0x80 ? std::string(1, static_cast<char>(byte)) : text;
    }
    if (processor_.IsControl(id) || processor_.IsUnknown(id)) return text;
    // SentencePiece writes spaces as U+2581.
    constexpr std::string_view kSpace = "\u2581";
    std::string spaced;
    std::size_t start = 0;
    for (std::size_t at = text.find(kSpace); at != std::string::npos; at = text.find(kSpace, start)) {
      spaced.append(text, start, at - start).push_back(' ');
      start = at + kSpace.size();
    }
    return spaced.append(text, start);
  }

 private:
  sentencepiece::SentencePieceProcessor processor_;
  std::optional<std::int32_t> leading_bos_;
  std::optional<std::int32_t> trailing_eos_;
};

}  // namespace

std::unique_ptr<TokenizerBackend> read_sentencepiece(const std::filesystem::path& path,
                                                     std::optional<std::int32_t> bos_token_id) {
  return std::make_unique<SentencePieceTokenizer>(path, bos_token_id);
}

}  // namespace kvreplay::tracer
