// Quantised weights as numbers, block by block.
#pragma once

#include <cstddef>
#include <span>

#include "tracer/ggml_type.h"

namespace kvreplay::tracer {

/// Whether dequantize knows the type: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K and MXFP4.
bool can_dequantize(GgmlType type);

/// Elements of a type that can be dequantised as float32, bit for bit as ggml and its Python package gguf make them.
/// `out` is whole blocks; what is read at `bytes`, which need not be aligned, is out.size() / elements of a block times
/// the block's bytes.
void dequantize(GgmlType type, const std::byte* bytes, std::span<float> out);

}  // namespace kvreplay::tracer
