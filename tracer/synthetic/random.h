// Random numbers of a counter, so that any row of any head can be made again, alone and on any thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "base/matrix.h"

namespace kvreplay::tracer {

/// SplitMix64's finaliser.
inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

/// What numbers are drawn for.
enum class Stream : std::uint64_t {
  tokens,
  spans,
  heavy_hitters,
  keys,
  values,
  value_length,
  queries,
  taste,
  directions,
  evidence,
  projection,
  projection_rows,
  projection_columns,
  strength,
};

/// The beginning of a stream of its own for every kind, layer and head.
inline std::uint64_t stream(std::uint64_t seed, Stream kind, int layer = 0, int head = 0) {
  return mix(mix(mix(seed) + static_cast<std::uint64_t>(kind)) + (static_cast<std::uint64_t>(layer) << 32) +
             static_cast<std::uint64_t>(head));
}

/// The 64 bits that a stream has for a position.
inline std::uint64_t at(std::uint64_t stream, Index position) {
  return mix(stream + static_cast<std::uint64_t>(position));
}

/// In [0, 1).
inline float uniform(std::uint64_t bits) { return static_cast<float>(bits >> 40) * 0x1p-24F; }

/// Element i of a row: the sum of the four bytes of a hash, which is close to a normal distribution of mean 0 and
/// deviation 1 (excess kurtosis -0.3, nothing beyond 3.45). The hash is MurmurHash3's finaliser, with the row's second
/// half put in between.
inline float bell(std::uint32_t low, std::uint32_t high, std::uint32_t i) {
  std::uint32_t h = low + i * 0x9e3779b9U;
  h = (h ^ (h >> 16)) * 0x85ebca6bU;
  h = ((h ^ (h >> 13)) + high) * 0xc2b2ae35U;
  h ^= h >> 16;
  const std::uint32_t pairs = (h & 0x00ff00ffU) + ((h >> 8) & 0x00ff00ffU);
  const auto sum = static_cast<std::int32_t>((pairs & 0xffffU) + (pairs >> 16));
  constexpr float kDeviation = 147.80055F;  // sqrt(4 * (256^2 - 1) / 12)
  return static_cast<float>(sum - 510) * (1 / kDeviation);
}

/// A row of such elements, which `row` alone decides.
inline void fill_bell(std::uint64_t row, std::span<float> out) {
  const auto low = static_cast<std::uint32_t>(row);
  const auto high = static_cast<std::uint32_t>(row >> 32);
  float* to = out.data();
  const auto size = static_cast<std::uint32_t>(out.size());
  for (std::uint32_t i = 0; i < size; ++i) to[i] = bell(low, high, i);
}

/// A row of length 1.
inline std::vector<float> unit_vector(std::uint64_t row, Index size) {
  std::vector<float> vector(static_cast<std::size_t>(size));
  fill_bell(row, vector);
  double square = 0;
  for (const float x : vector) square += static_cast<double>(x) * x;
  const auto factor = static_cast<float>(1 / std::sqrt(std::max(square, 1e-6)));
  for (float& x : vector) x *= factor;
  return vector;
}

}  // namespace kvreplay::tracer
