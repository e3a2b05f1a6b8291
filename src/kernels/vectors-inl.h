// The vectors that kernels are written in, included once for each instruction set (see Highway's foreach_target.h).
#if defined(KVREPLAY_KERNELS_VECTORS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef KVREPLAY_KERNELS_VECTORS_INL_H
#undef KVREPLAY_KERNELS_VECTORS_INL_H
#else
#define KVREPLAY_KERNELS_VECTORS_INL_H
#endif

#include <hwy/highway.h>

#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace kvreplay::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kLanes>;
using Vector = hn::Vec<Floats>;

constexpr std::size_t kVectorLanes = HWY_MIN(HWY_LANES(float), static_cast<std::size_t>(kLanes));

// A square of as many rows as a vector has lanes, turned in registers: every round puts the even elements of two
// neighbouring vectors into one and the odd ones into another, and after log2(lanes) rounds rows are columns.
HWY_INLINE void transpose_square(const float* from, Index from_row, float* to, Index to_row) {
  const Floats d;
  constexpr int n = static_cast<int>(kVectorLanes);
  Vector rows[n];
  for (int i = 0; i < n; ++i) rows[i] = hn::LoadU(d, from + i * from_row);
#if HWY_TARGET != HWY_SCALAR  // a single lane is turned already
  for (int round = 1; round < n; round *= 2) {
    Vector next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[i] = hn::ConcatEven(d, rows[2 * i + 1], rows[2 * i]);
      next[i + n / 2] = hn::ConcatOdd(d, rows[2 * i + 1], rows[2 * i]);
    }
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
#endif
  for (int i = 0; i < n; ++i) hn::StoreU(rows[i], d, to + i * to_row);
}

}  // namespace kvreplay::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
