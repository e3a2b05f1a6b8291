// Whether what a trace says about itself can be true.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "trace/trace.h"

namespace kvreplay {

/// What is wrong, and where in the file it stands.
struct Contradiction {
  std::string path;    ///< such as /query_positions
  std::string reason;  ///< a sentence without the path
};

/// The first of the format's rules that `info` breaks, or nothing.
std::optional<Contradiction> find_contradiction(const TraceInfo& info);

/// A layer's [K, T, Dk] of keys, [K, T, Dv] of values, [H, Q, Dk] of queries, [H, Q, Dv] of outputs.
std::vector<Index> shape_of(const TraceInfo& info, int layer, HeadTensor tensor);

/// "keys", "values", "queries" or "outputs".
std::string name_of(HeadTensor tensor);

/// Index of the first NaN or infinity in `values`, or nothing.
std::optional<std::size_t> find_non_finite(std::span<const float> values);

/// The same among elements of `type`, as from_float32 makes them.
std::optional<std::size_t> find_non_finite(DType type, std::span<const std::byte> stored);

}  // namespace kvreplay
