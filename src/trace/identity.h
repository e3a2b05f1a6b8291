// What tells one capture from another without reading its tensors.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "trace/reader.h"

namespace kvreplay {

/// A digest of all that a trace says beside its tensors (but for what its model can be told by), and of the digests
/// that these bring. Copies of a file have the same; so have files that differ only in tensors without a digest, which
/// nothing but reading them could tell.
std::string trace_digest(const TraceReader& trace);

/// A digest of token ids, of whatever run: XXH64 of them as int32, little-endian.
std::string tokens_digest(std::span<const std::int32_t> ids);

/// Whether every tensor brings a digest, so that trace_digest() follows from them too.
bool has_tensor_digests(const TraceReader& trace);

}  // namespace kvreplay
