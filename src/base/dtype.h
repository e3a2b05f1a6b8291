// Floating-point formats that tensors are stored in, and their conversion to and from float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace kvreplay {

enum class DType { float32, float16, bfloat16 };

/// Bytes of one element.
std::size_t size_of(DType type);

/// "float32", "float16" or "bfloat16".
std::string_view name_of(DType type);

/// The inverse of name_of; nothing for any other text.
std::optional<DType> dtype_named(std::string_view name);

/// Reads `out.size()` little-endian elements of `type` at `bytes` (no alignment needed) as float32, exactly.
void to_float32(DType type, const std::byte* bytes, std::span<float> out);

/// As to_float32; returns whether every value is finite, which one sweep over the data finds out with it.
bool to_float32_checked(DType type, const std::byte* bytes, std::span<float> out);

/// Whether no value is NaN or infinite.
bool all_finite(std::span<const float> values);

/// Rounds `in` to `type`, to nearest even, into `bytes`; room for in.size() * size_of(type) is the caller's.
void from_float32(DType type, std::span<const float> in, std::byte* bytes);

}  // namespace kvreplay
