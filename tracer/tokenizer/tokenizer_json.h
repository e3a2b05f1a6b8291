// The tokenizer.json of Hugging Face's tokenizers: byte-pair encodings of text, byte-level (Llama 3, Qwen) or after
// SentencePiece (Llama 2, Mistral, Gemma).
#pragma once

#include <filesystem>
#include <memory>
#include <string_view>

#include "tracer/tokenizer/backend.h"

namespace kvreplay::tracer {

/// A tokenizer from the content of a tokenizer.json. Throws Error, without a file's name, for what is malformed or not
/// supported.
std::unique_ptr<TokenizerBackend> parse_tokenizer_json(std::string_view content);

/// The same from a file, which the errors name.
std::unique_ptr<TokenizerBackend> read_tokenizer_json(const std::filesystem::path& path);

}  // namespace kvreplay::tracer
