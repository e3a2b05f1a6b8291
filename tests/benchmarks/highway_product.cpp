#include "highway_product.h"

#include <algorithm>

// Vectors whose length is unknown to the compiler cannot stand in arrays, as the accumulators do.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
// Highway 1.0 leaves this target out unless it is asked for, and stops where -march=native makes it the least there is.
#define HWY_WANT_AVX3_DL
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "highway_product.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway wants it.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace kvreplay::benchmarks {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Vector = hn::Vec<Floats>;

// AVX-512 has 32 registers: 24 for a tile of C, 4 for a row of B. Others have 16: 12 and 2.
constexpr int kRows = 6;
constexpr int kVectors = HWY_MAX_BYTES >= 64 ? 4 : 2;

// Rows of B taken at once, so that a panel of them stays near the core while the rows of A pass.
constexpr Index kDepth = 512;

// c [rows, kVectors vectors] = or += a · b, all of it in registers.
template <int rows>
HWY_INLINE void tile(const float* HWY_RESTRICT a, Index a_row, Index a_column, const float* HWY_RESTRICT b, Index b_row,
                     Index depth, bool accumulate, float* HWY_RESTRICT c, Index c_row) {
  const Floats floats;
  const Index lanes = static_cast<Index>(hn::Lanes(floats));
  Vector sums[rows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = accumulate ? hn::LoadU(floats, c + i * c_row + v * lanes) : hn::Zero(floats);
    }
  }
  for (Index k = 0; k < depth; ++k) {
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(floats, b + k * b_row + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector left = hn::Set(floats, a[i * a_row + k * a_column]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] = hn::MulAdd(left, right[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sums[i][v], floats, c + i * c_row + v * lanes);
  }
}

using Tile = decltype(&tile<1>);

Tile tile_of(Index rows) {
  constexpr Tile tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  return tiles[rows - 1];
}

void multiply(const Strided& a, const Panels& b, Index rows, Index depth, Index columns, float* c) {
  const Index width = kVectors * static_cast<Index>(hn::Lanes(Floats()));
  const Index strips = (rows + kRows - 1) / kRows;
  for (Index k = 0; k < depth; k += kDepth) {
    for (Index column = 0; column < columns; column += width) {
      const float* right = b.data + column / kPanelColumns * b.panel_stride + k * b.row_stride + column % kPanelColumns;
      // Strips of equal height: of 32 rows two strips have six and four have five, rather than the last one two.
      for (Index strip = 0; strip < strips; ++strip) {
        const Index row = rows * strip / strips;
        tile_of(rows * (strip + 1) / strips - row)(a.data + row * a.row_stride + k * a.column_stride, a.row_stride,
                                                   a.column_stride, right, b.row_stride, std::min(kDepth, depth - k),
                                                   k > 0, c + row * columns + column, columns);
      }
    }
  }
}

void pack(const Strided& b, Index depth, Index columns, float* panels) {
  for (Index first = 0; first < columns; first += kPanelColumns) {
    float* panel = panels + first * depth;
    if (b.column_stride == 1) {
      for (Index k = 0; k < depth; ++k) {
        std::copy_n(b.data + k * b.row_stride + first, kPanelColumns, panel + k * kPanelColumns);
      }
      continue;
    }
#if HWY_TARGET == HWY_SCALAR
    for (Index k = 0; k < depth; ++k) {
      for (Index j = 0; j < kPanelColumns; ++j)
        panel[k * kPanelColumns + j] = b.data[(first + j) * b.column_stride + k];
    }
#else
    // Four by four: pairs of floats first, then pairs of pairs.
    const hn::FixedTag<float, 4> four;
    const hn::FixedTag<double, 2> pairs;
    const auto joined = [&](auto low, auto high, auto interleave) {
      return hn::BitCast(four, interleave(hn::BitCast(pairs, low), hn::BitCast(pairs, high)));
    };
    const auto lower = [&](auto x, auto y) { return hn::InterleaveLower(pairs, x, y); };
    const auto upper = [&](auto x, auto y) { return hn::InterleaveUpper(pairs, x, y); };
    for (Index j = 0; j < kPanelColumns; j += 4) {
      const float* from = b.data + (first + j) * b.column_stride;
      for (Index k = 0; k < depth; k += 4) {
        const auto r0 = hn::LoadU(four, from + k);
        const auto r1 = hn::LoadU(four, from + k + b.column_stride);
        const auto r2 = hn::LoadU(four, from + k + 2 * b.column_stride);
        const auto r3 = hn::LoadU(four, from + k + 3 * b.column_stride);
        const auto low01 = hn::InterleaveLower(four, r0, r1);
        const auto low23 = hn::InterleaveLower(four, r2, r3);
        const auto high01 = hn::InterleaveUpper(four, r0, r1);
        const auto high23 = hn::InterleaveUpper(four, r2, r3);
        float* to = panel + k * kPanelColumns + j;
        hn::StoreU(joined(low01, low23, lower), four, to);
        hn::StoreU(joined(low01, low23, upper), four, to + kPanelColumns);
        hn::StoreU(joined(high01, high23, lower), four, to + 2 * kPanelColumns);
        hn::StoreU(joined(high01, high23, upper), four, to + 3 * kPanelColumns);
      }
    }
#endif
  }
}

const char* instruction_set() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace kvreplay::benchmarks
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvreplay::benchmarks {

HWY_EXPORT(multiply);
HWY_EXPORT(pack);
HWY_EXPORT(instruction_set);

void multiply(const Strided& a, const Panels& b, Index rows, Index depth, Index columns, float* c) {
  HWY_DYNAMIC_DISPATCH(multiply)(a, b, rows, depth, columns, c);
}

void pack(const Strided& b, Index depth, Index columns, float* panels) {
  HWY_DYNAMIC_DISPATCH(pack)(b, depth, columns, panels);
}

const char* instruction_set() { return HWY_DYNAMIC_DISPATCH(instruction_set)(); }

}  // namespace kvreplay::benchmarks
#endif
