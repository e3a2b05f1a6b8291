// Tokenizers of every kind against what Hugging Face's tokenizers, or SentencePiece, make of the same strings
// (make_fixtures.py).
#include "tracer/tokenizer/tokenizer_json.h"
#include "support/places.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"
#include "base/printable.h"
#include "support/temporary_folder.h"
#include "tracer/tokenizer/aligned_text.h"
#include "tracer/tokenizer/text_pattern.h"
#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::write_file;
using testing::HasSubstr;

const std::filesystem::path kFixtures = test::project_folder() / "tests" / "tracer" / "tokenizer";

std::vector<std::string> strings() {
  return json::parse(read_file(kFixtures / "strings.json")).get<std::vector<std::string>>();
}

class EveryKind : public testing::TestWithParam<const char*> {
 protected:
  Tokenizer tokenizer_{kFixtures / GetParam(), std::nullopt};
  std::vector<std::string> strings_ = strings();
  json cases_ = json::parse(read_file(kFixtures / GetParam() / "cases.json"));
};

TEST_P(EveryKind, GivesTheReferencesIds) {
  ASSERT_GE(strings_.size(), 2000u);
  ASSERT_EQ(cases_["ids"].size(), strings_.size());
  int different = 0;
  for (std::size_t i = 0; i < strings_.size(); ++i) {
    const auto expected = cases_["ids"][i].get<std::vector<std::int32_t>>();
    const auto ids = tokenizer_.encode(strings_[i]).ids;
    if (ids == expected) continue;
    ++different;
    EXPECT_EQ(ids, expected) << i << ": " << printable(strings_[i]);
    if (different == 10) FAIL() << "and perhaps more";
  }
}

TEST_P(EveryKind, DecodesAsTheReference) {
  int different = 0;
  for (std::size_t i = 0; i < strings_.size(); ++i) {
    const auto ids = cases_["ids"][i].get<std::vector<std::int32_t>>();
    const std::string expected = cases_["decoded"].value(std::to_string(i), strings_[i]);
    if (tokenizer_.decode(ids) == expected) continue;
    ++different;
    EXPECT_EQ(printable(tokenizer_.decode(ids)), printable(expected)) << i << ": " << printable(strings_[i]);
    if (different == 10) FAIL() << "and perhaps more";
  }
}

TEST_P(EveryKind, TellsWhichBytesATokenStandsFor) {
  const bool drops_text = std::string_view(GetParam()) == "digits";
  for (const std::string& text : strings_) {
    const Encoding encoding = tokenizer_.encode(text);
    ASSERT_EQ(encoding.bytes.size(), encoding.ids.size());
    std::size_t reached = 0;
    for (const auto& [begin, end] : encoding.bytes) {
      ASSERT_LE(begin, end) << printable(text);
      ASSERT_LE(end, text.size()) << printable(text);
      if (!drops_text) {
        ASSERT_LE(begin, reached) << printable(text);
      }
      reached = std::max(reached, end);
    }
    if (!drops_text) {
      ASSERT_EQ(reached, text.size()) << printable(text);
    }
  }
}

