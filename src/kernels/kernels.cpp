#include "kernels/kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/buffer.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/kernels.cpp"
#include "kernels/targets.h"

#include <hwy/foreach_target.h>
// After foreach_target.h, as it asks for.
#include <hwy/cache_control.h>
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvreplay::kernels {
namespace HWY_NAMESPACE {

// Rows and vectors of results that are held in registers: as many as there are, with what they are made of.
constexpr int kRows = 6;
constexpr int kVectors = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM ? 4 : 2;

// Columns that a product takes at a time, and how deep: a block of them is read again for every strip of rows, from the
// innermost cache or, as vectors are wide, from the second.
constexpr Index kColumnsAtOnce = static_cast<Index>(kVectorLanes) * kVectors;
constexpr Index kDepth = 512;

// The same where rows of the left operand lie side by side: every step then takes a line of the cache, which serves the
// next rows as well if it is still there.
constexpr Index kDepthAcross = HWY_TARGET <= HWY_AVX3 ? 128 : 256;

// Rows of the left operand that stay in the second-level cache while the columns pass.
constexpr Index kBlockRows = 20 * kRows;

// From so many rows on, columns whose rows lie so far apart are brought together first: they would share few places of
// the cache.
constexpr Index kRowsWorthPacking = 8 * kRows;
constexpr Index kFarApart = 512;

// Columns that are brought together at a time, for the second-level cache.
constexpr Index kColumnsPacked = 256;

// One row has too few results in flight to keep the multipliers busy, unless more columns come along: half of the
// registers.
constexpr int kVectorsOfOneRow = HWY_TARGET <= HWY_AVX3 ? 16 : 8;

// Σ_k a[i·a_row + k·a_step] · b[k·b_row + j].
struct Terms {
  Index depth;
  const float* a;
  Index a_row;
  Index a_step;
  const float* b;
  Index b_row;
};

// Where sums begin (at 0 without a `start`) and where they go.
struct Sums {
  const float* start;
  Index start_row;
  float* out;
  Index out_row;
  bool add;  // to what is there
};

template <int rows, int vectors>
HWY_INLINE void multiply_tile(const Terms& terms, const Sums& sums) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  // What is added to at the end comes into the cache meanwhile.
  for (int i = 0; sums.add && i < rows; ++i) {
    for (Index j = 0; j < vectors * n; j += kLanes) hwy::Prefetch(sums.out + i * sums.out_row + j);
  }
  Vector sum[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      sum[i][j] = sums.start != nullptr ? hn::LoadU(d, sums.start + i * sums.start_row + j * n) : hn::Zero(d);
    }
  }
  const float* HWY_RESTRICT a = terms.a;
  const float* HWY_RESTRICT b = terms.b;
  const Index a_row = terms.a_row;
  const Index a_step = terms.a_step;
  const Index b_row = terms.b_row;
  for (Index k = 0; k < terms.depth; ++k) {
    Vector right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = hn::LoadU(d, b + k * b_row + j * n);
    for (int i = 0; i < rows; ++i) {
      const auto left = hn::Set(d, a[i * a_row + k * a_step]);
      for (int j = 0; j < vectors; ++j) sum[i][j] = hn::MulAdd(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      float* const out = sums.out + i * sums.out_row + j * n;
      hn::StoreU(sums.add ? hn::Add(hn::LoadU(d, out), sum[i][j]) : sum[i][j], d, out);
    }
  }
}

// Rows in strips of nearly the same height: a low one at the end would hold few sums and wait for each of them.
template <int vectors>
HWY_INLINE void multiply_strips(Index rows, Terms terms, Sums sums) {
  const Index strips = (rows + kRows - 1) / kRows;
  for (Index strip = 0; strip < strips; ++strip) {
    const Index height = rows / strips + (strip < rows % strips ? 1 : 0);
    switch (height) {
      case 1:
        multiply_tile<1, vectors>(terms, sums);
        break;
      case 2:
        multiply_tile<2, vectors>(terms, sums);
        break;
      case 3:
        multiply_tile<3, vectors>(terms, sums);
        break;
      case 4:
        multiply_tile<4, vectors>(terms, sums);
        break;
      case 5:
        multiply_tile<5, vectors>(terms, sums);
        break;
      default:
        multiply_tile<kRows, vectors>(terms, sums);
        break;
    }
    terms.a += height * terms.a_row;
    if (sums.start != nullptr) sums.start += height * sums.start_row;
    sums.out += height * sums.out_row;
  }
}

// Up to kBlockRows rows by some vectors of columns, in pieces of the depth; sums that are not complete wait outside of
// the result, whose rows may be far apart.
template <int vectors>
HWY_INLINE void multiply_columns(Index rows, const Terms& terms, const Sums& sums) {
  constexpr Index n = static_cast<Index>(kVectorLanes);
  HWY_ALIGN float partial[kBlockRows * vectors * kVectorLanes];
  const Index most = terms.a_step == 1 ? kDepth : kDepthAcross;
  const Index pieces = std::max<Index>((terms.depth + most - 1) / most, 1);
  Index done = 0;
  for (Index piece = 0; piece < pieces; ++piece) {
    Terms part = terms;
    part.depth = terms.depth / pieces + (piece < terms.depth % pieces ? 1 : 0);
    part.a += done * terms.a_step;
    part.b += done * terms.b_row;
    Sums here = sums;
    if (piece > 0) {
      here.start = partial;
      here.start_row = vectors * n;
    }
    if (piece + 1 < pieces) {
      here.out = partial;
      here.out_row = vectors * n;
      here.add = false;
    }
    multiply_strips<vectors>(rows, part, here);
    done += part.depth;
  }
}

// As multiply_columns, for all the columns from `first` on that come in this many vectors; returns where they end.
// Columns `first` on begin at first · b_step of the right operand.
template <class Work>
HWY_INLINE Index for_columns(Index first, Index columns, Index width, const Terms& terms, Index b_step,
                             const Sums& sums, const Work& work) {
  for (; first + width <= columns; first += width) {
    Terms part = terms;
    part.b += first * b_step;
    Sums here = sums;
    if (sums.start != nullptr) here.start += first;
    here.out += first;
    work(part, here);
  }
  return first;
}

// `b_step` is the depth where columns lie in groups of kColumnsAtOnce, one group after the other.
void multiply_rows(Index rows, Index columns, const Terms& terms, Index b_step, const Sums& sums) {
  constexpr Index n = static_cast<Index>(kVectorLanes);
  Index done = 0;
  if (rows == 1 && b_step == 1) {
    done = for_columns(done, columns, kVectorsOfOneRow * n, terms, b_step, sums,
                       [](const Terms& part, const Sums& here)
                           HWY_ATTR { multiply_tile<1, kVectorsOfOneRow>(part, here); });
  }
  done = for_columns(done, columns, kColumnsAtOnce, terms, b_step, sums,
                     [rows](const Terms& part, const Sums& here)
                         HWY_ATTR { multiply_columns<kVectors>(rows, part, here); });
  if (done == columns) return;
  // What is left of the last group lies in its rows.
  Terms rest = terms;
  rest.b += done * (b_step - 1);
  done = for_columns(done, columns, 2 * n, rest, 1, sums,
                     [rows](const Terms& part, const Sums& here) HWY_ATTR { multiply_columns<2>(rows, part, here); });
  for_columns(done, columns, n, rest, 1, sums,
              [rows](const Terms& part, const Sums& here) HWY_ATTR { multiply_columns<1>(rows, part, here); });
}

void multiply_blocks(Index rows, Index columns, Terms terms, Index b_step, Sums sums) {
  const Index blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (Index block = 0; block < blocks; ++block) {
    const Index here = rows / blocks + (block < rows % blocks ? 1 : 0);
    multiply_rows(here, columns, terms, b_step, sums);
    terms.a += here * terms.a_row;
    if (sums.start != nullptr) sums.start += here * sums.start_row;
    sums.out += here * sums.out_row;
  }
}

// Columns of a right operand whose rows lie apart, in groups of kColumnsAtOnce.
void pack_columns(const float* b, Index b_row, Index columns, Index depth, float* packed) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  for (Index k = 0; k < depth; ++k) {
    for (Index first = 0; first < columns; first += kColumnsAtOnce) {
      float* const to = packed + first * depth + k * kColumnsAtOnce;
      const Index here = std::min(kColumnsAtOnce, columns - first);
      for (Index j = 0; j < here; j += n) hn::Store(hn::LoadU(d, b + k * b_row + first + j), d, to + j);
    }
  }
}

