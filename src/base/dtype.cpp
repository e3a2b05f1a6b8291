#include "base/dtype.h"

#include <Eigen/Core>
#include <bit>
#include <cstring>

namespace kvreplay {

static_assert(std::endian::native == std::endian::little, "tensors are read and written as they lie in memory");

namespace {

template <class Stored>
void widen(const std::byte* bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes + 2 * i, 2);
    out[i] = static_cast<float>(Eigen::numext::bit_cast<Stored>(bits));
  }
}

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
  switch (type) {
    case DType::float32:
      if (!out.empty()) std::memcpy(out.data(), bytes, out.size_bytes());
      break;
    case DType::float16:
      widen<Eigen::half>(bytes, out);
      break;
    case DType::bfloat16:
      widen<Eigen::bfloat16>(bytes, out);
      break;
  }
}

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
