// Spans of a prompt's text as ranges of tokens, on the demo model's tokenizer.
#include "tracer/spans.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "support/places.h"
#include "support/temporary_folder.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::write_file;

const std::filesystem::path kData = test::test_data();

Tokenizer demo_tokenizer() { return Tokenizer(test::bundled_traces() / "demo-model", 1); }

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