// Chunks of the right operand are brought together, and all rows multiplied with them.
void multiply_chunks(Index rows, Index columns, const Terms& terms, const Sums& sums) {
  const Index width = std::min(kColumnsPacked, columns);
  Buffer packed(rounded_up(width, kColumnsAtOnce) * std::min(kDepth, terms.depth));
  // Sums that are added when they are complete wait elsewhere until then.
  Buffer partial(sums.add && terms.depth > kDepth ? rows * width : 0);
  for (Index first = 0; first < columns; first += width) {
    const Index here = std::min(width, columns - first);
    for (Index done = 0; done < terms.depth; done += kDepth) {
      Terms part = terms;
      part.depth = std::min(kDepth, terms.depth - done);
      part.a += done * terms.a_step;
      pack_columns(terms.b + done * terms.b_row + first, terms.b_row, here, part.depth, packed.data());
      part.b = packed.data();
      part.b_row = kColumnsAtOnce;
      Sums chunk = sums;
      chunk.out += first;
      if (sums.start != nullptr) chunk.start += first;
      float* const waiting = sums.add ? partial.data() : chunk.out;
      const Index waiting_row = sums.add ? width : sums.out_row;
      if (done > 0) {
        chunk.start = waiting;
        chunk.start_row = waiting_row;
      }
      if (done + part.depth < terms.depth) {
        chunk.out = waiting;
        chunk.out_row = waiting_row;
        chunk.add = false;
      }
      multiply_blocks(rows, here, part, part.depth, chunk);
    }
  }
}

