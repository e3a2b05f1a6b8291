// Tokenizers of every kind against what Hugging Face's tokenizers, or SentencePiece, make of the same strings
// (tokenizers/make_fixtures.py).
#include "tracer/tokenizer_json.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/printable.h"
#include "support/temporary_folder.h"
#include "tracer/text_pattern.h"
#include "tracer/tokenizer.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::write_file;
using testing::HasSubstr;

const std::filesystem::path kFixtures =
    std::filesystem::path(KVREPLAY_TEST_DATA).parent_path() / "tracer" / "tokenizers";

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

INSTANTIATE_TEST_SUITE_P(Tokenizers, EveryKind,
                         testing::Values("llama3", "qwen2", "gpt2", "digits", "llama2", "metaspace",
                                         "metaspace-unknown", "gemma", "sentencepiece"));

}  // namespace
}  // namespace kvreplay::tracer
