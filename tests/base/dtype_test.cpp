#include "base/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "support/every_processor.h"

namespace kvreplay {
namespace {

using test::EveryProcessor;

// What a 16-bit pattern means by the definition of the format, without any conversion instruction.
double by_definition(unsigned bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((1U << mantissa_bits) - 1)) / (1 << mantissa_bits);
  const double sign = (bits >> 15) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

class SixteenBits : public testing::TestWithParam<DType> {
 protected:
  int exponent_bits() const { return GetParam() == DType::float16 ? 5 : 8; }
  int mantissa_bits() const { return 15 - exponent_bits(); }

  std::vector<std::uint16_t> all_patterns() const {
    std::vector<std::uint16_t> patterns(65536);
    for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
    return patterns;
  }

  std::uint16_t rounded(float value) const {
    std::uint16_t bits = 0;
    from_float32(GetParam(), std::span(&value, 1), reinterpret_cast<std::byte*>(&bits));
    return bits;
  }
};

TEST_P(SixteenBits, EveryPatternIsReadAsItsDefinitionSays) {
  const auto patterns = all_patterns();
  std::vector<float> values(patterns.size());
  to_float32(GetParam(), reinterpret_cast<const std::byte*>(patterns.data()), values);
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    const double expected = by_definition(patterns[i], exponent_bits(), mantissa_bits());
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(values[i])) << i;
    } else {
      EXPECT_EQ(static_cast<double>(values[i]), expected) << i;
      EXPECT_EQ(std::signbit(values[i]), std::signbit(expected)) << i;
    }
  }
}

TEST_P(SixteenBits, EveryPatternSurvivesARoundTrip) {
  const auto patterns = all_patterns();
  std::vector<float> values(patterns.size());
  to_float32(GetParam(), reinterpret_cast<const std::byte*>(patterns.data()), values);
  std::vector<std::uint16_t> again(patterns.size());
  from_float32(GetParam(), values, reinterpret_cast<std::byte*>(again.data()));
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    if (std::isnan(values[i])) continue;
    EXPECT_EQ(again[i], patterns[i]);
  }
}

TEST_P(SixteenBits, RoundsToNearestAndTiesToEven) {
  const unsigned infinity = ((1U << exponent_bits()) - 1) << mantissa_bits();
  for (unsigned bits = 0; bits + 1 < infinity; ++bits) {
    const double low = by_definition(bits, exponent_bits(), mantissa_bits());
    const double high = by_definition(bits + 1, exponent_bits(), mantissa_bits());
    const auto middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(rounded(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(rounded(std::nextafter(middle, 0.0F)), bits);
    ASSERT_EQ(rounded(std::nextafter(middle, std::numeric_limits<float>::infinity())), bits + 1);
  }
}

TEST_P(SixteenBits, ReadsFromAnyAddress) {
  const std::uint16_t stored[] = {rounded(1.5F), rounded(-2.0F)};
  std::byte bytes[5] = {};
  std::memcpy(bytes + 1, stored, sizeof stored);
  float values[2];
  to_float32(GetParam(), bytes + 1, values);
  EXPECT_EQ(values[0], 1.5F);
  EXPECT_EQ(values[1], -2.0F);
}

TEST_P(SixteenBits, EveryProcessorReadsEveryPatternAlike) {
  const auto patterns = all_patterns();
  const auto* bytes = reinterpret_cast<const std::byte*>(patterns.data());
  EveryProcessor().for_each([&] {
    std::vector<float> values(patterns.size());
    EXPECT_FALSE(to_float32_checked(GetParam(), bytes, values));
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const double expected = by_definition(patterns[i], exponent_bits(), mantissa_bits());
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(values[i])) << i;
        ASSERT_EQ(std::signbit(values[i]), patterns[i] >> 15 != 0) << i;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), std::bit_cast<std::uint32_t>(static_cast<float>(expected)))
            << i;
      }
    }
  });
}

