#include "kernels/inference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/inference.cpp"
#include "kernels/targets.h"

#include <hwy/foreach_target.h>
// After foreach_target.h, as it asks for.
#include <hwy/highway.h>

#include "base/widen-inl.h"
#include "kernels/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvreplay::kernels {
namespace HWY_NAMESPACE {

constexpr Index kStep = static_cast<Index>(kVectorLanes);

// Elements `from` on, as float32; their place needs no alignment.
template <DType type>
HWY_INLINE Vector widen(Floats d, const std::byte* from) {
#if HWY_TARGET == HWY_SCALAR
  float value;
  to_float32(type, from, {&value, 1});
  return hn::Set(d, value);
#else
  if constexpr (type == DType::float32) {
    const hn::Repartition<std::uint8_t, Floats> bytes;
    return hn::BitCast(d, hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(from)));
  } else {
    const hn::Rebind<std::uint16_t, Floats> halves;
    const hn::Repartition<std::uint8_t, decltype(halves)> bytes;
    const auto bits = hn::BitCast(halves, hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(from)));
    if constexpr (type == DType::bfloat16) {
      return kvreplay::HWY_NAMESPACE::WidenBfloat16()(d, bits);
    } else {
      return kvreplay::HWY_NAMESPACE::WidenFloat16()(d, bits);
    }
  }
#endif
}

// In their order.
HWY_INLINE float sum_of_lanes(Floats d, Vector vector) {
  HWY_ALIGN float lanes[kVectorLanes];
  hn::Store(vector, d, lanes);
  float total = 0;
  for (const float lane : lanes) total += lane;
  return total;
}

template <DType type, int together>
HWY_INLINE void dot_products(const std::byte* data, Index depth, const float* x, float* y) {
  const Floats d;
  constexpr Index element = type == DType::float32 ? 4 : 2;
  Vector even[together];
  Vector odd[together];
  for (int i = 0; i < together; ++i) even[i] = odd[i] = hn::Zero(d);
  Index k = 0;
  for (; k + 2 * kStep <= depth; k += 2 * kStep) {
    const auto x_even = hn::LoadU(d, x + k);
    const auto x_odd = hn::LoadU(d, x + k + kStep);
    for (int i = 0; i < together; ++i) {
      const std::byte* const from = data + (i * depth + k) * element;
      even[i] = hn::MulAdd(widen<type>(d, from), x_even, even[i]);
      odd[i] = hn::MulAdd(widen<type>(d, from + kStep * element), x_odd, odd[i]);
    }
  }
  for (int i = 0; i < together; ++i) {
    float total = sum_of_lanes(d, hn::Add(even[i], odd[i]));
    for (Index rest = k; rest < depth; ++rest) {
      float weight;
      to_float32(type, data + (i * depth + rest) * element, {&weight, 1});
      total += weight * x[rest];
    }
    y[i] = total;
  }
}

template <DType type>
HWY_INLINE void multiply_vector_typed(const std::byte* data, Index rows, Index depth, const float* x, float* y) {
  const Index row_bytes = depth * (type == DType::float32 ? 4 : 2);
  Index i = 0;
  for (; i + 4 <= rows; i += 4) dot_products<type, 4>(data + i * row_bytes, depth, x, y + i);
  for (; i < rows; ++i) dot_products<type, 1>(data + i * row_bytes, depth, x, y + i);
}

void multiply_vector(DType type, const std::byte* data, Index rows, Index depth, const float* x, float* y) {
  switch (type) {
    case DType::float32:
      return multiply_vector_typed<DType::float32>(data, rows, depth, x, y);
    case DType::float16:
      return multiply_vector_typed<DType::float16>(data, rows, depth, x, y);
    case DType::bfloat16:
      return multiply_vector_typed<DType::bfloat16>(data, rows, depth, x, y);
  }
}

