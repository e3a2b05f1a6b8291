// What safetensors files may say, and every way in which they may lie.
#include "tracer/safetensors.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/error.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::safetensors_bytes;
using test::TemporaryFolder;
using test::write_file;

std::map<std::string, TensorEntry> parse(const std::string& file) {
  return parse_safetensors({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "f");
}

std::string complaint(const std::string& header, std::size_t data_bytes) {
  const std::string file = safetensors_bytes(header, std::string(data_bytes, '\0'));
  return message_of<Error>([&] { parse(file); });
}

TEST(Safetensors, ReadsNamesShapesAndBytes) {
  const std::string file =
      safetensors_bytes(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},)"
                        R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"none":{"dtype":"F16","shape":[0,3],)"
                        R"("data_offsets":[4,4]},"one":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}   )",
                        "abcdefghijklm");
  const auto tensors = parse(file);
  ASSERT_EQ(tensors.size(), 4u);
  EXPECT_EQ(tensors.at("a").dtype, "BF16");
  EXPECT_EQ(tensors.at("a").shape, std::vector<Index>{2});
  EXPECT_EQ(std::memcmp(tensors.at("b").data.data(), "efghijkl", 8), 0);
  EXPECT_EQ(tensors.at("none").data.size(), 0u);
  EXPECT_EQ(tensors.at("one").data.size(), 1u);
}

TEST(Safetensors, NamesEveryLieOfAHeader) {
  const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return fmt::format(R"({{"w":{{"dtype":"{}","shape":{},"data_offsets":{}}}}})", dtype, shape, offsets);
  };
  const struct {
    std::string header;
    std::size_t data;
    std::string reason;
  } lies[] = {
      {"", 0, "not valid JSON"},
      {"{", 0, "not valid JSON"},
      {"[]", 0, "not a JSON object"},
      {"{\"w\":1}", 0, "needs a dtype, a shape and two data_offsets"},
      {R"({"w":{"dtype":"F32","shape":[1]}})", 4, "needs a dtype, a shape and two data_offsets"},
      {entry("F32", "[1]", "[0]"), 4, "needs a dtype, a shape and two data_offsets"},
      {entry("F32", "[-1]", "[0,4]"), 4, "something that is not a size"},
      {entry("F32", "[1.5]", "[0,4]"), 4, "something that is not a size"},
      {entry("F32", "[18446744073709551615]", "[0,4]"), 4, "something that is not a size"},
      {entry("F32", "[4294967296,4294967296]", "[0,4]"), 4, "its shape overflows"},
      {entry("F32", "[4611686018427387904]", "[0,0]"), 0, "its shape overflows"},
      {entry("F32", "[1]", "[0,-4]"), 4, "not offsets"},
      {entry("F32", "[1]", "[0,\"4\"]"), 4, "not offsets"},
      {entry("F32", "[1]", "[0,8]"), 4, "lie outside the file's 4 bytes"},
      {entry("F32", "[1]", "[4,0]"), 4, "lie outside"},
      {entry("F32", "[1]", "[0,9223372036854775807]"), 4, "lie outside"},
      {entry("F32", "[1]", "[2,6]"), 6, "begin at 2, which is not aligned to its F32 of 4 bytes"},
      {entry("F32", "[2]", "[0,4]"), 4, "F32 of shape [2] takes 8 bytes, but 4 are given"},
      {entry("BF16", "[2,3]", "[0,24]"), 24, "BF16 of shape [2, 3] takes 12 bytes, but 24 are given"},
      {entry("F32", "[1]", "[0,4]"), 8, "bytes [4, 8) of the data belong to no tensor"},
      {entry("F32", "[1]", "[4,8]"), 8, "bytes [0, 4) of the data belong to no tensor"},
      {R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "names \"w\" twice"},
      {R"({"w":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}})", 4, "names \"dtype\" twice"},
      {R"({"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       12, "tensors \"v\" and \"w\" overlap"},
  };
  for (const auto& lie : lies) {
    const std::string message = complaint(lie.header, lie.data);
    EXPECT_NE(message.find(lie.reason), std::string::npos) << lie.header << ": \"" << message << '"';
    EXPECT_EQ(message.find("f: "), 0u) << message;
  }
}