void multiply_all(Index rows, Index columns, const Terms& terms, const Sums& sums) {
  if (rows >= kRowsWorthPacking && terms.depth > 0 && terms.b_row >= kFarApart) {
    multiply_chunks(rows, columns, terms, sums);
  } else {
    multiply_blocks(rows, columns, terms, 1, sums);
  }
}

void multiply(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
              Index b_row, float* c, Index c_row, bool accumulate) {
  multiply_all(rows, columns, {depth, a, a_row, a_step, b, b_row}, {accumulate ? c : nullptr, c_row, c, c_row, false});
}

void add_product(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
                 Index b_row, float* c, Index c_row) {
  multiply_all(rows, columns, {depth, a, a_row, a_step, b, b_row}, {nullptr, 0, c, c_row, true});
}

// Up to `width` rows of `depth` elements, side by side.
template <Index width>
HWY_INLINE void to_panel(const float* rows, Index row, Index count, Index depth, float* panel) {
  constexpr Index n = static_cast<Index>(kVectorLanes);
  // All positions of some elements, so that every line of the panel is written at once.
  const Index whole = count / n * n;
  Index k = 0;
  for (; k + n <= depth; k += n) {
    if (k % kLanes == 0) {
      for (Index position = 0; position < whole; ++position) hwy::Prefetch(rows + position * row + k + kLanes);
    }
    for (Index position = 0; position < whole; position += n) {
      transpose_square(rows + position * row + k, row, panel + k * width + position, width);
    }
  }
  for (; k < depth; ++k) {
    for (Index i = 0; i < whole; ++i) panel[k * width + i] = rows[i * row + k];
  }
  for (k = 0; k < depth && whole < width; ++k) {
    for (Index i = whole; i < width; ++i) panel[k * width + i] = i < count ? rows[i * row + k] : 0.0f;
  }
}

template <Index width>
HWY_INLINE void to_panels_of(const float* rows, Index row, Index count, Index depth, float* panels) {
  for (Index first = 0; first < count; first += width) {
    to_panel<width>(rows + first * row, row, std::min(width, count - first), depth, panels + first * depth);
  }
}

template <Index width>
HWY_INLINE void to_panels_of(DType type, const std::byte* rows, Index row, Index count, Index depth, float* panels) {
  if (type == DType::float32 && reinterpret_cast<std::uintptr_t>(rows) % alignof(float) == 0) {
    to_panels_of<width>(reinterpret_cast<const float*>(rows), row, count, depth, panels);
    return;
  }
  // A slice of the rows that the innermost cache holds is widened, then turned.
  constexpr Index kSlice = 128;
  float slice[width * kSlice];
  const auto element = static_cast<Index>(size_of(type));
  for (Index first = 0; first < count; first += width) {
    const Index here = std::min(width, count - first);
    for (Index k = 0; k < depth; k += kSlice) {
      const Index elements = std::min(kSlice, depth - k);
      for (Index i = 0; i < here; ++i) {
        to_float32(type, rows + ((first + i) * row + k) * element,
                   std::span(slice + i * elements, static_cast<std::size_t>(elements)));
      }
      to_panel<width>(slice, elements, here, elements, panels + first * depth + k * width);
    }
  }
}

void to_panels(DType type, const std::byte* rows, Index row, Index count, Index depth, float* panels) {
  to_panels_of<kPanel>(type, rows, row, count, depth, panels);
}

void pack(DType type, const std::byte* rows, Index row, Index count, Index depth, float* packed) {
  to_panels_of<kColumnsAtOnce>(type, rows, row, count, depth, packed);
  std::fill(packed + rounded_up(count, kColumnsAtOnce) * depth, packed + rounded_up(count, kPanel) * depth, 0.0f);
}

