#include "tracer/dequantize.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>

#include "base/dtype.h"

namespace kvreplay::tracer {

namespace {

// Every product below is exact in float32 (a float16 scale has 11 bits, scales of scales and quants have 6 each), so
// that a processor which fuses it with the sum that follows gives the same bits as one that does not.

// The quants of a block, 4 bits each, lie in two halves: the low bits of all its bytes, then the high ones.
constexpr int kBlock = 32;
constexpr int kHalf = kBlock / 2;

// Elements of a super-block of the K types.
constexpr int kSuperBlock = 256;

int at(const std::byte* bytes, int i) { return std::to_integer<int>(bytes[i]); }

int signed_at(const std::byte* bytes, int i) { return static_cast<std::int8_t>(bytes[i]); }

float float16_at(const std::byte* bytes) {
  float value;
  to_float32(DType::float16, bytes, {&value, 1});
  return value;
}

std::uint32_t bits_at(const std::byte* bytes) {
  std::uint32_t bits;
  std::memcpy(&bits, bytes, sizeof bits);
  return bits;
}

void dequantize_q4_0(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const std::byte* quants = block + 2;
  for (int i = 0; i < kHalf; ++i) {
    out[i] = scale * static_cast<float>((at(quants, i) & 15) - 8);
    out[i + kHalf] = scale * static_cast<float>((at(quants, i) >> 4) - 8);
  }
}

void dequantize_q4_1(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const float least = float16_at(block + 2);
  const std::byte* quants = block + 4;
  for (int i = 0; i < kHalf; ++i) {
    out[i] = scale * static_cast<float>(at(quants, i) & 15) + least;
    out[i + kHalf] = scale * static_cast<float>(at(quants, i) >> 4) + least;
  }
}

// The fifth bits of element i and of the one half a block further, in their places.
int fifth_bit(std::uint32_t bits, int i) { return static_cast<int>(bits >> i & 1) << 4; }

void dequantize_q5_0(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const std::uint32_t fifth = bits_at(block + 2);
  const std::byte* quants = block + 6;
  for (int i = 0; i < kHalf; ++i) {
    out[i] = scale * static_cast<float>(((at(quants, i) & 15) | fifth_bit(fifth, i)) - 16);
    out[i + kHalf] = scale * static_cast<float>((at(quants, i) >> 4 | fifth_bit(fifth, i + kHalf)) - 16);
  }
}

void dequantize_q5_1(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const float least = float16_at(block + 2);
  const std::uint32_t fifth = bits_at(block + 4);
  const std::byte* quants = block + 8;
  for (int i = 0; i < kHalf; ++i) {
    out[i] = scale * static_cast<float>((at(quants, i) & 15) | fifth_bit(fifth, i)) + least;
    out[i + kHalf] = scale * static_cast<float>(at(quants, i) >> 4 | fifth_bit(fifth, i + kHalf)) + least;
  }
}

void dequantize_q8_0(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  for (int i = 0; i < kBlock; ++i) out[i] = scale * static_cast<float>(signed_at(block + 2, i));
}

// Twice the values of 4-bit floats with two bits of exponent and one of mantissa; their scale is half of a power of
// two.
void dequantize_mxfp4(const std::byte* block, float* out) {
  constexpr std::array<float, 16> kDoubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const auto exponent = static_cast<std::uint32_t>(at(block, 0));
  // The two smallest are no normal numbers in float32.
  const float scale = std::bit_cast<float>(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
  for (int i = 0; i < kHalf; ++i) {
    out[i] = scale * kDoubled[static_cast<std::size_t>(at(block, i + 1) & 15)];
    out[i + kHalf] = scale * kDoubled[static_cast<std::size_t>(at(block, i + 1) >> 4)];
  }
}

// 16 sub-blocks of 16: a byte for the scale and the minimum of each, then all quants, then the scales of those.
void dequantize_q2_k(const std::byte* block, float* out) {
  const std::byte* scales = block;
  const std::byte* quants = block + 16;
  const float scale = float16_at(block + 80);
  const float least = float16_at(block + 82);
  for (int i = 0; i < kSuperBlock; i += 16) {
    const int both = at(scales, i / 16);
    const float by = scale * static_cast<float>(both & 15);
    const float less = least * static_cast<float>(both >> 4);
    // 32 bytes have 128 elements, 32 in every pair of their bits.
    const std::byte* from = quants + i / 128 * 32 + i % 32;
    const int shift = i % 128 / 32 * 2;
    for (int j = 0; j < 16; ++j) out[i + j] = by * static_cast<float>(at(from, j) >> shift & 3) - less;
  }
}

// As Q2_K, with a third bit that is 1 where 4 is not to be subtracted, and signed scales without minima.
void dequantize_q3_k(const std::byte* block, float* out) {
  const std::byte* thirds = block;
  const std::byte* quants = block + 32;
  const std::byte* scales = block + 96;
  const float scale = float16_at(block + 108);
  for (int i = 0; i < kSuperBlock; i += 16) {
    const int number = i / 16;
    // 6 bits: 4 of a half byte, 2 of one of the last four bytes.
    const int low = at(scales, number % 8) >> number / 8 * 4 & 15;
    const int high = at(scales, 8 + number % 4) >> number / 4 * 2 & 3;
    const float by = scale * static_cast<float>((low | high << 4) - 32);
    const std::byte* from = quants + i / 128 * 32 + i % 32;
    const std::byte* third = thirds + i % 32;
    const int shift = i % 128 / 32 * 2;
    for (int j = 0; j < 16; ++j) {
      const int subtracted = (at(third, j) >> i / 32 & 1) != 0 ? 0 : 4;
      out[i + j] = by * static_cast<float>((at(from, j) >> shift & 3) - subtracted);
    }
  }
}

struct ScaleAndLeast {
  int scale;
  int least;
};

// Of sub-block `number` of Q4_K and Q5_K, 6 bits each: those of the first four stand in bytes of their own, whose
// highest bits go to the last four.
ScaleAndLeast scale_and_least(const std::byte* packed, int number) {
  if (number < 4) return {at(packed, number) & 63, at(packed, number + 4) & 63};
  const int low = at(packed, number + 4);
  return {(low & 15) | (at(packed, number - 4) >> 6) << 4, low >> 4 | (at(packed, number) >> 6) << 4};
}

// 8 sub-blocks of 32, two in the halves of 32 bytes.
void dequantize_q4_k(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const float least = float16_at(block + 2);
  const std::byte* quants = block + 16;
  for (int number = 0; number < kSuperBlock / 32; ++number) {
    const ScaleAndLeast packed = scale_and_least(block + 4, number);
    const float by = scale * static_cast<float>(packed.scale);
    const float less = least * static_cast<float>(packed.least);
    const std::byte* from = quants + number / 2 * 32;
    const int shift = number % 2 * 4;
    for (int j = 0; j < 32; ++j) out[number * 32 + j] = by * static_cast<float>(at(from, j) >> shift & 15) - less;
  }
}

// As Q4_K, with a fifth bit: of 32 bytes, one bit for every sub-block.
void dequantize_q5_k(const std::byte* block, float* out) {
  const float scale = float16_at(block);
  const float least = float16_at(block + 2);
  const std::byte* fifths = block + 16;
  const std::byte* quants = block + 48;
  for (int number = 0; number < kSuperBlock / 32; ++number) {
    const ScaleAndLeast packed = scale_and_least(block + 4, number);
    const float by = scale * static_cast<float>(packed.scale);
    const float less = least * static_cast<float>(packed.least);
    const std::byte* from = quants + number / 2 * 32;
    const int shift = number % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      const int quant = (at(from, j) >> shift & 15) | (at(fifths, j) >> number & 1) << 4;
      out[number * 32 + j] = by * static_cast<float>(quant) - less;
    }
  }
}

// 16 sub-blocks of 16 with a byte of scale each. The low 4 bits of 128 elements lie in the halves of 64 bytes, the high
// 2 in the quarters of 32.
void dequantize_q6_k(const std::byte* block, float* out) {
  const std::byte* low_bits = block;
  const std::byte* high_bits = block + 128;
  const std::byte* scales = block + 192;
  const float scale = float16_at(block + 208);
  for (int i = 0; i < kSuperBlock; i += 16) {
    const float by = scale * static_cast<float>(signed_at(scales, i / 16));
    const std::byte* low = low_bits + i / 128 * 64 + i % 64;
    const std::byte* high = high_bits + i / 128 * 32 + i % 32;
    const int low_shift = i % 128 / 64 * 4;
    const int high_shift = i % 128 / 32 * 2;
    for (int j = 0; j < 16; ++j) {
      const int quant = (at(low, j) >> low_shift & 15) | (at(high, j) >> high_shift & 3) << 4;
      out[i + j] = by * static_cast<float>(quant - 32);
    }
  }
}

// What makes one block's elements of its bytes; null for a type that is not blocks or not known.
using DequantizeBlock = void (*)(const std::byte*, float*);

DequantizeBlock function_of(GgmlType type) {
  switch (type) {
    case GgmlType::Q4_0:
      return dequantize_q4_0;
    case GgmlType::Q4_1:
      return dequantize_q4_1;
    case GgmlType::Q5_0:
      return dequantize_q5_0;
    case GgmlType::Q5_1:
      return dequantize_q5_1;
    case GgmlType::Q8_0:
      return dequantize_q8_0;
    case GgmlType::Q2_K:
      return dequantize_q2_k;
    case GgmlType::Q3_K:
      return dequantize_q3_k;
    case GgmlType::Q4_K:
      return dequantize_q4_k;
    case GgmlType::Q5_K:
      return dequantize_q5_k;
    case GgmlType::Q6_K:
      return dequantize_q6_k;
    case GgmlType::MXFP4:
      return dequantize_mxfp4;
    default:
      return nullptr;
  }
}

std::optional<DType> dtype_of(GgmlType type) {
  if (type == GgmlType::F32) return DType::float32;
  if (type == GgmlType::F16) return DType::float16;
  if (type == GgmlType::BF16) return DType::bfloat16;
  return std::nullopt;
}

}  // namespace

bool can_dequantize(GgmlType type) { return dtype_of(type) || function_of(type) != nullptr; }

void dequantize(GgmlType type, const std::byte* bytes, std::span<float> out) {
  if (const auto dtype = dtype_of(type)) {
    to_float32(*dtype, bytes, out);
    return;
  }
  const DequantizeBlock dequantize_block = function_of(type);
  const GgmlBlock block = *block_of(type);
  const auto elements = static_cast<std::size_t>(block.elements);
  for (std::size_t i = 0; i < out.size(); i += elements, bytes += block.bytes) dequantize_block(bytes, out.data() + i);
}

}  // namespace kvreplay::tracer
