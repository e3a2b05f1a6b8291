// Text to tokens, on the demo model's tokenizer.
#include "tracer/tokenizer/tokenizer.h"
#include "support/places.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::write_file;

const std::filesystem::path kModel = test::bundled_traces() / "demo-model";
const std::filesystem::path kData = test::test_data();

Tokenizer demo_tokenizer() { return Tokenizer(kModel, 1); }

std::string joined_pieces(const Tokenizer& tokenizer, const Encoding& encoding) {
  std::string text;
  for (std::size_t i = 1; i < encoding.ids.size(); ++i) text += tokenizer.piece(encoding.ids[i]);
  return text;
}

TEST(Tokenizer, GivesTheReferencesIds) {
  std::vector<std::int32_t> expected;
  std::istringstream ids(read_file(kData / "reference-prompt.ids"));
  for (std::int32_t id = 0; ids >> id;) expected.push_back(id);
  ASSERT_EQ(expected.size(), 569u);
  EXPECT_EQ(demo_tokenizer().encode(read_file(kData / "reference-prompt.txt")).ids, expected);
}

TEST(Tokenizer, TellsWhichBytesATokenStandsFor) {
  const Tokenizer tokenizer = demo_tokenizer();
  const std::string text = read_file(kData / "reference-prompt.txt");
  const Encoding encoding = tokenizer.encode(text);
  ASSERT_EQ(encoding.ids.size(), encoding.bytes.size());
  std::size_t reached = 0;
  for (std::size_t i = 1; i < encoding.ids.size(); ++i) {
    const auto [begin, end] = encoding.bytes[i];
    ASSERT_EQ(begin, reached);
    if (i > 1) {
      ASSERT_EQ(text.substr(begin, end - begin), tokenizer.piece(encoding.ids[i]));
    }
    reached = end;
  }
  EXPECT_EQ(reached, text.size());
}

TEST(Tokenizer, DecodesWhatItEncoded) {
  const Tokenizer tokenizer = demo_tokenizer();
  for (const std::string text :
       {"The secret number of falcon is 48213.", "a\n\n  b\tc", "naïve 日本語 🦅", "<s> </s>"}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text).ids), text);
  }
}

TEST(Tokenizer, NamesPiecesInValidText) {
  const Tokenizer tokenizer = demo_tokenizer();
  EXPECT_EQ(tokenizer.piece(1), "<s>");
  EXPECT_EQ(tokenizer.piece(-1), "<-1>");
  EXPECT_EQ(tokenizer.piece(1 << 20), "<1048576>");
  const Encoding letters = tokenizer.encode("a日b");
  const std::string text = joined_pieces(tokenizer, letters);
  EXPECT_NE(text.find("<0xE6><0x97><0xA5>"), std::string::npos) << text;
  EXPECT_EQ(joined_pieces(tokenizer, tokenizer.encode("a\nb")), " a\nb");
}

TEST(Tokenizer, PutsTheBosWhereTheConfigurationSaysSo) {
  const TemporaryFolder folder;
  std::filesystem::copy(kModel / "tokenizer.model", folder / "tokenizer.model");
  const auto begins_with_bos = [&] { return Tokenizer(folder.path(), 1).encode("a").ids.front() == 1; };
  EXPECT_TRUE(begins_with_bos());
  write_file(folder / "tokenizer_config.json", R"({"add_bos_token": false})");
  EXPECT_FALSE(begins_with_bos());
  write_file(folder / "tokenizer_config.json", R"({"add_bos_token": true})");
  EXPECT_TRUE(begins_with_bos());
  write_file(folder / "tokenizer_config.json", R"({"add_bos_token": "no"})");
  EXPECT_NE(message_of<Error>(begins_with_bos).find("add_bos_token must be true or false"), std::string::npos);
}

TEST(Tokenizer, SaysWhatToDoWithoutOne) {
  const TemporaryFolder folder;
  const auto load = [&] { Tokenizer(folder.path(), 1); };
  EXPECT_NE(message_of<Error>(load).find("holds neither tokenizer.json nor tokenizer.model (SentencePiece); give the "
                                         "prompt's token ids with --tokens"),
            std::string::npos);
  write_file(folder / "tokenizer.model", "IQ== 0\nIg== 1\n");
  EXPECT_NE(message_of<Error>(load).find("is not a SentencePiece model"), std::string::npos);
}

}  // namespace
}  // namespace kvreplay::tracer
