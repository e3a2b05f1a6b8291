// Quantised weights as numbers: those that ggml's Python package makes of the same bytes.
#include "tracer/dequantize.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "support/places.h"
#include "support/temporary_folder.h"
#include "tracer/gguf.h"

namespace kvreplay::tracer {
namespace {

using testing::ElementsAre;

std::filesystem::path fixtures() { return test::project_folder() / "tests" / "tracer" / "gguf"; }

std::vector<float> numbers_of(const GgufTensor& tensor) {
  Index elements = 1;
  for (const Index size : tensor.shape) elements *= size;
  std::vector<float> numbers(static_cast<std::size_t>(elements));
  dequantize(tensor.type, tensor.data.data(), numbers);
  return numbers;
}

TEST(Dequantize, EveryTypeIsWhatGgmlsPackageMakesOfIt) {
  const GgufFile file(fixtures() / "types.gguf");
  const std::string stored = test::read_file(fixtures() / "types.f32");
  std::vector<float> expected(stored.size() / sizeof(float));
  std::memcpy(expected.data(), stored.data(), stored.size());

  std::vector<std::string> types;
  std::size_t first = 0;
  for (const auto& [name, tensor] : file.contents().tensors) {
    types.push_back(name);
    ASSERT_TRUE(can_dequantize(tensor.type)) << name;
    EXPECT_EQ(block_of(tensor.type)->name, name);
    const std::vector<float> numbers = numbers_of(tensor);
    ASSERT_LE(first + numbers.size(), expected.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      const float wanted = expected[first + i];
      if (std::isnan(wanted)) {
        EXPECT_TRUE(std::isnan(numbers[i])) << name << ' ' << i;
      } else {
        // To the last bit, and the sign of zero.
        ASSERT_EQ(std::bit_cast<std::uint32_t>(numbers[i]), std::bit_cast<std::uint32_t>(wanted))
            << name << ' ' << i << ": " << numbers[i] << ", but the package has " << wanted;
      }
    }
    first += numbers.size();
  }
  EXPECT_EQ(first, expected.size());
  EXPECT_THAT(types, ElementsAre("BF16", "F16", "F32", "MXFP4", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1",
                                 "Q5_K", "Q6_K", "Q8_0"));
}

TEST(Dequantize, TheSmallestAndLargestScalesOfMxfp4) {
  for (const int exponent : {0, 1, 2, 127, 254, 255}) {
    std::array<std::byte, 17> block{};
    block[0] = static_cast<std::byte>(exponent);
    block[1] = std::byte{0xf2};  // 1 in the first element, -6 half a block further
    std::array<float, 32> numbers{};
    dequantize(GgmlType::MXFP4, block.data(), numbers);
    const double scale = std::ldexp(1.0, exponent - 127);
    EXPECT_EQ(numbers[0], static_cast<float>(scale)) << exponent;
    EXPECT_EQ(numbers[16], static_cast<float>(-6 * scale)) << exponent;
    EXPECT_EQ(numbers[1], 0.f);
  }
}

TEST(Dequantize, KnowsWhatItCannotDo) {
  for (const GgmlType type : {GgmlType::IQ4_NL, GgmlType::IQ2_XXS, GgmlType::TQ1_0, GgmlType::Q8_K, GgmlType::I32,
                              GgmlType::F64, GgmlType::NVFP4}) {
    EXPECT_FALSE(can_dequantize(type)) << block_of(type)->name;
  }
}

// The file is one that ggml's package wrote, not one of these tests.
TEST(Gguf, ReadsWhatGgmlsPackageWrites) {
  const GgufFile file(fixtures() / "types.gguf");
  const auto& metadata = file.contents().metadata;
  EXPECT_EQ(std::get<std::string_view>(metadata.at("general.architecture")), "llama");
  EXPECT_EQ(std::get<GgufScalar>(metadata.at("llama.block_count")), GgufScalar(std::uint64_t{2}));
  EXPECT_EQ(std::get<GgufScalar>(metadata.at("llama.rope.freq_base")), GgufScalar(10000.0));
  EXPECT_EQ(std::get<GgufScalar>(metadata.at("tokenizer.ggml.add_bos_token")), GgufScalar(true));
  EXPECT_THAT(std::get<std::vector<std::string_view>>(metadata.at("tokenizer.ggml.tokens")),
              ElementsAre("<s>", "a", "é"));
  EXPECT_EQ(std::get<GgufScalars>(metadata.at("tokenizer.ggml.scores")).at(1), GgufScalar(-1.5));
  EXPECT_EQ(file.get("Q4_K", {2, 512}).type, GgmlType::Q4_K);
}

}  // namespace
}  // namespace kvreplay::tracer
