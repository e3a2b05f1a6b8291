// What GGUF files may say, and every way in which they may lie.
#include "tracer/gguf.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::TemporaryFolder;
using test::write_file;
using testing::HasSubstr;
using testing::StartsWith;
using Strings = std::vector<std::string_view>;

template <class T>
std::string bytes_of(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

std::string string(std::string_view text) { return bytes_of(std::uint64_t{text.size()}) + std::string(text); }

template <class T>
std::string entry(std::string_view key, GgufValueType type, T value) {
  return string(key) + bytes_of(type) + bytes_of(value);
}

std::string array(std::string_view key, GgufValueType type, std::uint64_t size, const std::string& elements) {
  return string(key) + bytes_of(GgufValueType::array) + bytes_of(type) + bytes_of(size) + elements;
}

// `sizes` as in the file: the innermost dimension first.
std::string description(std::string_view name, const std::vector<std::uint64_t>& sizes, std::uint32_t type,
                        std::uint64_t offset) {
  std::string bytes = string(name) + bytes_of(static_cast<std::uint32_t>(sizes.size()));
  for (const std::uint64_t size : sizes) bytes += bytes_of(size);
  return bytes + bytes_of(type) + bytes_of(offset);
}

constexpr std::uint32_t kF32 = 0;
constexpr std::uint32_t kF16 = 1;
constexpr std::uint32_t kQ4_0 = 2;
constexpr std::uint32_t kQ6_K = 14;
constexpr std::uint32_t kI32 = 26;

// A file as its writer may make it.
struct Written {
  std::vector<std::string> metadata;
  std::vector<std::string> tensors;
  std::string data;
  std::uint32_t version = 3;
  std::size_t alignment = 32;
  std::string magic = "GGUF";

  std::string bytes() const {
    std::string file =
        magic + bytes_of(version) + bytes_of(std::uint64_t{tensors.size()}) + bytes_of(std::uint64_t{metadata.size()});
    for (const std::string& one : metadata) file += one;
    for (const std::string& one : tensors) file += one;
    file.resize((file.size() + alignment - 1) / alignment * alignment);
    return file + data;
  }
};

GgufContents parse(const std::string& file) {
  return parse_gguf({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "f");
}

std::string complaint(const std::string& file) {
  return message_of<Error>([&] { parse(file); });
}

std::string text_of(const GgufTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size()};
}

template <class T>
T scalar(const GgufContents& contents, std::string_view key) {
  return std::get<T>(std::get<GgufScalar>(contents.metadata.find(key)->second));
}

TEST(Gguf, ReadsEveryTypeOfMetadata) {
  using Type = GgufValueType;
  Written written;
  written.metadata = {
      entry("u8", Type::uint8, std::uint8_t{200}),
      entry("i8", Type::int8, std::int8_t{-100}),
      entry("u16", Type::uint16, std::uint16_t{60000}),
      entry("i16", Type::int16, std::int16_t{-30000}),
      entry("u32", Type::uint32, std::uint32_t{4000000000}),
      entry("i32", Type::int32, std::int32_t{-2000000000}),
      entry("f32", Type::float32, 0.1f),
      entry("no", Type::boolean, std::uint8_t{0}),
      entry("yes", Type::boolean, std::uint8_t{1}),
      string("text") + bytes_of(Type::string) + string("Käse\n"),
      entry("u64", Type::uint64, std::numeric_limits<std::uint64_t>::max()),
      entry("i64", Type::int64, std::numeric_limits<std::int64_t>::min()),
      entry("f64", Type::float64, 0.1),
      array("texts", Type::string, 3, string("a") + string("") + string("bc")),
      array("shorts", Type::int16, 2, bytes_of(std::int16_t{-5}) + bytes_of(std::int16_t{7})),
      array("floats", Type::float32, 1, bytes_of(1.5f)),
      array("truths", Type::boolean, 2, std::string("\1\0", 2)),
      array("nothing", Type::uint64, 0, ""),
  };
  const std::string file = written.bytes();
  const GgufContents contents = parse(file);
  EXPECT_EQ(contents.version, 3u);
  ASSERT_EQ(contents.metadata.size(), written.metadata.size());
  EXPECT_EQ(scalar<std::uint64_t>(contents, "u8"), 200u);
  EXPECT_EQ(scalar<std::int64_t>(contents, "i8"), -100);
  EXPECT_EQ(scalar<std::uint64_t>(contents, "u16"), 60000u);
  EXPECT_EQ(scalar<std::int64_t>(contents, "i16"), -30000);
  EXPECT_EQ(scalar<std::uint64_t>(contents, "u32"), 4000000000u);
  EXPECT_EQ(scalar<std::int64_t>(contents, "i32"), -2000000000);
  EXPECT_EQ(scalar<double>(contents, "f32"), double{0.1f});
  EXPECT_FALSE(scalar<bool>(contents, "no"));
  EXPECT_TRUE(scalar<bool>(contents, "yes"));
  EXPECT_EQ(std::get<std::string_view>(contents.metadata.at("text")), "Käse\n");
  EXPECT_EQ(scalar<std::uint64_t>(contents, "u64"), std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(scalar<std::int64_t>(contents, "i64"), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(scalar<double>(contents, "f64"), 0.1);
  EXPECT_EQ(std::get<Strings>(contents.metadata.at("texts")), (Strings{"a", "", "bc"}));
  const auto& shorts = std::get<GgufScalars>(contents.metadata.at("shorts"));
  ASSERT_EQ(shorts.size, 2);
  EXPECT_EQ(shorts.at(0), GgufScalar(std::int64_t{-5}));
  EXPECT_EQ(shorts.at(1), GgufScalar(std::int64_t{7}));
  EXPECT_EQ(std::get<GgufScalars>(contents.metadata.at("floats")).at(0), GgufScalar(1.5));
  const auto& truths = std::get<GgufScalars>(contents.metadata.at("truths"));
  EXPECT_EQ(truths.at(0), GgufScalar(true));
  EXPECT_EQ(truths.at(1), GgufScalar(false));
  EXPECT_EQ(std::get<GgufScalars>(contents.metadata.at("nothing")).size, 0);
}

TEST(Gguf, FindsTensorsByNameShapeAndAlignment) {
  for (const std::uint32_t version : {2u, 3u}) {
    Written written;
    written.version = version;
    written.alignment = 64;
    written.metadata = {entry("general.alignment", GgufValueType::uint32, std::uint32_t{64})};
    written.tensors = {
        description("second", {3, 2}, kF16, 64),
        description("first", {64, 2}, kQ4_0, 128),
        description("empty", {32, 0}, kQ4_0, 0),
        description("one", {}, kF32, 0),
    };
    written.data = std::string(64, 'o') + std::string(64, 's') + std::string(72, 'f');
    const std::string file = written.bytes();
    const GgufContents contents = parse(file);
    EXPECT_EQ(contents.version, version);
    ASSERT_EQ(contents.tensors.size(), 4u);
    EXPECT_EQ(contents.tensors.at("second").shape, (std::vector<Index>{2, 3}));
    EXPECT_EQ(contents.tensors.at("second").type, GgmlType::F16);
    EXPECT_EQ(text_of(contents.tensors.at("second")), std::string(12, 's'));
    EXPECT_EQ(contents.tensors.at("first").shape, (std::vector<Index>{2, 64}));
    EXPECT_EQ(text_of(contents.tensors.at("first")), std::string(72, 'f'));
    EXPECT_EQ(contents.tensors.at("empty").data.size(), 0u);
    EXPECT_EQ(contents.tensors.at("one").shape, std::vector<Index>{});
    EXPECT_EQ(text_of(contents.tensors.at("one")), "oooo");
  }
}

TEST(Gguf, NamesEveryLieOfTheMetadata) {
  using Type = GgufValueType;
  const auto type = [](std::uint32_t number) { return static_cast<Type>(number); };
  constexpr auto kMost = std::numeric_limits<std::uint64_t>::max();
  const std::pair<std::string, std::string> lies[] = {
      {bytes_of(kMost) + "key and more",
       "the key of metadata entry 1 takes 18446744073709551615 bytes from byte 32 on"},
      {bytes_of(std::uint64_t{1} << 40) + "key and more", "only 32 follow; the file is truncated or damaged"},
      {entry("a", type(13), std::uint64_t{0}), "\"a\" has type 13, which GGUF does not have"},
      {entry("a", Type::string, kMost), "\"a\" takes 18446744073709551615 bytes"},
      {entry("a", Type::boolean, std::uint8_t{2}), "\"a\" holds 2 where a truth value is 0 or 1"},
      {array("a", Type::boolean, 2, "\1\7"), "\"a\" holds 7 where a truth value is 0 or 1"},
      {array("a", type(99), 2, "\1\7"), "\"a\" has type 99"},
      {array("a", Type::array, 1, array("", Type::uint8, 1, "x")), "\"a\" is an array of arrays"},
      {array("a", Type::uint64, (std::uint64_t{1} << 61) + 1, "12345678"),
       "the size of \"a\" is 2305843009213693953, but only"},
      {array("a", Type::string, kMost, string("b")), "the size of \"a\" is 18446744073709551615, but only"},
      {array("a", Type::string, 2, string("b") + bytes_of(kMost)), "\"a\" takes 18446744073709551615 bytes"},
      {entry("a\n\x1b[2J", type(77), std::uint64_t{0}), "\"a\\n\\x1b[2J\" has type 77"},
      {entry("general.alignment", Type::uint32, std::uint32_t{0}),
       "general.alignment is 0; a power of two is expected"},
      {entry("general.alignment", Type::uint32, std::uint32_t{48}), "general.alignment is 48; a power of two"},
      {entry("general.alignment", Type::int32, std::int32_t{-32}), "general.alignment is not a whole number"},
      {entry("general.alignment", Type::float32, 32.0f), "general.alignment is not a whole number"},
      {array("general.alignment", Type::uint32, 1, bytes_of(std::uint32_t{32})),
       "general.alignment is not a whole number"},
      {entry("split.count", Type::uint16, std::uint16_t{3}),
       "is one of 3 files that a model was split into; join them with llama.cpp's llama-gguf-split --merge"},
      {string("split.count") + bytes_of(Type::string) + string("3"), "split.count is not a whole number"},
  };
  for (const auto& [lie, reason] : lies) {
    Written written;
    written.metadata = {lie};
    const std::string message = complaint(written.bytes());
    EXPECT_THAT(message, HasSubstr(reason));
    EXPECT_THAT(message, StartsWith("f: "));
  }
  Written twice;
  twice.metadata = {entry("a", Type::uint8, 'x'), entry("a", Type::uint16, std::uint16_t{1})};
  EXPECT_EQ(complaint(twice.bytes()), "f: has \"a\" twice");
  Written whole;
  whole.metadata = {entry("split.count", Type::uint16, std::uint16_t{1})};
  EXPECT_EQ(complaint(whole.bytes()), "");
}

TEST(Gguf, NamesEveryLieAboutTensors) {
  constexpr std::uint64_t kHuge = std::uint64_t{1} << 32;
  constexpr auto kMost = std::numeric_limits<std::uint64_t>::max();
  const struct {
    std::vector<std::string> tensors;
    std::string reason;
  } lies[] = {
      {{bytes_of(kMost) + std::string(24, 'x')}, "the name of tensor 1 takes 18446744073709551615 bytes"},
      {{string("w") + bytes_of(std::uint32_t{5}) + std::string(60, '\0')},
       "tensor \"w\": it has 5 dimensions, but the most are 4"},
      {{description("w", {8}, 4, 0)}, "tensor \"w\": its type 4 is none of ggml's"},
      {{description("w", {8}, 4294967295u, 0)}, "tensor \"w\": its type 4294967295 is none of ggml's"},
      {{description("w", {33}, kQ4_0, 0)},
       "tensor \"w\": its rows of 33 elements are not whole blocks of 32, which Q4_0 stores"},
      {{description("w", {128, 2}, kQ6_K, 0)},
       "its rows of 128 elements are not whole blocks of 256, which Q6_K stores"},
      {{description("w", {kHuge, kHuge}, kF16, 0)}, "tensor \"w\": its shape overflows"},
      {{description("w", {kHuge, kHuge, 0}, kF16, 0)}, "tensor \"w\": its shape overflows"},
      {{description("w", {kMost}, kF32, 0)}, "tensor \"w\": its shape overflows"},
      {{description("w", {1, kMost}, kF32, 0)}, "tensor \"w\": its shape overflows"},
      {{description("w", {8}, kF32, 8)},
       "tensor \"w\": its bytes begin at 8, which is no multiple of the alignment 32"},
      {{description("w", {17}, kF32, 0)},
       "tensor \"w\": its 68 bytes from 0 on lie outside the file's 64 bytes of tensors"},
      {{description("w", {8}, kF32, 64)}, "its 32 bytes from 64 on lie outside the file's 64 bytes of tensors"},
      {{description("w", {8}, kF32, kMost - 31)}, "from 18446744073709551584 on lie outside"},
      {{description("w", {0}, kF32, 96)}, "its 0 bytes from 96 on lie outside"},
      {{description("w", {8}, kF32, 0), description("w", {8}, kF32, 32)}, "has tensor \"w\" twice"},
      {{description("v", {9}, kF32, 0), description("w", {8}, kF32, 32)}, "tensors \"v\" and \"w\" overlap"},
      {{description("w", {8}, kF32, 32), description("v", {8}, kF32, 32)}, "tensors \"v\" and \"w\" overlap"},
      {{description("w", {1}, kF32, 32), description("v", {16}, kF32, 0)}, "tensors \"v\" and \"w\" overlap"},
  };
  for (const auto& lie : lies) {
    Written written;
    written.tensors = lie.tensors;
    written.data = std::string(64, 'x');
    const std::string message = complaint(written.bytes());
    EXPECT_THAT(message, HasSubstr(lie.reason));
    EXPECT_THAT(message, StartsWith("f: "));
  }
}

TEST(Gguf, NamesWhatItCannotRead) {
  EXPECT_EQ(complaint(""), "f: 0 bytes are too short for a GGUF file");
  EXPECT_EQ(complaint("GGUF"), "f: 4 bytes are too short for a GGUF file");
  Written written;
  written.magic = "GGML";
  EXPECT_EQ(complaint(written.bytes()), "f: does not begin with GGUF; the file is damaged or no GGUF file");
  written.magic = "GGUF";
  for (const std::uint32_t version : {0u, 1u, 4u}) {
    written.version = version;
    EXPECT_EQ(complaint(written.bytes()), fmt::format("f: is GGUF of version {}; versions 2 and 3 are read", version));
  }
  written.version = 3u << 24;
  EXPECT_THAT(complaint(written.bytes()),
              StartsWith("f: is big-endian; only little-endian files are read: convert it"));
  const auto claiming = [](std::uint64_t tensors, std::uint64_t entries) {
    return "GGUF" + bytes_of(std::uint32_t{3}) + bytes_of(tensors) + bytes_of(entries) + std::string(40, '\0');
  };
  EXPECT_THAT(complaint(claiming(3, 0)), HasSubstr("the number of tensors is 3, but only 48 bytes follow"));
  EXPECT_THAT(complaint(claiming(0, 4)), HasSubstr("the number of metadata entries is 4, but only 40 bytes follow"));
}

// A download that broke off, and damage anywhere before the tensors' bytes.
TEST(Gguf, SurvivesTruncationAndDamage) {
  Written written;
  written.metadata = {
      string("general.architecture") + bytes_of(GgufValueType::string) + string("llama"),
      entry("llama.block_count", GgufValueType::uint32, std::uint32_t{2}),
      array("tokens", GgufValueType::string, 2, string("a") + string("bc")),
      array("scores", GgufValueType::float32, 2, std::string(8, 'x')),
  };
  written.tensors = {description("a", {32, 2}, kQ4_0, 0), description("b", {3}, kF32, 64)};
  written.data = std::string(76, 'x');
  const std::string whole = written.bytes();
  ASSERT_EQ(complaint(whole), "");
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_NE(complaint(whole.substr(0, size)), "") << size;

  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string file = whole;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int change = 0; change < changes; ++change) {
      const std::size_t at = random() % file.size();
      switch (random() % 6) {
        case 0:
          file.erase(at, 1 + random() % 4);
          break;
        case 1:
          file.insert(at, 1, static_cast<char>(random()));
          break;
        default:
          file[at] = static_cast<char>(random());
      }
      if (file.empty()) file.push_back('x');
    }
    GgufContents contents;
    const std::string message = message_of<Error>([&] { contents = parse(file); });
    EXPECT_EQ(message.find("more than one line"), std::string::npos) << message;
    if (!message.empty()) continue;
    ++accepted;
    const auto* begin = reinterpret_cast<const std::byte*>(file.data());
    for (const auto& [name, tensor] : contents.tensors) {
      ASSERT_GE(tensor.data.data(), begin);
      ASSERT_LE(tensor.data.data() + tensor.data.size(), begin + file.size());
    }
  }
  EXPECT_GT(accepted, 100) << "changes to names, values and data are harmless";
}

TEST(Gguf, GivesTensorsOfKnownTypeAndExpectedShape) {
  const TemporaryFolder folder;
  Written written;
  written.tensors = {description("a", {2, 1}, kF16, 0), description("i", {1}, kI32, 32)};
  written.data = "abcd" + std::string(32, 'i');
  write_file(folder / "model.gguf", written.bytes());
  const std::string path = (folder / "model.gguf").string();
  const GgufFile file(path);
  EXPECT_EQ(text_of(file.get("a", {1, 2})), "abcd");
  EXPECT_EQ(file.contents().tensors.size(), 2u);
  EXPECT_EQ(message_of<Error>([&] {
              file.get("a", {2, 1});
            }),
            fmt::format("{}: tensor a has shape [1, 2]; expected [2, 1] from its metadata", path));
  EXPECT_EQ(message_of<Error>([&] {
              file.get("b", {2, 1});
            }),
            fmt::format("{}: tensor b is missing; expected shape [2, 1]", path));
  EXPECT_EQ(
      message_of<Error>([&] { file.get("i", {1}); }),
      fmt::format("{}: tensor i is stored as I32; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to "
                  "Q6_K and MXFP4",
                  path));
  EXPECT_EQ(message_of<Error>([&] { GgufFile{folder.path()}; }),
            fmt::format("{}: is not a file", folder.path().string()));
  EXPECT_THAT(message_of<Error>([&] { GgufFile{folder / "none.gguf"}; }),
              HasSubstr("none.gguf: cannot be read: No such"));
}

}  // namespace
}  // namespace kvreplay::tracer
