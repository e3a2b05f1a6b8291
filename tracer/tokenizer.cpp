#include "tracer/tokenizer.h"

#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"

namespace kvreplay::tracer {

struct Tokenizer::State {
  sentencepiece::SentencePieceProcessor processor;
  std::optional<std::int32_t> leading_bos;
};

bool Tokenizer::exists_in(const std::filesystem::path& folder) {
  return std::filesystem::exists(folder / "tokenizer.model");
}

Tokenizer::Tokenizer(const std::filesystem::path& folder, std::optional<std::int32_t> bos_token_id)
    : state_(std::make_unique<State>()) {
  const auto path = folder / "tokenizer.model";
  if (!exists_in(folder)) {
    throw Error(fmt::format("{}: holds no tokenizer.model (SentencePiece); give the prompt's token ids with --tokens",
                            folder.string()));
  }
  std::ifstream stream(path, std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream || !state_->processor.LoadFromSerializedProto(content).ok()) {
    throw Error(
        fmt::format("{}: is not a SentencePiece model; give the prompt's token ids with --tokens", path.string()));
  }

  bool add_bos = true;
  const auto config_path = folder / "tokenizer_config.json";
  if (std::filesystem::exists(config_path)) {
    std::ifstream config_stream(config_path);
    const auto config = nlohmann::json::parse(config_stream, nullptr, false);
    if (!config.is_object()) throw Error(fmt::format("{}: is not a valid JSON object", config_path.string()));
    if (config.contains("add_bos_token") && !config["add_bos_token"].is_null()) {
      if (!config["add_bos_token"].is_boolean()) {
        throw Error(fmt::format("{}: add_bos_token must be true or false", config_path.string()));
      }
      add_bos = config["add_bos_token"].get<bool>();
    }
  }
  if (add_bos) {
    if (state_->processor.bos_id() >= 0) {
      state_->leading_bos = state_->processor.bos_id();
    } else {
      state_->leading_bos = bos_token_id;
    }
  }
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

Encoding Tokenizer::encode(std::string_view text) const {
  Encoding encoding;
  if (state_->leading_bos) {
    encoding.ids.push_back(*state_->leading_bos);
    encoding.bytes.emplace_back(0, 0);
  }
  const auto proto = state_->processor.EncodeAsImmutableProto({text.data(), text.size()});
  for (const auto& piece : proto.pieces()) {
    encoding.ids.push_back(static_cast<std::int32_t>(piece.id()));
    encoding.bytes.emplace_back(piece.begin(), piece.end());
  }
  // SentencePiece gives a spelled-out character's range to its last byte alone.
  for (std::size_t token = encoding.ids.size(); token-- > 1;) {
    auto& [begin, end] = encoding.bytes[token - 1];
    if (begin == end && state_->processor.IsByte(encoding.ids[token - 1])) {
      encoding.bytes[token - 1] = encoding.bytes[token];
    }
  }
  return encoding;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  std::vector<int> known;
  for (const std::int32_t id : ids) {
    if (id >= 0 && id < state_->processor.GetPieceSize() && !state_->processor.IsControl(id)) known.push_back(id);
  }
  return state_->processor.DecodeIds(known);
}

std::string Tokenizer::piece(std::int32_t id) const {
  const auto& processor = state_->processor;
  if (id < 0 || id >= processor.GetPieceSize()) return fmt::format("<{}>", id);
  const std::string& text = processor.IdToPiece(id);
  if (processor.IsByte(id)) {
    // Such as <0x0A>.
    const auto byte = std::strtoul(text.substr(3, 2).c_str(), nullptr, 16);
    return byte > 0 && byte < 0x80 ? std::string(1, static_cast<char>(byte)) : text;
  }
  if (processor.IsControl(id) || processor.IsUnknown(id)) return text;
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

}  // namespace kvreplay::tracer