// Cephes' expf: within 2 units in the last place. Below −87.3 the result is 0, above 88.3 it stays at exp(88.3).
HWY_INLINE Vector exponential(Floats d, Vector argument) {
  const hn::RebindToSigned<Floats> di;
  const auto lowest = hn::Set(d, -87.3f);
  const auto highest = hn::Set(d, 88.3f);
  const auto vanishes = hn::Lt(argument, lowest);
  auto x = hn::IfThenElse(vanishes, lowest, argument);
  x = hn::IfThenElse(hn::Gt(x, highest), highest, x);
  const auto round = hn::Set(d, 12582912.0f);  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const auto power = hn::Sub(hn::MulAdd(x, hn::Set(d, 1.44269504f), round), round);
  auto rest = hn::NegMulAdd(power, hn::Set(d, 0.693359375f), x);
  rest = hn::NegMulAdd(power, hn::Set(d, -2.12194440e-4f), rest);
  auto polynomial = hn::MulAdd(rest, hn::Set(d, 1.9875691500e-4f), hn::Set(d, 1.3981999507e-3f));
  polynomial = hn::MulAdd(polynomial, rest, hn::Set(d, 8.3334519073e-3f));
  polynomial = hn::MulAdd(polynomial, rest, hn::Set(d, 4.1665795894e-2f));
  polynomial = hn::MulAdd(polynomial, rest, hn::Set(d, 1.6666665459e-1f));
  polynomial = hn::MulAdd(polynomial, rest, hn::Set(d, 5.0000001201e-1f));
  polynomial = hn::Add(hn::MulAdd(polynomial, hn::Mul(rest, rest), rest), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, power), hn::Set(di, 127)));
  return hn::IfThenZeroElse(vanishes, hn::Mul(polynomial, hn::BitCast(d, exponent)));
}

// Near 0 Cephes' tanhf, where 1 − 2 / (exp(2x) + 1) would lose what is small.
HWY_INLINE Vector tangent(Floats d, Vector x) {
  const auto one = hn::Set(d, 1.0f);
  const auto square = hn::Mul(x, x);
  auto polynomial = hn::MulAdd(square, hn::Set(d, -5.70498872745e-3f), hn::Set(d, 2.06390887954e-2f));
  polynomial = hn::MulAdd(polynomial, square, hn::Set(d, -5.37397155531e-2f));
  polynomial = hn::MulAdd(polynomial, square, hn::Set(d, 1.33314422036e-1f));
  polynomial = hn::MulAdd(polynomial, square, hn::Set(d, -3.33332819422e-1f));
  const auto near = hn::MulAdd(hn::Mul(polynomial, square), x, x);
  const auto far = hn::Sub(one, hn::Div(hn::Set(d, 2.0f), hn::Add(exponential(d, hn::Add(x, x)), one)));
  return hn::IfThenElse(hn::Lt(hn::Abs(x), hn::Set(d, 0.625f)), near, far);
}

