// After which tokens a model has written all that it was to write.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "tracer/model_config.h"
#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {

/// What ends a text beside its length.
struct StopOptions {
  bool by_model = true;                  ///< whether the model's own stop tokens do
  std::vector<std::string> others = {};  ///< further ones: ids in decimal, or texts that are single tokens
};

/// Their ids, ascending. Those of the model are the ids that its configuration names, eos_token of its tokenizer
/// (tokenizer_config.json, special_tokens_map.json), and what ends a turn in its chat template (tokenizer_config.json,
/// chat_template.jinja). A text stands for all tokens that are exactly this text. `tokenizer` may be null. Throws
/// Error where a file is malformed, or one of the others is no token of the model.
std::vector<std::int32_t> stop_ids(const StopOptions& options, const std::filesystem::path& model_folder,
                                   const ModelConfig& config, const Tokenizer* tokenizer);

/// Whether a text that these end is over with its last token.
bool is_over(std::span<const std::int32_t> stop_ids, std::int32_t last);

}  // namespace kvreplay::tracer