TEST(Safetensors, NamesLiesAboutTheHeadersLength) {
  for (const std::string& file : {std::string(), std::string("1234567")}) {
    EXPECT_NE(message_of<Error>([&] { parse(file); }).find("too short"), std::string::npos);
  }
  for (const std::uint64_t length : {std::uint64_t{3}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    std::string file(10, ' ');
    std::memcpy(file.data(), &length, 8);
    const std::string message = message_of<Error>([&] { parse(file); });
    EXPECT_NE(message.find(fmt::format("claims {} bytes, but only 2 follow", length)), std::string::npos) << message;
  }
}

TEST(Safetensors, SurvivesDamagedHeaders) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}})";
  const std::string whole = safetensors_bytes(header, std::string(20, 'x'));
  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string file = whole;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int change = 0; change < changes; ++change) {
      const std::size_t at = random() % file.size();
      const char* alphabet = "0123456789{}[],:\"abFT168-. \\";
      const char byte = random() % 2 == 0 ? static_cast<char>(random()) : alphabet[random() % std::strlen(alphabet)];
      switch (random() % 4) {
        case 0:
          file.erase(at, 1 + random() % 4);
          break;
        case 1:
          file.insert(at, 1, byte);
          break;
        default:
          file[at] = byte;
      }
      if (file.empty()) file.push_back('x');
    }
    std::map<std::string, TensorEntry> tensors;
    const std::string message = message_of<Error>([&] { tensors = parse(file); });
    EXPECT_EQ(message.find("more than one line"), std::string::npos) << message;
    if (!message.empty()) continue;
    ++accepted;
    const auto* begin = reinterpret_cast<const std::byte*>(file.data());
    for (const auto& [name, entry] : tensors) {
      ASSERT_GE(entry.data.data(), begin);
      ASSERT_LE(entry.data.data() + entry.data.size(), begin + file.size());
    }
  }
  EXPECT_GT(accepted, 100) << "changes to names and data are harmless";
}

TEST(Safetensors, GivesTensorsOfKnownTypeAndExpectedShape) {
  const TemporaryFolder folder;
  write_file(folder / "model.safetensors",
             safetensors_bytes(R"({"a":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},)"
                               R"("q":{"dtype":"F4_NEW","shape":[3],"data_offsets":[4,6]},)"
                               R"("i":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},)"
                               R"("p":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}})",
                               std::string(16, '\1')));
  const SafeTensors tensors(folder.path());
  EXPECT_TRUE(tensors.contains("a"));
  EXPECT_FALSE(tensors.contains("b"));
  EXPECT_EQ(tensors.get("a", {1, 2}).type, DType::float16);
  EXPECT_EQ(message_of<Error>([&] {
              tensors.get("a", {2, 1});
            }),
            fmt::format("{}: tensor a has shape [1, 2]; expected [2, 1] from config.json",
                        (folder / "model.safetensors").string()));
  EXPECT_EQ(message_of<Error>([&] {
              tensors.get("b", {2, 1});
            }),
            fmt::format("{}: tensor b is missing; expected shape [2, 1]", folder.path().string()));
  for (const auto& [name, dtype, size] : {std::tuple{"q", "F4_NEW", 3}, {"i", "I64", 1}}) {
    EXPECT_EQ(message_of<Error>([&, n = name, s = size] { tensors.get(n, {s}); }),
              fmt::format("{}: tensor {} is stored as \"{}\"; supported are F32, F16 and BF16",
                          (folder / "model.safetensors").string(), name, dtype));
  }
}

TEST(Safetensors, FindsShardsWithAndWithoutIndex) {
  const TemporaryFolder folder;
  const auto shard = [](const std::string& name, char byte) {
    return safetensors_bytes(fmt::format(R"({{"{}":{{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}}})", name),
                             std::string(2, byte));
  };
  EXPECT_NE(message_of<Error>([&] { SafeTensors{folder.path()}; }).find("holds no weights"), std::string::npos);
  write_file(folder / "one.safetensors", shard("a", 'a'));
  write_file(folder / "two.safetensors", shard("b", 'b'));
  EXPECT_EQ(*reinterpret_cast<const char*>(SafeTensors(folder.path()).get("b", {1}).data), 'b');
  write_file(folder / "three.safetensors", shard("b", 'c'));
  EXPECT_NE(message_of<Error>([&] { SafeTensors{folder.path()}; }).find("tensor \"b\" is in three.safetensors as well"),
            std::string::npos);

  const auto index = folder / "model.safetensors.index.json";
  write_file(index, R"({"weight_map":{"a":"one.safetensors","b":"three.safetensors"}})");
  EXPECT_EQ(*reinterpret_cast<const char*>(SafeTensors(folder.path()).get("b", {1}).data), 'c');

  const std::pair<const char*, const char*> bad[] = {
      {R"({"weight_map":{"a":"four.safetensors"}})", "four.safetensors: the shard is missing"},
      {R"({"weight_map":{"z":"one.safetensors"}})", "one.safetensors: lacks tensor \"z\""},
      {R"({"weight_map":{"a":"../one.safetensors"}})", "\"../one.safetensors\" is not a file name"},
      {R"({"weight_map":{"a":7}})", "tensor \"a\" has no file name"},
      {R"({"weight_map":[]})", "is not valid JSON with a weight_map"},
      {"{", "is not valid JSON with a weight_map"},
  };
  for (const auto& [content, reason] : bad) {
    write_file(index, content);
    const std::string message = message_of<Error>([&] { SafeTensors{folder.path()}; });
    EXPECT_NE(message.find(reason), std::string::npos) << content << ": " << message;
  }
}

TEST(Safetensors, RefusesWhatIsNoFile) {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder / "model.safetensors");
  EXPECT_NE(message_of<Error>([&] { SafeTensors{folder.path()}; }).find("is not a file"), std::string::npos);
}

}  // namespace
}  // namespace kvreplay::tracer
