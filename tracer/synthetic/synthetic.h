// Traces of any size without a model: tensors drawn at random around the structures that real attention has. See
// docs/synthetic-traces.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <vector>

#include "trace/trace.h"
#include "tracer/execution.h"

namespace kvreplay::tracer {

/// What a query head attends to, besides the sinks, the heavy hitters and the noise that all of them see.
enum class HeadRole {
  local,      ///< a band of positions before the query
  global,     ///< nothing more: the heavy hitters count for most
  drifting,   ///< a region that moves through the prompt while the queries advance by a few
  retrieval,  ///< the planted evidence, when it is asked for
};

/// A trace to be made. The shape defaults to that of Llama-3-8B.
struct SyntheticTrace {
  int num_layers = 32;
  int num_attention_heads = 32;
  int num_key_value_heads = 8;
  int head_dim = 128;  ///< at least 8: the structures need dimensions of their own
  int hidden_size = 4096;
  int prompt_tokens = 4096;
  int later_tokens = 32;                 ///< after the prompt, each with a captured query; with the prompt at least 2
  std::optional<int> query_window = 64;  ///< capture only the last so many prompt queries and all after; nothing: all
  DType dtype = DType::float32;          ///< of the tensors in the file
  bool output_projection = true;
  bool attention_mass = false;  ///< takes all prompt queries: time grows with the square of the prompt
  std::uint64_t seed = 0;

  int num_tokens() const { return prompt_tokens + later_tokens; }
};

/// Positions from 0 on that are attention sinks; fewer in shorter prompts.
inline constexpr int kSinks = 4;

/// Evidence with an even number is asked for by so many of the prompt's last queries already, in turn.
inline constexpr int kHintingQueries = 16;

/// Roles follow each other from head to head, and are shifted by one from layer to layer.
HeadRole role_of(int layer, int query_head);

/// Positions of the heavy hitters, ascending: about one in 512, the same in all heads and layers.
std::vector<int> heavy_hitters(const SyntheticTrace& trace);

/// The span that the query at `position` asks for in retrieval heads, or nothing.
std::optional<int> asked_span(const SyntheticTrace& trace, int position);

/// What the trace will say about itself. Throws UsageError if no trace can have this shape.
TraceInfo describe(const SyntheticTrace& trace);

/// Writes the trace. Outputs, and the attention mass, are computed from the queries, keys and values as they are
/// stored. The tensors' bits depend on `trace` and on the instruction set, not on the number of threads. `on_progress`,
/// unless empty, is told the share of the work that is done. Memory: some MiB per thread, the captured queries' outputs
/// of one KV head's group (and its attention mass), and some bytes per token; not more for more layers or heads. Throws
/// UsageError for a shape that no trace can have and Error if it cannot be written, and leaves no file.
void write_synthetic(const SyntheticTrace& trace, const std::filesystem::path& path, const Execution& execution,
                     const std::function<void(double share)>& on_progress = {});

}  // namespace kvreplay::tracer
