// The types of tensors in GGUF files, with ggml's numbers and names: plain numbers, and blocks of numbers that share
// scales. https://github.com/ggml-org/ggml
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "base/matrix.h"

namespace kvreplay::tracer {

enum class GgmlType : std::uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q8_1 = 9,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  Q8_K = 15,
  IQ2_XXS = 16,
  IQ2_XS = 17,
  IQ3_XXS = 18,
  IQ1_S = 19,
  IQ4_NL = 20,
  IQ3_S = 21,
  IQ2_S = 22,
  IQ4_XS = 23,
  I8 = 24,
  I16 = 25,
  I32 = 26,
  I64 = 27,
  F64 = 28,
  IQ1_M = 29,
  BF16 = 30,
  TQ1_0 = 34,
  TQ2_0 = 35,
  MXFP4 = 39,
  NVFP4 = 40,
  Q1_0 = 41,
};

/// How the elements of a row lie in memory: block after block.
struct GgmlBlock {
  std::string_view name;  ///< as ggml writes it, such as Q4_K
  Index elements = 1;     ///< in a block; a row holds whole blocks
  Index bytes = 0;        ///< of a block
};

/// Nothing for a number that is not a type, or is one that ggml has given up.
std::optional<GgmlBlock> block_of(GgmlType type);

}  // namespace kvreplay::tracer
