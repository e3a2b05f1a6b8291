// The prompt of a run, and what is known of the run before it begins.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trace/trace.h"
#include "tracer/model.h"
#include "tracer/spans.h"
#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {

/// A model and what it is to read.
struct PromptOptions {
  std::filesystem::path model_folder;

  /// The prompt: text for the model's tokenizer, or ids that are taken as they are.
  std::optional<std::string> prompt_text;
  std::vector<std::int32_t> prompt_ids;
  /// The text is a chat that a template has written out, special tokens and all: the tokenizer adds none at its ends.
  bool prompt_is_templated = false;
  std::string prompt_name;  ///< where it came from, for the trace's provenance; no path

  std::vector<SpanRequest> spans;
  std::vector<TurnRequest> turns;
};

/// A prompt as the model takes it.
struct Prompt {
  std::unique_ptr<Tokenizer> tokenizer;  ///< null where the model's folder has none
  std::vector<std::int32_t> ids;
  std::vector<Span> spans;
  std::vector<Turn> turns;
};

/// Throws Error where the prompt is empty, is not in the model's vocabulary, or does not hold what is to be marked.
Prompt prepare_prompt(const PromptOptions& options, const ModelConfig& config);

/// The run as far as its prompt, of whose queries those from `first_captured` on are captured.
TraceInfo describe(const PromptOptions& options, const Model& model, const Prompt& prompt, Index first_captured);

/// Of a run of `prompt` tokens and up to `later` that follow: what is to be told of its length; nothing where it is as
/// the model was made for. Throws Error where generated tokens would see less than a trace or a live run can say.
std::optional<std::string> length_warning(const ModelConfig& config, const std::filesystem::path& model_folder,
                                          Index prompt, Index later);

/// The tokens' texts, or none without a tokenizer.
std::vector<std::string> pieces_of(const Tokenizer* tokenizer, std::span<const std::int32_t> ids);

/// What was generated after a prompt as text, with the space that a text's first word would lose.
std::string text_after(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt,
                       std::span<const std::int32_t> generated);

/// Reads whitespace-separated decimal token ids. Throws Error, beginning with `name`, at anything else, and if there
/// are none.
std::vector<std::int32_t> parse_token_ids(std::string_view text, std::string_view name);

}  // namespace kvreplay::tracer