// Columns that are gone through together: whole lines of the cache, of which every row lies in another place.
template <int vectors>
HWY_INLINE void raise_maxima_of(Index count, Index columns, const float* logits, float* maxima) {
  const Floats d;
  Vector highest[vectors];
  for (int v = 0; v < vectors; ++v) highest[v] = hn::LoadU(d, maxima + v * kStep);
  for (Index j = 0; j < count; ++j) {
    for (int v = 0; v < vectors; ++v) {
      const auto candidate = hn::LoadU(d, logits + j * columns + v * kStep);
      highest[v] = hn::IfThenElse(hn::Gt(candidate, highest[v]), candidate, highest[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) hn::StoreU(highest[v], d, maxima + v * kStep);
}

void raise_maxima(Index count, Index columns, const float* logits, float* maxima) {
  constexpr int kVectors = static_cast<int>(kLanes / kStep);
  for (Index q = 0; q < columns; q += kLanes) raise_maxima_of<kVectors>(count, columns, logits + q, maxima + q);
}

void exponentiate_and_sum(Index count, Index columns, const float* maxima, float* logits, double* sums) {
  const Floats d;
  constexpr int kVectors = static_cast<int>(kLanes / kStep);
  for (Index q = 0; q < columns; q += kLanes) {
    Vector totals[kVectors];
    Vector highest[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      totals[v] = hn::Zero(d);
      highest[v] = hn::LoadU(d, maxima + q + v * kStep);
    }
    for (Index j = 0; j < count; ++j) {
      float* const place = logits + j * columns + q;
      for (int v = 0; v < kVectors; ++v) {
        const auto weights = exponential(d, hn::Sub(hn::LoadU(d, place + v * kStep), highest[v]));
        hn::StoreU(weights, d, place + v * kStep);
        totals[v] = hn::Add(totals[v], weights);
      }
    }
    HWY_ALIGN float lanes[kLanes];
    for (int v = 0; v < kVectors; ++v) hn::Store(totals[v], d, lanes + v * kStep);
    for (Index lane = 0; lane < kLanes; ++lane) sums[q + lane] += static_cast<double>(lanes[lane]);
  }
}

// As many keys at once as a vector has lanes: their sums over lanes are then additions of whole vectors.
void add_mass(Index count, Index columns, const float* weights, const float* factors, double* mass) {
  const Floats d;
  HWY_ALIGN float totals[kVectorLanes * kVectorLanes] = {};
  HWY_ALIGN float lanes[kVectorLanes * kVectorLanes];
  HWY_ALIGN float sums[kVectorLanes];
  for (Index first = 0; first < count; first += kStep) {
    const Index keys = std::min(kStep, count - first);
    for (Index j = 0; j < keys; ++j) {
      auto total = hn::Zero(d);
      for (Index q = 0; q < columns; q += kStep) {
        total = hn::MulAdd(hn::LoadU(d, weights + (first + j) * columns + q), hn::LoadU(d, factors + q), total);
      }
      hn::Store(total, d, totals + j * kStep);
    }
    transpose_square(totals, kStep, lanes, kStep);
    auto sum = hn::Zero(d);
    for (Index lane = 0; lane < kStep; ++lane) sum = hn::Add(sum, hn::Load(d, lanes + lane * kStep));
    hn::Store(sum, d, sums);
    for (Index j = 0; j < keys; ++j) mass[first + j] += static_cast<double>(sums[j]);
  }
}

void softmax(Index count, float* logits) {
  const Floats d;
  const auto lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  auto maxima = lowest;
  Index i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto candidate = hn::LoadU(d, logits + i);
    maxima = hn::IfThenElse(hn::Gt(candidate, maxima), candidate, maxima);
  }
  float highest = hn::GetLane(hn::MaxOfLanes(d, maxima));
  for (; i < count; ++i) highest = logits[i] > highest ? logits[i] : highest;

  double total = 0;
  const auto shift = hn::Set(d, highest);
  for (i = 0; i + kStep <= count; i += kStep) {
    const auto weights = exponential(d, hn::Sub(hn::LoadU(d, logits + i), shift));
    hn::StoreU(weights, d, logits + i);
    total += static_cast<double>(sum_of_lanes(d, weights));
  }
  if (i < count) {
    HWY_ALIGN float last[kVectorLanes];
    hn::Store(lowest, d, last);
    std::copy(logits + i, logits + count, last);
    const auto weights = exponential(d, hn::Sub(hn::Load(d, last), shift));
    hn::Store(weights, d, last);
    std::copy_n(last, count - i, logits + i);
    total += static_cast<double>(sum_of_lanes(d, weights));
  }
  const auto factor = static_cast<float>(1.0 / total);
  for (i = 0; i < count; ++i) logits[i] *= factor;
}

void soft_cap(Index count, float cap, float* logits) {
  const Floats d;
  const float inverse = 1 / cap;
  Index i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto logit = hn::Mul(hn::LoadU(d, logits + i), hn::Set(d, inverse));
    hn::StoreU(hn::Mul(tangent(d, logit), hn::Set(d, cap)), d, logits + i);
  }
  for (; i < count; ++i) logits[i] = std::tanh(logits[i] * inverse) * cap;
}

void silu_multiply(Index count, float* gate, const float* up) {
  const Floats d;
  Index i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto x = hn::LoadU(d, gate + i);
    const auto bent = hn::Div(x, hn::Add(exponential(d, hn::Neg(x)), hn::Set(d, 1.0f)));
    hn::StoreU(hn::Mul(bent, hn::LoadU(d, up + i)), d, gate + i);
  }
  for (; i < count; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// x/2·(1 + tanh(u)) with u = √(2/π)·(x + 0.044715·x³) is x / (1 + exp(−2u)).
void gelu_tanh_multiply(Index count, float* gate, const float* up) {
  const Floats d;
  constexpr float outer = -1.59576912f;  // −2·√(2/π)
  constexpr float inner = 0.044715f;
  const auto one = hn::Set(d, 1.0f);
  Index i = 0;
  for (; i + kStep <= count; i += kStep) {
    const auto x = hn::LoadU(d, gate + i);
    const auto cubic = hn::Mul(x, hn::MulAdd(hn::Mul(x, x), hn::Set(d, inner), one));
    const auto bent = hn::Div(x, hn::Add(exponential(d, hn::Mul(cubic, hn::Set(d, outer))), one));
    hn::StoreU(hn::Mul(bent, hn::LoadU(d, up + i)), d, gate + i);
  }
  for (; i < count; ++i) {
    const float x = gate[i];
    gate[i] = x / (1.0f + std::exp(x * (x * x * inner + 1.0f) * outer)) * up[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvreplay::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvreplay::kernels {

HWY_EXPORT(multiply_vector);
HWY_EXPORT(raise_maxima);
HWY_EXPORT(exponentiate_and_sum);
HWY_EXPORT(add_mass);
HWY_EXPORT(softmax);
HWY_EXPORT(soft_cap);
HWY_EXPORT(silu_multiply);
HWY_EXPORT(gelu_tanh_multiply);

void multiply_vector(DType type, const std::byte* data, Index rows, Index depth, const float* x, float* y) {
  HWY_DYNAMIC_DISPATCH(multiply_vector)(type, data, rows, depth, x, y);
}

void raise_maxima(Index count, Index columns, const float* logits, float* maxima) {
  HWY_DYNAMIC_DISPATCH(raise_maxima)(count, columns, logits, maxima);
}

void exponentiate_and_sum(Index count, Index columns, const float* maxima, float* logits, double* sums) {
  HWY_DYNAMIC_DISPATCH(exponentiate_and_sum)(count, columns, maxima, logits, sums);
}

void add_mass(Index count, Index columns, const float* weights, const float* factors, double* mass) {
  HWY_DYNAMIC_DISPATCH(add_mass)(count, columns, weights, factors, mass);
}

void softmax(Index count, float* logits) { HWY_DYNAMIC_DISPATCH(softmax)(count, logits); }

void soft_cap(Index count, float cap, float* logits) { HWY_DYNAMIC_DISPATCH(soft_cap)(count, cap, logits); }

void silu_multiply(Index count, float* gate, const float* up) { HWY_DYNAMIC_DISPATCH(silu_multiply)(count, gate, up); }

void gelu_tanh_multiply(Index count, float* gate, const float* up) {
  HWY_DYNAMIC_DISPATCH(gelu_tanh_multiply)(count, gate, up);
}

// x·Φ(x); by erfc, whose digits do not vanish where Φ is small.
void gelu_multiply(Index count, float* gate, const float* up) {
  constexpr double kInverseRoot2 = 0.70710678118654752;
  for (Index i = 0; i < count; ++i) {
    const double x = gate[i];
    gate[i] = static_cast<float>(0.5 * x * std::erfc(-x * kInverseRoot2)) * up[i];
  }
}

}  // namespace kvreplay::kernels
#endif
