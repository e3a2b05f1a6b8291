// Things worth following through a run, such as a planted needle: asked for by text or by position.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "trace/trace.h"
#include "tracer/tokenizer.h"

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

}  // namespace kvreplay::tracer
