// Captures a run: a prompt through a real model, and what it generates, into a kvtrace file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "trace/trace.h"
#include "tracer/prompt.h"
#include "tracer/sampling.h"
#include "tracer/stop_tokens.h"
#include "tracer/transformer.h"

namespace kvreplay::tracer {

/// How far a capture is.
struct CaptureProgress {
  enum class Stage { prefill, decode };
  Stage stage = Stage::prefill;
  double fraction = 0;           ///< of the stage
  double tokens_per_second = 0;  ///< of prefill or decode; 0 while it cannot be told
};

struct CaptureOptions : PromptOptions {
  int generate = 0;                 ///< tokens to generate, fewer if one of them is a stop token
  SamplingOptions sampling;         ///< of these
  StopOptions stop;                 ///< of these
  std::optional<int> query_window;  ///< capture only the last so many prompt queries and all after; nothing: all
  DType dtype = DType::float32;     ///< of the tensors in the file
  bool output_projection = true;    ///< whether the file holds the layers' output projections
  std::filesystem::path output;
  Transformer::Options execution;

  std::function<void(const CaptureProgress&)> on_progress;  ///< may be empty
  std::function<void(const std::string& line)> on_warning;  ///< may be empty
};

struct CaptureSummary {
  std::filesystem::path output;
  std::uintmax_t file_bytes = 0;
  int num_layers = 0;
  int prompt_tokens = 0;
  int queries = 0;
  std::vector<std::int32_t> generated_ids;
  std::optional<std::string> generated_text;  ///< nothing where the model's folder has no tokenizer
  bool ended = false;                         ///< the last generated token is a stop token
  std::string last_piece;                     ///< that token's text; empty where it is not known
  double prefill_seconds = 0;                 ///< without what writing took
  double decode_seconds = 0;                  ///< the same, of all generated tokens but the first, which prefill gives
};

/// Runs the model on the prompt, generates, and writes what each layer produces into the trace as soon as it is there.
/// Keys and values stay in memory as well, in float32, where a generated token attends to them: where more than one is
/// generated.
/// Throws Error, leaving no file, if anything cannot be read, run or written; what can be known before the model runs
/// is checked before.
CaptureSummary capture(const CaptureOptions& options);

}  // namespace kvreplay::tracer
