// Two-byte elements as float32 in vectors, included once for each instruction set (see Highway's foreach_target.h).
#if defined(KVREPLAY_BASE_WIDEN_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef KVREPLAY_BASE_WIDEN_INL_H
#undef KVREPLAY_BASE_WIDEN_INL_H
#else
#define KVREPLAY_BASE_WIDEN_INL_H
#endif

#include <hwy/highway.h>

#include <Eigen/Core>
#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace kvreplay::HWY_NAMESPACE {

struct WidenBfloat16 {
  using Stored = Eigen::bfloat16;
  /// The exponent's bits, all set in infinity and NaN and in nothing else: a finite value, less its sign, is below
  /// them.
  static constexpr std::int16_t kInfinity = 0x7f80;

#if HWY_TARGET != HWY_SCALAR
  template <class D, class Half>
  auto operator()(D d, Half bits) const {
    const hwy::HWY_NAMESPACE::RebindToUnsigned<D> d_bits;
    return hwy::HWY_NAMESPACE::BitCast(d,
                                       hwy::HWY_NAMESPACE::ShiftLeft<16>(hwy::HWY_NAMESPACE::PromoteTo(d_bits, bits)));
  }
#endif
};

struct WidenFloat16 {
  using Stored = Eigen::half;
  static constexpr std::int16_t kInfinity = 0x7c00;

#if HWY_TARGET != HWY_SCALAR
  template <class D, class Half>
  auto operator()(D d, Half bits) const {
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86 && !defined(HWY_DISABLE_F16C)
    return hwy::HWY_NAMESPACE::PromoteTo(
        d, hwy::HWY_NAMESPACE::BitCast(hwy::HWY_NAMESPACE::Rebind<hwy::float16_t, D>(), bits));
#else
    const hwy::HWY_NAMESPACE::RebindToSigned<D> d_bits;
    const auto wide = hwy::HWY_NAMESPACE::BitCast(
        d_bits, hwy::HWY_NAMESPACE::PromoteTo(hwy::HWY_NAMESPACE::RebindToUnsigned<D>(), bits));
    const auto magnitude = hwy::HWY_NAMESPACE::And(wide, hwy::HWY_NAMESPACE::Set(d_bits, 0x7fff));
    const auto sign =
        hwy::HWY_NAMESPACE::ShiftLeft<16>(hwy::HWY_NAMESPACE::AndNot(hwy::HWY_NAMESPACE::Set(d_bits, 0x7fff), wide));
    // The exponent's bias is 112 more in float32; infinity and NaN, with the largest exponent in both, need as much
    // again.
    const auto rebias = hwy::HWY_NAMESPACE::Set(d_bits, 112 << 23);
    const auto special = hwy::HWY_NAMESPACE::Gt(magnitude, hwy::HWY_NAMESPACE::Set(d_bits, kInfinity - 1));
    auto normal = hwy::HWY_NAMESPACE::Add(hwy::HWY_NAMESPACE::ShiftLeft<13>(magnitude), rebias);
    normal = hwy::HWY_NAMESPACE::Add(normal, hwy::HWY_NAMESPACE::IfThenElseZero(special, rebias));
    // Zero and subnormals are a multiple of 2^-24, and their bits say which.
    const auto small =
        hwy::HWY_NAMESPACE::Mul(hwy::HWY_NAMESPACE::ConvertTo(d, magnitude), hwy::HWY_NAMESPACE::Set(d, 0x1p-24F));
    const auto is_small = hwy::HWY_NAMESPACE::Gt(hwy::HWY_NAMESPACE::Set(d_bits, 1 << 10), magnitude);
    return hwy::HWY_NAMESPACE::BitCast(
        d, hwy::HWY_NAMESPACE::Or(
               sign, hwy::HWY_NAMESPACE::IfThenElse(is_small, hwy::HWY_NAMESPACE::BitCast(d_bits, small), normal)));
#endif
  }
#endif
};

}  // namespace kvreplay::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
