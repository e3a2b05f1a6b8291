// What is in a trace, and how far it can be trusted.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "trace/reader.h"

namespace kvreplay {

/// One kind of tensor over all layers.
struct TensorKind {
  std::string name;                  ///< such as keys
  int layers = 0;                    ///< how many layers have it
  std::vector<Index> shape;          ///< in the last of them
  std::vector<DType> types;          ///< distinct, in layer order
  std::vector<std::string> storage;  ///< distinct, in layer order
  Index stored_bytes = 0;            ///< on disk, all layers together
  Index unpacked_bytes = 0;          ///< without filters
};

/// ‖stored − exact‖ / ‖exact‖ of a layer's attention outputs, over its query heads and the recomputed queries. Where
/// ‖exact‖ is 0, it is 0 if the stored output is 0 too, and 1 otherwise.
struct LayerFidelity {
  double mean = 0;
  double worst = 0;
  int worst_head = 0;
  int worst_position = 0;
};

/// Whether a dataset is what was written.
struct DigestCheck {
  enum class Outcome { ok, mismatch, no_digest };
  std::string path;
  Outcome outcome = Outcome::no_digest;
  std::string stored;    ///< 16 hexadecimal digits, or empty
  std::string computed;  ///< the same, where there is one to compare with
};

/// "ok", "mismatch" or "no digest".
std::string name_of(DigestCheck::Outcome outcome);

struct Inspection {
  std::filesystem::path path;
  Index file_bytes = 0;
  TraceInfo info;
  int prompt_queries = 0;      ///< captured queries before the prompt's end
  int observation_window = 0;  ///< of those, the last ones without a gap: the widest observation window
  int later_queries = 0;       ///< captured queries from the prompt's end on
  std::vector<TensorKind> tensors;
  std::vector<std::string> span_texts;  ///< per span, its tokens' text; empty where the trace has no pieces
  int recomputed_queries = 0;           ///< per query head, evenly spread over the captured ones, the last included
  std::vector<LayerFidelity> fidelity;  ///< per layer, 0 where one does not attend; empty if a digest did not match
  std::string explanation;              ///< in words, whether fidelity is what the outputs' type lets expect
  std::vector<DigestCheck> digests;     ///< per dataset, if asked for
  std::vector<std::string> warnings;    ///< what this trace cannot be used for, and what to do about it
};

/// What to tell of a trace whose stored outputs are further from the attention of its queries, keys and values than any
/// rounding explains: of a capture whose outputs are not its own. `layer_errors` are mean errors as in LayerFidelity,
/// [L]. Empty where there is nothing to tell.
std::string outputs_warning(std::span<const double> layer_errors);

/// Queries per head whose output is recomputed at most, so that inspecting a long trace costs little more than reading
/// its keys and values once.
inline constexpr int kRecomputedQueries = 16;

/// Looks at everything; with `verify`, reads every dataset to compare its digest, and throws Error on NaN and infinity.
/// Uses OpenMP's threads; the numbers do not depend on how many. Throws Error as TraceReader does on damage, NaN and
/// infinity.
Inspection inspect(const TraceReader& trace, bool verify);

}  // namespace kvreplay