void multiply_packed(Index rows, Index columns, Index depth, const float* a, Index a_row, const float* packed, float* c,
                     Index c_row, bool add) {
  const Index whole = columns / kLanes * kLanes;
  const Terms terms{depth, a, a_row, 1, packed, kColumnsAtOnce};
  multiply_blocks(rows, whole, terms, depth, {nullptr, 0, c, c_row, add});
  if (whole == columns) return;
  // A whole vector would reach into the next row of the result.
  HWY_ALIGN float last[kBlockRows * kLanes];
  Terms rest = terms;
  rest.b += whole / kColumnsAtOnce * kColumnsAtOnce * depth + whole % kColumnsAtOnce;
  for (Index first = 0; first < rows; first += kBlockRows) {
    const Index here = std::min(kBlockRows, rows - first);
    rest.a = a + first * a_row;
    multiply_rows(here, kLanes, rest, kLanes % kColumnsAtOnce == 0 ? depth : 1, {nullptr, 0, last, kLanes, false});
    for (Index i = 0; i < here; ++i) {
      float* const to = c + (first + i) * c_row + whole;
      for (Index j = 0; j < columns - whole; ++j) to[j] = add ? to[j] + last[i * kLanes + j] : last[i * kLanes + j];
    }
  }
}

// exp(x) for x ≤ 0 to about 1 ulp, and exactly 0 from −87.3 down, where float32 has few bits left. With x = n ln 2 + r
// and |r| ≤ ln 2 / 2, e^r is a polynomial of degree 6 (relative error 4e-9, fitted by least squares) and 2^n is added
// to its exponent. Highway's own Exp also serves positive and denormal results, for half as many operations again.
HWY_INLINE Vector exp_of_negative(Floats d, Vector x) {
  const hn::RebindToSigned<Floats> di;
  // Adding it leaves no bits for fractions, so that n stands in the last ones.
  const auto rounder = hn::Set(d, 12582912.0f);
  const auto shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), rounder);
  const auto n = hn::Sub(shifted, rounder);
  // ln 2 in two parts, of which the first has so few bits that its product with n is exact.
  auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  auto power = hn::MulAdd(hn::Set(d, 0.00138902501f), r, hn::Set(d, 0.00836830866f));
  power = hn::MulAdd(power, r, hn::Set(d, 0.0416670442f));
  power = hn::MulAdd(power, r, hn::Set(d, 0.166665256f));
  power = hn::MulAdd(power, r, hn::Set(d, 0.5f));
  power = hn::MulAdd(power, r, hn::Set(d, 1.0f));
  power = hn::MulAdd(power, r, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  const auto result = hn::BitCast(d, hn::Add(hn::BitCast(di, power), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.3f)), result);
}

BlockSoftmax exponentiate(const AttentionBlock& block, float scale, float softcapping) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  const auto lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  const auto factor = hn::Set(d, scale);
  const auto cap = hn::Set(d, softcapping);
  const auto inverse_cap = hn::Set(d, softcapping > 0 ? 1.0f / softcapping : 0.0f);
  const bool all_visible = block.first_visible <= 0 && block.end_visible >= block.panels * kPanel;
  auto maximum = lowest;
  // Where the scale is all that is done to products, they need not be written down in between.
  const bool as_they_are = all_visible && softcapping <= 0 && scale > 0;
  for (Index p = 0; p < block.panels; ++p) {
    float* row = block.logits + p * block.panel_step;
    for (Index j = 0; as_they_are && j < kPanel; j += n) maximum = hn::Max(maximum, hn::LoadU(d, row + j));
    for (Index j = 0; !as_they_are && j < kPanel; j += n) {
      auto logit = hn::Mul(hn::LoadU(d, row + j), factor);
      if (softcapping > 0) logit = hn::Mul(hn::Tanh(d, hn::Mul(logit, inverse_cap)), cap);
      if (!all_visible) {
        const auto place = hn::Iota(d, static_cast<float>(p * kPanel + j));
        const auto hidden = hn::Or(hn::Lt(place, hn::Set(d, static_cast<float>(block.first_visible))),
                                   hn::Ge(place, hn::Set(d, static_cast<float>(block.end_visible))));
        logit = hn::IfThenElse(hidden, lowest, logit);
      }
      hn::StoreU(logit, d, row + j);
      maximum = hn::Max(maximum, logit);
    }
  }
  const auto rest_of_scale = hn::Set(d, as_they_are ? scale : 1.0f);
  maximum = hn::MaxOfLanes(d, maximum);
  const auto shift = maximum;
  const float largest = hn::GetLane(hn::Mul(maximum, rest_of_scale));
  if (largest == -std::numeric_limits<float>::infinity()) {
    for (Index p = 0; p < block.panels; ++p) std::fill_n(block.logits + p * block.panel_step, kPanel, 0.0f);
    return {largest, 0};
  }
  // Always kLanes partial sums, whatever the width of a vector.
  constexpr int kSums = static_cast<int>(kLanes / n);
  Vector sums[kSums];
  for (auto& sum : sums) sum = hn::Zero(d);
  for (Index p = 0; p < block.panels; ++p) {
    float* row = block.logits + p * block.panel_step;
    for (Index j = 0; j < kPanel; j += kLanes) {
      for (int v = 0; v < kSums; ++v) {
        // Subtracted before it is scaled: a compiler may fuse the other order, and then the largest is not 1.
        const auto below = hn::Sub(hn::LoadU(d, row + j + v * n), shift);
        const auto weight = exp_of_negative(d, hn::Mul(below, rest_of_scale));
        hn::StoreU(weight, d, row + j + v * n);
        sums[v] = hn::Add(sums[v], weight);
      }
    }
  }
  float lanes[kLanes];
  for (int v = 0; v < kSums; ++v) hn::StoreU(sums[v], d, lanes + v * n);
  for (Index half = kLanes / 2; half > 0; half /= 2) {
    for (Index i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return {largest, lanes[0]};
}

void finish_logits(const QueryColumns& queries, Index first_key, Index count, float* products, float* maxima) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  const auto lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  const auto factor = hn::Set(d, queries.scale);
  const auto cap = hn::Set(d, queries.softcapping);
  const auto inverse_cap = hn::Set(d, queries.softcapping > 0 ? 1.0f / queries.softcapping : 0.0f);
  for (Index j = 0; j < queries.columns; j += n) {
    const auto last = hn::LoadU(di, queries.positions + j);
    const auto first = queries.first_visible != nullptr ? hn::LoadU(di, queries.first_visible + j) : hn::Zero(di);
    auto maximum = hn::LoadU(d, maxima + j);
    for (Index key = 0; key < count; ++key) {
      auto logit = hn::Mul(hn::LoadU(d, products + key * queries.columns + j), factor);
      if (queries.softcapping > 0) logit = hn::Mul(hn::Tanh(d, hn::Mul(logit, inverse_cap)), cap);
      const auto position = hn::Set(di, static_cast<std::int32_t>(first_key + key));
      auto hidden = hn::Gt(position, last);
      if (queries.first_visible != nullptr) hidden = hn::Or(hidden, hn::Gt(first, position));
      logit = hn::IfThenElse(hn::RebindMask(d, hidden), lowest, logit);
      hn::StoreU(logit, d, products + key * queries.columns + j);
      maximum = hn::Max(maximum, logit);
    }
    hn::StoreU(maximum, d, maxima + j);
  }
}

