// Text to tokens and spans, on the demo model's tokenizer.
#include "tracer/tokenizer.h"
#include "support/places.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "support/temporary_folder.h"
#include "tracer/spans.h"

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

std::vector<Span> locate(const std::string& prompt, const SpanRequest& request) {
  const Encoding encoding = demo_tokenizer().encode(prompt);
  return locate_spans({&request, 1}, prompt, &encoding, static_cast<int>(encoding.ids.size()));
}

TEST(Spans, CoverTheTokensOfATextAndNoMore) {
  const Tokenizer tokenizer = demo_tokenizer();
  const std::string prompt = read_file(kData / "reference-prompt.txt");
  const Encoding encoding = tokenizer.encode(prompt);
  const auto spans = locate(prompt, {"needle", "The secret number of falcon is 48213.", 0, 0});
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].label, "needle");
  std::string text;
  for (int i = spans[0].start; i < spans[0].end; ++i)
    text += tokenizer.piece(encoding.ids[static_cast<std::size_t>(i)]);
  EXPECT_EQ(text.substr(text.find_first_not_of(" \n")), "The secret number of falcon is 48213.");
}

TEST(Spans, FindEveryOccurrence) {
  const std::string prompt = "one falcon, two falcon, three.";
  const auto spans = locate(prompt, {"bird", "falcon", 0, 0});
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0].end - spans[0].start, spans[1].end - spans[1].start);
  EXPECT_GT(spans[1].start, spans[0].end);
}

TEST(Spans, CoverCharactersThatAreSpelledInBytes) {
  const auto spans = locate("x 日本 y", {"two", "日本", 0, 0});
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].end - spans[0].start, 6);
  const auto at_start = locate("日本 y", {"one", "日", 0, 0});
  ASSERT_EQ(at_start.size(), 1u);
  EXPECT_EQ(at_start[0].end - at_start[0].start, 3) << "BOS and the leading space stand for no text";
  EXPECT_EQ(locate("日本 y", {"one", "本", 0, 0}).at(0).start, at_start[0].end);
}

TEST(Spans, RefuseWhatIsNotInThePrompt) {
  EXPECT_EQ(message_of<Error>([] {
              locate("a b", {"n", "zebra", 0, 0});
            }),
            "span \"n\": its text does not occur in the prompt");
  for (const auto& [start, end] : {std::pair{-1, 2}, {2, 2}, {3, 2}, {0, 100}}) {
    EXPECT_NE(message_of<Error>([s = start, e = end] {
                locate("a b", {"n", "", s, e});
              }).find("is not a range"),
              std::string::npos);
  }
  const SpanRequest text{"n", "a", 0, 0};
  EXPECT_NE(message_of<Error>([&] {
              locate_spans({&text, 1}, "", nullptr, 4);
            }).find("text prompt"),
            std::string::npos);
  const SpanRequest positions{"n", "", 1, 3};
  const auto spans = locate_spans({&positions, 1}, "", nullptr, 4);
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].start, 1);
  EXPECT_EQ(spans[0].end, 3);
}

TEST(Spans, ReadTheirFile) {
  const TemporaryFolder folder;
  write_file(folder / "s.json", R"([{"label": "a", "text": "t"}, {"label": "b", "start": 1, "end": 2}])");
  const auto requests = read_spans(folder / "s.json");
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[0].text, "t");
  EXPECT_EQ(requests[1].end, 2);

  const std::pair<const char*, const char*> bad[] = {
      {"{}", "is not a JSON list"},
      {"[", "is not a JSON list"},
      {"[1]", "entry 1: needs a \"label\""},
      {R"([{"text": "t"}])", "entry 1: needs a \"label\""},
      {R"([{"label": "a"}])", "needs either a \"text\""},
      {R"([{"label": "a", "text": "t", "start": 1, "end": 2}])", "needs either a \"text\""},
      {R"([{"label": "a", "text": ""}])", "that is not empty"},
      {R"([{"label": "a", "start": 1}])", "must be token positions"},
      {R"([{"label": "a", "start": -1, "end": 2}])", "must be token positions"},
      {R"([{"label": "a", "start": 1, "end": 1e300}])", "must be token positions"},
  };
  for (const auto& [content, reason] : bad) {
    write_file(folder / "s.json", content);
    const std::string message = message_of<Error>([&] { read_spans(folder / "s.json"); });
    EXPECT_NE(message.find(reason), std::string::npos) << content << ": " << message;
  }
  EXPECT_NE(message_of<Error>([&] { read_spans(folder / "none"); }).find("cannot be read"), std::string::npos);
}

}  // namespace
}  // namespace kvreplay::tracer
