#include "base/dtype.h"

#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <cstring>

// Everything up to HWY_AFTER_NAMESPACE is compiled once for each kind of processor that the compiler knows, by way of
// this file including itself; which of them runs is chosen when the program does. Not for vectors whose size is only
// known then (SVE, RVV): NEON does as well on this, and RISC-V takes the portable code.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "base/dtype.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as it asks for.
#include <hwy/highway.h>

#include "base/widen-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvreplay::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// The exponent's bits, all set in infinity and NaN and in nothing else: a finite value, less its sign, is below them.
constexpr std::int32_t kFloat32Infinity = 0x7f800000;

// Widens `count` elements at `bytes`; whether all are finite.
template <class Widen>
bool widen(const std::byte* bytes, std::size_t count, float* out) {
#if HWY_TARGET == HWY_SCALAR
  bool finite = true;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes + 2 * i, 2);
    out[i] = static_cast<float>(Eigen::numext::bit_cast<typename Widen::Stored>(bits));
    finite = finite && (bits & 0x7fff) < Widen::kInfinity;
  }
  return finite;
#else
  const hn::ScalableTag<std::int16_t> d16;
  const hn::RebindToUnsigned<decltype(d16)> d_bits;
  const hn::Repartition<std::uint8_t, decltype(d16)> d_bytes;
  const hn::Repartition<float, decltype(d16)> d32;
  const std::size_t lanes = hn::Lanes(d16);
  const auto magnitude_bits = hn::Set(d16, 0x7fff);
  const Widen to_float;
  auto largest = hn::Zero(d16);

  const auto step = [&](const std::byte* from, float* to) HWY_ATTR {
    const auto bits = hn::BitCast(d_bits, hn::LoadU(d_bytes, reinterpret_cast<const std::uint8_t*>(from)));
    largest = hn::Max(largest, hn::And(hn::BitCast(d16, bits), magnitude_bits));
    hn::StoreU(to_float(d32, hn::LowerHalf(bits)), d32, to);
    hn::StoreU(to_float(d32, hn::UpperHalf(hn::Half<decltype(d_bits)>(), bits)), d32, to + lanes / 2);
  };
  std::size_t done = 0;
  for (; done + lanes <= count; done += lanes) step(bytes + 2 * done, out + done);
  if (done < count) {
    std::byte last[2 * hn::MaxLanes(d16)] = {};
    float widened[hn::MaxLanes(d16)];
    std::memcpy(last, bytes + 2 * done, 2 * (count - done));
    step(last, widened);
    std::memcpy(out + done, widened, sizeof(float) * (count - done));
  }
  return hn::AllTrue(d16, hn::Lt(largest, hn::Set(d16, Widen::kInfinity)));
#endif
}

bool widen_float16(const std::byte* bytes, std::size_t count, float* out) {
  return widen<WidenFloat16>(bytes, count, out);
}

bool widen_bfloat16(const std::byte* bytes, std::size_t count, float* out) {
  return widen<WidenBfloat16>(bytes, count, out);
}

bool is_finite(const float* values, std::size_t count) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> d_bits;
  const std::size_t lanes = hn::Lanes(d);
  const auto magnitude_bits = hn::Set(d_bits, 0x7fffffff);
  auto largest = hn::Zero(d_bits);
  auto largest_next = hn::Zero(d_bits);
  std::size_t done = 0;
  for (; done + 2 * lanes <= count; done += 2 * lanes) {
    const auto these = hn::BitCast(d_bits, hn::LoadU(d, values + done));
    const auto next = hn::BitCast(d_bits, hn::LoadU(d, values + done + lanes));
    largest = hn::Max(largest, hn::And(these, magnitude_bits));
    largest_next = hn::Max(largest_next, hn::And(next, magnitude_bits));
  }
  largest = hn::Max(largest, largest_next);
  bool finite = hn::AllTrue(d_bits, hn::Lt(largest, hn::Set(d_bits, kFloat32Infinity)));
  for (; done < count; ++done) {
    finite = finite && (std::bit_cast<std::int32_t>(values[done]) & kFloat32Infinity) != kFloat32Infinity;
  }
  return finite;
}

}  // namespace
}  // namespace kvreplay::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvreplay {

static_assert(std::endian::native == std::endian::little, "tensors are read and written as they lie in memory");

namespace {

HWY_EXPORT(widen_float16);
HWY_EXPORT(widen_bfloat16);
HWY_EXPORT(is_finite);

template <class Stored>
void narrow(std::span<const float> in, std::byte* bytes) {
  for (std::size_t i = 0; i < in.size(); ++i) {
    const auto bits = Eigen::numext::bit_cast<std::uint16_t>(static_cast<Stored>(in[i]));
    std::memcpy(bytes + 2 * i, &bits, 2);
  }
}

}  // namespace

std::size_t size_of(DType type) { return type == DType::float32 ? 4 : 2; }

std::string_view name_of(DType type) {
  switch (type) {
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
  }
  return "";
}

std::optional<DType> dtype_named(std::string_view name) {
  for (const DType type : {DType::float32, DType::float16, DType::bfloat16}) {
    if (name == name_of(type)) return type;
  }
  return std::nullopt;
}

void to_float32(DType type, const std::byte* bytes, std::span<float> out) {
  // Knowing whether all are finite costs next to nothing while they are at hand.
  static_cast<void>(to_float32_checked(type, bytes, out));
}

bool to_float32_checked(DType type, const std::byte* bytes, std::span<float> out) {
  if (out.empty()) return true;
  switch (type) {
    case DType::float32: {
      // In pieces that the nearest cache holds, so that memory is swept once.
      constexpr std::size_t kPiece = 4096;
      bool finite = true;
      for (std::size_t done = 0; done < out.size(); done += kPiece) {
        const auto piece = out.subspan(done, std::min(kPiece, out.size() - done));
        std::memcpy(piece.data(), bytes + sizeof(float) * done, piece.size_bytes());
        finite = all_finite(piece) && finite;
      }
      return finite;
    }
    case DType::float16:
      return HWY_DYNAMIC_DISPATCH(widen_float16)(bytes, out.size(), out.data());
    case DType::bfloat16:
      return HWY_DYNAMIC_DISPATCH(widen_bfloat16)(bytes, out.size(), out.data());
  }
  return true;
}

bool all_finite(std::span<const float> values) { return HWY_DYNAMIC_DISPATCH(is_finite)(values.data(), values.size()); }

void from_float32(DType type, std::span<const float> in, std::byte* bytes) {
  switch (type) {
    case DType::float32:
      if (!in.empty()) std::memcpy(bytes, in.data(), in.size_bytes());
      break;
    case DType::float16:
      narrow<Eigen::half>(in, bytes);
      break;
    case DType::bfloat16:
      narrow<Eigen::bfloat16>(in, bytes);
      break;
  }
}

}  // namespace kvreplay
#endif  // HWY_ONCE