void exponentiate_columns(Index count, Index columns, const float* maxima, float* logits) {
  const Floats d;
  for (Index j = 0; j < columns; j += static_cast<Index>(kVectorLanes)) {
    const auto maximum = hn::LoadU(d, maxima + j);
    for (Index key = 0; key < count; ++key) {
      float* const place = logits + key * columns + j;
      hn::StoreU(exp_of_negative(d, hn::Sub(hn::LoadU(d, place), maximum)), d, place);
    }
  }
}

void squared_lengths(const float* panel, Index depth, float* lengths) {
  const Floats d;
  for (Index j = 0; j < kPanel; j += static_cast<Index>(kVectorLanes)) {
    auto sum = hn::Zero(d);
    for (Index k = 0; k < depth; ++k) {
      const auto x = hn::LoadU(d, panel + k * kPanel + j);
      sum = hn::MulAdd(x, x, sum);
    }
    hn::StoreU(sum, d, lengths + j);
  }
}

template <int rows>
HWY_INLINE void add_squared_products(const float* HWY_RESTRICT factor, Index row, const float* HWY_RESTRICT panel,
                                     Index first, Index depth, float* HWY_RESTRICT lengths) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  for (Index j = 0; j < kPanel; j += n * kVectors) {
    Vector sum[rows][kVectors];
    for (auto& sums : sum) {
      for (auto& each : sums) each = hn::Zero(d);
    }
    // Below the diagonal there are zeros.
    for (Index k = first; k < depth; ++k) {
      Vector right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(d, panel + k * kPanel + j + v * n);
      for (int i = 0; i < rows; ++i) {
        const auto left = hn::Set(d, factor[(first + i) * row + k]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(left, right[v], sum[i][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      auto length = hn::LoadU(d, lengths + j + v * n);
      for (int i = 0; i < rows; ++i) length = hn::MulAdd(sum[i][v], sum[i][v], length);
      hn::StoreU(length, d, lengths + j + v * n);
    }
  }
}

void squared_lengths_after(const float* factor, Index row, const float* panel, Index depth, float* lengths) {
  std::fill_n(lengths, kPanel, 0.0f);
  Index i = 0;
  for (; i + kRows <= depth; i += kRows) add_squared_products<kRows>(factor, row, panel, i, depth, lengths);
  for (; i < depth; ++i) add_squared_products<1>(factor, row, panel, i, depth, lengths);
}

bool distances(const float* lengths, const float* products, float reference, float share, Index count,
               float* distances) {
  const Floats d;
  const auto length_of_reference = hn::Set(d, reference);
  const auto least = hn::Set(d, share);
  const auto minus_two = hn::Set(d, -2.0f);
  bool cancelled = false;
  const auto step = [&](Index j) HWY_ATTR {
    const auto whole = hn::Add(hn::LoadU(d, lengths + j), length_of_reference);
    const auto squared = hn::MulAdd(minus_two, hn::LoadU(d, products + j), whole);
    const auto rounded = hn::Lt(squared, hn::Mul(whole, least));
    cancelled = cancelled || !hn::AllFalse(d, rounded);
    hn::StoreU(hn::IfThenElse(rounded, hn::Set(d, -1.0f), hn::Sqrt(squared)), d, distances + j);
  };
  for (Index j = 0; j < count; j += static_cast<Index>(kVectorLanes)) step(j);
  return cancelled;
}

template <class Join>
HWY_INLINE void slide(const float* values, Index width, Index count, float* out, const Join& join) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  Index i = 0;
  for (; i + n <= count; i += n) {
    auto joined = hn::LoadU(d, values + i);
    for (Index j = 1; j < width; ++j) joined = join.both(joined, hn::LoadU(d, values + i + j));
    hn::StoreU(join.finish(joined), d, out + i);
  }
  const hn::CappedTag<float, 1> single;
  for (; i < count; ++i) {
    auto joined = hn::LoadU(single, values + i);
    for (Index j = 1; j < width; ++j) joined = join.both(joined, hn::LoadU(single, values + i + j));
    hn::StoreU(join.finish(joined), single, out + i);
  }
}

struct ScaledSum {
  float scale;
  template <class V>
  HWY_INLINE V both(V a, V b) const {
    return hn::Add(a, b);
  }
  template <class V>
  HWY_INLINE V finish(V sum) const {
    return hn::Mul(sum, hn::Set(hn::DFromV<V>(), scale));
  }
};

struct Maximum {
  template <class V>
  HWY_INLINE V both(V a, V b) const {
    return hn::Max(a, b);
  }
  template <class V>
  HWY_INLINE V finish(V maximum) const {
    return maximum;
  }
};

void sliding_sums(const float* values, Index width, float scale, Index count, float* out) {
  slide(values, width, count, out, ScaledSum{scale});
}

void sliding_maxima(const float* values, Index width, Index count, float* out) {
  slide(values, width, count, out, Maximum{});
}

void add_gram(const float* x, Index row, Index rows, Index depth, float* gram) {
  const Index width = rounded_up(depth, kLanes);
  // Half a panel wide: narrower, more of what lies below the diagonal is left out; wider, more vectors share a load.
  constexpr Index kColumns = kPanel / 2;
  for (Index j = 0; j < width; j += kColumns) {
    const Index columns = std::min(kColumns, width - j);
    multiply(std::min(depth, j + columns), columns, rows, x, 1, row, x + j, row, gram + j, width, true);
  }
}

// Whole numbers in the order of the floats that they stand for; 0 and −0 are the same.
template <class V>
HWY_INLINE auto orderable(Floats d, V values) {
  const hn::RebindToUnsigned<Floats> du;
  const hn::RebindToSigned<Floats> di;
  const auto bits = hn::BitCast(di, hn::Add(values, hn::Zero(d)));
  const auto negative = hn::BitCast(du, hn::ShiftRight<31>(bits));
  return hn::Xor(hn::BitCast(du, bits), hn::Or(negative, hn::Set(du, 0x80000000U)));
}

// The float that an orderable number stands for.
inline float float_of(std::uint32_t key) { return std::bit_cast<float>((key >> 31) != 0 ? key ^ 0x80000000U : ~key); }

// The count-th largest of `keys`, bit by bit from the highest: a bit is set if at least `count` keys reach what it
// makes. No comparison decides a branch, so that nothing is mispredicted. `keys` are followed by zeros to the next
// vector.
std::uint32_t nth_largest(const std::uint32_t* keys, Index size, Index count) {
  const hn::RebindToUnsigned<Floats> du;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  std::uint32_t found = 0;
  for (std::uint32_t bit = 0x80000000U; bit != 0; bit >>= 1) {
    const std::uint32_t least = found | bit;
    const auto threshold = hn::Set(du, least);
    Index reaching = rounded_up(size, n);
    for (Index j = 0; j < size; j += n) {
      reaching -= static_cast<Index>(hn::CountTrue(du, hn::Gt(threshold, hn::LoadU(du, keys + j))));
    }
    if (reaching >= count) found = least;
  }
  return found;
}

// A threshold that at least `count` values reach comes cheap: the count-th largest of the maxima of disjoint groups.
// Few values lie above it but those that are looked for, and only they are compared with each other.
void largest(const float* values, Index size, Index count, std::vector<std::uint32_t>& positions) {
  const Floats d;
  const hn::RebindToUnsigned<Floats> du;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  thread_local std::vector<std::uint32_t> keys;
  const auto room = static_cast<std::size_t>(size + 2 * n);
  if (keys.size() < room) keys.resize(room);
  if (positions.size() < room) positions.resize(room);

  // A group is one lane of as many vectors as still leave twice the groups that are needed.
  const Index vectors = std::clamp<Index>(size / (2 * count), 1, 64);
  const Index groups = size / (vectors * n) * n;
  std::uint32_t threshold = 0;
  if (groups >= count) {
    for (Index g = 0; g < groups; g += n) {
      const float* const from = values + g * vectors;
      auto maximum = hn::LoadU(d, from);
      for (Index v = 1; v < vectors; ++v) maximum = hn::Max(maximum, hn::LoadU(d, from + v * n));
      hn::StoreU(orderable(d, maximum), du, keys.data() + g);
    }
    std::fill_n(keys.begin() + groups, n, 0U);
    threshold = nth_largest(keys.data(), groups, count);
  }

  // What reaches it, in the order of positions: few of many, so they are picked out of the bits of the comparisons.
  const float lowest = threshold == 0 ? -std::numeric_limits<float>::infinity() : float_of(threshold);
  const auto least = hn::Set(d, lowest);
  Index found = 0;
  const auto pick = [&](std::uint64_t bits, Index first) {
    for (; bits != 0; bits &= bits - 1) {
      positions[static_cast<std::size_t>(found++)] = static_cast<std::uint32_t>(first + std::countr_zero(bits));
    }
  };
  constexpr Index kBits = 64;
  Index j = 0;
  for (; j + kBits <= size; j += kBits) {
    std::uint64_t bits = 0;
    for (Index v = 0; v < kBits; v += n) {
      const auto mask = hn::RebindMask(du, hn::Ge(hn::LoadU(d, values + j + v), least));
      // Read back as wide as it was written, or the processor waits for the write.
      std::conditional_t<(n > 8), std::uint16_t, std::uint8_t> part = 0;
      std::uint8_t bytes[8];
      hn::StoreMaskBits(du, mask, bytes);
      std::memcpy(&part, bytes, sizeof part);
      bits |= static_cast<std::uint64_t>(part) << v;
    }
    pick(bits, j);
  }
  for (; j < size; ++j) pick(values[j] >= lowest ? 1 : 0, j);
  // Places beyond the last are any that exist.
  std::fill_n(positions.begin() + found, n, 0U);
  for (Index i = 0; i < found; i += n) {
    const auto places = hn::BitCast(hn::RebindToSigned<Floats>(), hn::LoadU(du, positions.data() + i));
    hn::StoreU(orderable(d, hn::GatherIndex(d, values, places)), du, keys.data() + i);
  }
  std::fill_n(keys.begin() + found, n, 0U);
  if (found > count) {
    const std::uint32_t last = nth_largest(keys.data(), found, count);
    const auto bound = hn::Set(du, last);
    Index equal = count;  // how many of those that equal the last one are among the largest
    for (Index i = 0; i < found; i += n) {
      equal -= static_cast<Index>(hn::CountTrue(du, hn::Gt(hn::LoadU(du, keys.data() + i), bound)));
    }
    Index kept = 0;
    for (Index i = 0; i < found; i += n) {
      const auto key = hn::LoadU(du, keys.data() + i);
      const auto place = hn::LoadU(du, positions.data() + i);
      if (equal == 0 || hn::AllFalse(du, hn::Eq(key, bound))) {
        kept += static_cast<Index>(hn::CompressStore(place, hn::Gt(key, bound), du, positions.data() + kept));
        continue;
      }
      for (Index lane = i; lane < std::min(found, i + n); ++lane) {
        const std::uint32_t each = keys[static_cast<std::size_t>(lane)];
        if (each < last || (each == last && equal == 0)) continue;
        if (each == last) --equal;
        positions[static_cast<std::size_t>(kept++)] = positions[static_cast<std::size_t>(lane)];
      }
    }
    found = kept;
  }
  positions.resize(static_cast<std::size_t>(found));
}

bool has_nan(const float* values, Index count) {
  const Floats d;
  constexpr Index n = static_cast<Index>(kVectorLanes);
  Index j = 0;
  bool found = false;
  for (; j + n <= count; j += n) found = found || !hn::AllFalse(d, hn::IsNaN(hn::LoadU(d, values + j)));
  for (; j < count; ++j) found = found || std::isnan(values[j]);
  return found;
}

const char* instruction_set() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace kvreplay::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvreplay::kernels {

HWY_EXPORT(multiply);
HWY_EXPORT(add_product);
HWY_EXPORT(to_panels);
HWY_EXPORT(pack);
HWY_EXPORT(multiply_packed);
HWY_EXPORT(exponentiate);
HWY_EXPORT(finish_logits);
HWY_EXPORT(exponentiate_columns);
HWY_EXPORT(squared_lengths);
HWY_EXPORT(squared_lengths_after);
HWY_EXPORT(distances);
HWY_EXPORT(add_gram);
HWY_EXPORT(sliding_sums);
HWY_EXPORT(sliding_maxima);
HWY_EXPORT(largest);
HWY_EXPORT(has_nan);
HWY_EXPORT(instruction_set);

void multiply(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
              Index b_row, float* c, Index c_row, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(multiply)(rows, columns, depth, a, a_row, a_step, b, b_row, c, c_row, accumulate);
}

void add_product(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
                 Index b_row, float* c, Index c_row) {
  HWY_DYNAMIC_DISPATCH(add_product)(rows, columns, depth, a, a_row, a_step, b, b_row, c, c_row);
}

void to_panels(const float* rows, Index row, Index count, Index depth, float* panels) {
  to_panels(DType::float32, reinterpret_cast<const std::byte*>(rows), row, count, depth, panels);
}

void to_panels(DType type, const std::byte* rows, Index row, Index count, Index depth, float* panels) {
  HWY_DYNAMIC_DISPATCH(to_panels)(type, rows, row, count, depth, panels);
}

void pack(DType type, const std::byte* rows, Index row, Index count, Index depth, float* packed) {
  HWY_DYNAMIC_DISPATCH(pack)(type, rows, row, count, depth, packed);
}

void multiply_packed(Index rows, Index columns, Index depth, const float* a, Index a_row, const float* packed, float* c,
                     Index c_row, bool add) {
  HWY_DYNAMIC_DISPATCH(multiply_packed)(rows, columns, depth, a, a_row, packed, c, c_row, add);
}

BlockSoftmax exponentiate(const AttentionBlock& block, float scale, float softcapping) {
  return HWY_DYNAMIC_DISPATCH(exponentiate)(block, scale, softcapping);
}

void finish_logits(const QueryColumns& queries, Index first_key, Index count, float* products, float* maxima) {
  HWY_DYNAMIC_DISPATCH(finish_logits)(queries, first_key, count, products, maxima);
}

void exponentiate_columns(Index count, Index columns, const float* maxima, float* logits) {
  HWY_DYNAMIC_DISPATCH(exponentiate_columns)(count, columns, maxima, logits);
}

void squared_lengths(const float* panel, Index depth, float* lengths) {
  HWY_DYNAMIC_DISPATCH(squared_lengths)(panel, depth, lengths);
}

void squared_lengths_after(const float* factor, Index row, const float* panel, Index depth, float* lengths) {
  HWY_DYNAMIC_DISPATCH(squared_lengths_after)(factor, row, panel, depth, lengths);
}

bool distances(const float* lengths, const float* products, float reference, float share, Index count, float* out) {
  return HWY_DYNAMIC_DISPATCH(distances)(lengths, products, reference, share, count, out);
}

void sliding_sums(const float* values, Index width, float scale, Index count, float* out) {
  HWY_DYNAMIC_DISPATCH(sliding_sums)(values, width, scale, count, out);
}

void sliding_maxima(const float* values, Index width, Index count, float* out) {
  HWY_DYNAMIC_DISPATCH(sliding_maxima)(values, width, count, out);
}

void add_gram(const float* x, Index row, Index rows, Index depth, float* gram) {
  HWY_DYNAMIC_DISPATCH(add_gram)(x, row, rows, depth, gram);
}

bool has_nan(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(has_nan)(values.data(), static_cast<Index>(values.size()));
}

const char* instruction_set() { return HWY_DYNAMIC_DISPATCH(instruction_set)(); }

void pad_rows(float* rows, Index count, Index depth, Index width) {
  if (depth == width) return;
  for (Index n = count; n-- > 0;) {
    std::copy_backward(rows + n * depth, rows + (n + 1) * depth, rows + n * width + depth);
    std::fill(rows + n * width + depth, rows + (n + 1) * width, 0.0f);
  }
}

void largest(std::span<const float> values, Index count, std::vector<std::uint32_t>& positions) {
  const auto size = static_cast<Index>(values.size());
  count = std::clamp<Index>(count, 0, size);
  if (count == 0) {
    positions.clear();
  } else {
    HWY_DYNAMIC_DISPATCH(largest)(values.data(), size, count, positions);
  }
}

}  // namespace kvreplay::kernels
#endif
