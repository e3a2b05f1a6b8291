// What a user wants marked in a run, by text or by position: things worth following, such as a planted needle, and
// where the turns of a conversation begin.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trace/trace.h"
#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {

/// An entry of a spans file.
struct SpanRequest {
  std::string label;
  std::string text;  ///< what to look for in the prompt; empty: start and end are given
  int start = 0;     ///< token positions, half-open, BOS counted
  int end = 0;
};

/// Reads a JSON list of {"label": ..., "text": ...} and {"label": ..., "start": ..., "end": ...}. Throws Error.
std::vector<SpanRequest> read_spans(const std::filesystem::path& path);

/// Checks spans that are given in positions against the prompt, and finds those that are given as text: every
/// occurrence becomes a span of that label, from the first to the last token that stands for a byte of it.
/// `encoding` is the tokenized `prompt`, or null where the prompt was given as token ids.
/// Throws Error if a text does not occur or a position is not in the prompt.
std::vector<Span> locate_spans(std::span<const SpanRequest> requests, std::string_view prompt, const Encoding* encoding,
                               int prompt_length);

/// An entry of a file of turns: where a turn of the conversation begins.
struct TurnRequest {
  std::string text;             ///< every occurrence in the prompt begins one; empty: a position or an offset is given
  int position = -1;            ///< in tokens, BOS counted
  std::int64_t character = -1;  ///< into the prompt's text, counted in characters (Unicode code points)
  std::string role = {};        ///< who speaks; empty: nobody is named, in any entry
};

/// Where a turn of the conversation begins, and who speaks, where anybody is named.
struct Turn {
  std::int32_t start = 0;
  std::string role;
};

/// Reads a JSON list of token positions, {"position": ...}, {"text": ...} and {"character": ...}, with a "role" in
/// every entry or in none. Throws Error.
std::vector<TurnRequest> read_turns(const std::filesystem::path& path);

/// The turns in the order of their first tokens. `encoding` is the tokenized `prompt`, or null where the prompt
/// was given as token ids. Throws Error if a text does not occur, something is not in the prompt, or two turns begin at
/// one token.
std::vector<Turn> locate_turns(std::span<const TurnRequest> requests, std::string_view prompt, const Encoding* encoding,
                               int prompt_length);

}  // namespace kvreplay::tracer