TEST_P(EveryKind, NamesPiecesInValidText) {
  for (std::int32_t id = -1; id < 1300; ++id) {
    const std::string piece = tokenizer_.piece(id);
    ASSERT_EQ(find_invalid_utf8(piece), std::nullopt) << id;
    ASSERT_EQ(piece.find('\0'), std::string::npos) << id;
    ASSERT_FALSE(piece.empty()) << id;
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, EveryKind,
                         testing::Values("llama3", "qwen2", "gpt2", "digits", "llama2", "metaspace",
                                         "metaspace-unknown", "gemma", "sentencepiece"));

// Text of any characters but those in `but`.
std::string random_text(std::mt19937& generator, std::u32string_view but) {
  std::string text;
  for (int length = static_cast<int>(generator() % 40); length > 0; --length) {
    constexpr std::array<std::uint_fast32_t, 4> kWidest = {0x80, 0x800, 0x10000, 0x110000};
    const auto code_point = static_cast<char32_t>(generator() % kWidest[generator() % kWidest.size()]);
    if ((code_point >= 0xd800 && code_point < 0xe000) || but.find(code_point) != but.npos) continue;
    text += utf8(code_point);
  }
  return text;
}

TEST(TokenizerJson, DecodesToTheTextItself) {
  std::mt19937 generator(9);
  for (const char* kind : {"llama3", "gemma"}) {
    const Tokenizer tokenizer(kFixtures / kind, std::nullopt);
    for (int i = 0; i < 2000; ++i) {
      const std::string text = random_text(generator, U"\u2581");  // what SentencePiece writes for a space
      ASSERT_EQ(tokenizer.decode(tokenizer.encode(text).ids), text) << kind << ": " << printable(text);
    }
  }
}

TEST(TokenizerJson, DecodesToTheComposedText) {
  const Tokenizer tokenizer(kFixtures / "qwen2", std::nullopt);
  const std::string decomposed = "Cafe\u0301 \u1112\u1161\u11ab x\u0301";
  const Encoding encoding = tokenizer.encode(decomposed);
  EXPECT_EQ(tokenizer.decode(encoding.ids), "Caf\u00e9 \ud55c x\u0301");
  EXPECT_EQ(encoding.ids, tokenizer.encode("Caf\u00e9 \ud55c x\u0301").ids);
  // The tokens of the accented letter stand for both of its characters.
  for (const auto& [begin, end] : encoding.bytes) {
    EXPECT_FALSE(begin == 4 || end == 4) << "between a letter and its accent";
  }
}

TEST(TokenizerJson, AddsSpecialTokensOrNot) {
  const Tokenizer tokenizer(kFixtures / "digits", std::nullopt);
  const auto bare = tokenizer.encode("one", false).ids;
  auto expected = bare;
  expected.insert(expected.begin(), 0);
  expected.push_back(1);
  EXPECT_EQ(tokenizer.encode("one").ids, expected);
  EXPECT_EQ(tokenizer.encode("<s>one</s>", false).ids, expected) << "as a chat template writes them";
}

TEST(TokenizerJson, NamesBytesAndSpecialTokens) {
  const Tokenizer tokenizer(kFixtures / "llama3", std::nullopt);
  const auto pieces = [&](const std::string& text) {
    std::string joined;
    for (const std::int32_t id : tokenizer.encode(text).ids) joined += tokenizer.piece(id);
    return joined;
  };
  EXPECT_EQ(pieces("a falcon\n"), "<|begin_of_text|>a falcon\n");
  EXPECT_EQ(pieces("<|eot_id|>"), "<|begin_of_text|><|eot_id|>");
  EXPECT_EQ(pieces("\U0001F985"), "<|begin_of_text|><0xF0><0x9F><0xA6><0x85>");
  EXPECT_EQ(pieces(std::string(1, '\0')), "<|begin_of_text|><0x00>");
}

TEST(TokenizerJson, RepairsWhatIsNoText) {
  const Tokenizer tokenizer(kFixtures / "llama3", std::nullopt);
  const auto ids = tokenizer.encode("\U00012345x", false).ids;
  ASSERT_EQ(ids.size(), 5u);
  EXPECT_EQ(tokenizer.decode(std::vector{ids[0], ids[1], ids[2], ids[4]}), "\ufffdx") << "one for a cut character";
  EXPECT_EQ(tokenizer.decode(std::vector{ids[1], ids[4], ids[3]}), "\ufffdx\ufffd");
  EXPECT_EQ(tokenizer.decode(std::vector{-5, ids[4], 1 << 20}), "x") << "unknown ids are left out";
}

TEST(TokenizerJson, TakesTheFileThatTransformersTakes) {
  const TemporaryFolder folder;
  std::filesystem::copy(kFixtures / "sentencepiece" / "tokenizer.model", folder / "tokenizer.model");
  EXPECT_EQ(Tokenizer(folder.path(), std::nullopt).file_name(), "tokenizer.model");
  std::filesystem::copy(kFixtures / "gemma" / "tokenizer.json", folder / "tokenizer.json");
  const Tokenizer both(folder.path(), std::nullopt);
  EXPECT_EQ(both.file_name(), "tokenizer.json");
  EXPECT_EQ(both.encode("a").ids.front(), 2) << "BOS as tokenizer.json has it";
}

TEST(TokenizerJson, RefusesTextThatIsNotUtf8) {
  const Tokenizer tokenizer(kFixtures / "llama3", std::nullopt);
  EXPECT_EQ(message_of<Error>([&] { tokenizer.encode("ab\xff"); }), "byte 2 of the text is not UTF-8");
}

// The file of a small tokenizer with one field, named by a JSON pointer, set to something else.
std::string changed(const char* field, const json& value) {
  json file = json::parse(R"({"version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": false},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                       "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
    "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
              "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
              "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}})");
  if (*field != '\0') file[json::json_pointer(field)] = value;
  return file.dump();
}

TEST(TokenizerJson, RefusesWhatItDoesNotKnow) {
  EXPECT_EQ(parse_tokenizer_json(changed("", nullptr))->encode("b", true).ids, (std::vector<std::int32_t>{3, 1}));
  const json expression = {{"Regex", "\\w+"}};
  const struct {
    const char* field;
    json value;
    const char* reason;
  } cases[] = {
      {"/version", "2.0", "version \"2.0\" is not supported"},
      {"/extra", 1, "the field \"extra\" is not supported"},
      {"/model/type", "Unigram", "model: type \"Unigram\" is not supported; supported: BPE"},
      {"/model/type", "WordPiece", "model: type \"WordPiece\" is not supported"},
      {"/model/dropout", 0.1, "dropout 0.1 is not supported"},
      {"/model/continuing_subword_prefix", "##", "continuing_subword_prefix \"##\" is not supported"},
      {"/model/vocab/b", 0, "the tokens \"a\" and \"b\" have the same id 0"},
      {"/model/vocab/b", -1, "-1 is not a token id"},
      {"/model/merges/0", "a b c", "\"a b c\" is not a pair of tokens"},
      {"/model/merges/0", {"a", "c"}, "merge 1, of \"a\" and \"c\": not all of them are in the vocabulary"},
      {"/model/surprise", true, "model: the field \"surprise\" is not supported"},
      {"/normalizer", {{"type", "NFKC"}}, "normalizer: type \"NFKC\" is not supported; supported: NFC"},
      {"/normalizer/form", 1, "normalizer: the field \"form\" is not supported"},
      {"/pre_tokenizer", {{"type", "Whitespace"}}, "pre_tokenizer: type \"Whitespace\" is not supported"},
      {"/pre_tokenizer/behavior", "Sometimes", "behavior \"Sometimes\" is not supported"},
      {"/pre_tokenizer/pattern", expression, "the regular expression \\w+: \\w is not supported"},
      {"/pre_tokenizer/pattern", {{"Regex", "a*"}}, "a match of nothing is not supported"},
      {"/pre_tokenizer/pattern", {{"String", ""}}, "a text that is not empty"},
      {"/decoder", {{"type", "WordPiece"}}, "decoder: type \"WordPiece\" is not supported"},
      {"/post_processor", {{"type", "BertProcessing"}}, "post_processor: type \"BertProcessing\" is not supported"},
      {"/post_processor/special_tokens", json::object(), "special_tokens has no \"<s>\""},
      {"/post_processor/single", json::array(), "single does not contain the text"},
      {"/added_tokens/0/id", 9, "\"<s>\" has the id 9, but Hugging Face's tokenizers give it 3"},
      {"/added_tokens/0/lstrip", "no", "lstrip must be true or false"},
      {"/added_tokens", "none", "added_tokens must be a list"},
  };
  const TemporaryFolder folder;
  for (const auto& wrong : cases) {
    write_file(folder / "tokenizer.json", changed(wrong.field, wrong.value));
    const std::string message = message_of<Error>([&] { Tokenizer(folder.path(), std::nullopt); });
    EXPECT_THAT(message, HasSubstr(wrong.reason)) << wrong.field;
    EXPECT_THAT(message, HasSubstr("tokenizer.json: "));
    EXPECT_THAT(message, HasSubstr("; give the prompt's token ids with --tokens"));
  }
  write_file(folder / "tokenizer.json", "{");
  EXPECT_THAT(message_of<Error>([&] { Tokenizer(folder.path(), std::nullopt); }),
              HasSubstr("is not a valid JSON object"));
}

TEST(TextPattern, RefusesWhatPcre2WouldReadOtherwise) {
  for (const char* expression :
       {"^a",        "a$",       "\\h",    "\\R",         "\\bx",   "(?i)a", "(?<=a)b", "(?i:ss)", "(?i:s+)",
        "(?i:[^a])", "(?i:\\s)", "[a&&b]", "[[:alpha:]]", "[a[b]]", "a{,3}", "a{1,3}+", "a**",     "\\p{Han}",
        "\\p{C}",    "\\1",      "(a",     "a)",          "[a",     "[]a]",  "[\\s-z]", "a\\"}) {
    EXPECT_THAT(message_of<Error>([&] { TextPattern::expression(expression); }), HasSubstr("the regular expression"))
        << expression;
  }
}

}  // namespace
}  // namespace kvreplay::tracer