TEST_P(SixteenBits, EveryLengthIsReadWholeAndNoFurther) {
  EveryProcessor().for_each([&] {
    for (std::size_t count = 0; count < 150; ++count) {
      std::vector<std::uint16_t> stored(count);
      for (std::size_t i = 0; i < count; ++i) stored[i] = rounded(static_cast<float>(i) - 70);
      // At an odd address, of a block that ends where the elements do.
      std::vector<std::byte> bytes(2 * count + 1);
      if (count > 0) std::memcpy(bytes.data() + 1, stored.data(), 2 * count);
      std::vector<float> values(count + 1, -99);
      ASSERT_TRUE(to_float32_checked(GetParam(), bytes.data() + 1, std::span(values).first(count)));
      for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(values[i], static_cast<float>(i) - 70);
      ASSERT_EQ(values[count], -99);
    }
  });
}

TEST_P(SixteenBits, OneValueThatIsNotFiniteIsNoticedAnywhere) {
  const auto infinity = static_cast<std::uint16_t>(((1U << exponent_bits()) - 1) << mantissa_bits());
  EveryProcessor().for_each([&] {
    for (const std::size_t count : {1, 7, 64, 97}) {
      for (std::size_t at = 0; at < count; ++at) {
        // Negative infinity, quiet and signalling NaN, and the largest values that are none of these.
        for (const unsigned bits :
             {infinity + 0U, infinity | 0x8000U, infinity + 1U, 0xffffU, infinity - 1U, (infinity - 1U) | 0x8000U}) {
          std::vector<std::uint16_t> stored(count, 0x8001);
          stored[at] = static_cast<std::uint16_t>(bits);
          std::vector<float> values(count);
          const bool finite = (bits & 0x7fffU) < infinity;
          ASSERT_EQ(to_float32_checked(GetParam(), reinterpret_cast<const std::byte*>(stored.data()), values), finite);
          ASSERT_EQ(all_finite(values), finite);
        }
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Formats, SixteenBits, testing::Values(DType::float16, DType::bfloat16),
                         [](const auto& tested) { return std::string(name_of(tested.param)); });

TEST(DType, Float32KeepsEveryBit) {
  const std::vector<std::uint32_t> patterns = {0,          0x80000000, 1,          0x7f7fffff, 0x7f800000,
                                               0xff800000, 0x7fc00001, 0x3f800000, 0xdeadbeef};
  std::vector<float> values(patterns.size());
  to_float32(DType::float32, reinterpret_cast<const std::byte*>(patterns.data()), values);
  std::vector<std::uint32_t> again(patterns.size());
  from_float32(DType::float32, values, reinterpret_cast<std::byte*>(again.data()));
  EXPECT_EQ(again, patterns);
}

TEST(DType, Float32IsCheckedWhileItIsCopied) {
  const float largest = std::numeric_limits<float>::max();
  const float infinity = std::numeric_limits<float>::infinity();
  EveryProcessor().for_each([&] {
    for (const std::size_t count : {1, 5, 64, 9001}) {
      for (const float value : {largest, -largest, infinity, -infinity, std::numeric_limits<float>::quiet_NaN(),
                                std::numeric_limits<float>::signaling_NaN()}) {
        for (std::size_t at = 0; at < count; at += 1 + count / 50) {
          std::vector<float> stored(count, -1.5F);
          stored[at] = value;
          std::vector<float> values(count);
          ASSERT_EQ(to_float32_checked(DType::float32, reinterpret_cast<const std::byte*>(stored.data()), values),
                    std::isfinite(value));
          ASSERT_EQ(std::memcmp(values.data(), stored.data(), count * sizeof(float)), 0);
        }
      }
    }
  });
  EXPECT_TRUE(all_finite({}));
}

TEST(DType, NamesAreTheirOwnInverse) {
  for (const DType type : {DType::float32, DType::float16, DType::bfloat16})
    EXPECT_EQ(dtype_named(name_of(type)), type);
  EXPECT_FALSE(dtype_named("float64"));
  EXPECT_FALSE(dtype_named(""));
  EXPECT_EQ(size_of(DType::float32), 4U);
  EXPECT_EQ(size_of(DType::float16), 2U);
  EXPECT_EQ(size_of(DType::bfloat16), 2U);
}

}  // namespace
}  // namespace kvreplay
