// After which tokens a model has written all that it was to write, by what its folder says and by what a user adds.
#include "tracer/stop_tokens.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "support/places.h"
#include "support/temporary_folder.h"
#include "tracer/tokenizer/tokenizer.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::message_of;
using test::TemporaryFolder;
using test::write_file;
using Ids = std::vector<std::int32_t>;

// A folder with one of the tokenizers that the tests have, and what else is written there.
class StopTokens : public testing::Test {
 protected:
  void take_tokenizer(const std::string& name) {
    const auto from = test::project_folder() / "tests/tracer/tokenizer" / name;
    std::filesystem::copy(from / "tokenizer.json", folder_ / "tokenizer.json");
    tokenizer_ = std::make_unique<Tokenizer>(folder_.path(), std::nullopt);
  }

  void write(const std::string& file, const json& content) { write_file(folder_ / file, content.dump()); }

  Ids ids(const StopOptions& options = {}) const {
    ModelConfig config;
    config.vocab_size = 1300;
    config.eos_token_ids = of_config_;
    return stop_ids(options, folder_.path(), config, tokenizer_.get());
  }

  TemporaryFolder folder_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Ids of_config_;
};

TEST_F(StopTokens, AreThoseOfTheConfigurationsAndTheTokenizersEnd) {
  EXPECT_TRUE(ids().empty());
  of_config_ = {900, 7};
  EXPECT_EQ(ids(), (Ids{7, 900})) << "without a tokenizer";
  take_tokenizer("qwen2");
  EXPECT_EQ(ids(), (Ids{7, 900}));
  write("tokenizer_config.json", {{"eos_token", "<|im_end|>"}});
  EXPECT_EQ(ids(), (Ids{7, 900, 902}));
  write("tokenizer_config.json", {{"eos_token", {{"content", "<|endoftext|>"}, {"lstrip", false}}}});
  EXPECT_EQ(ids(), (Ids{7, 900})) << "named twice";
  write("tokenizer_config.json", {{"eos_token", nullptr}});
  write("special_tokens_map.json", {{"eos_token", {{"content", "<|im_end|>"}}}});
  EXPECT_EQ(ids(), (Ids{7, 900, 902})) << "where older tokenizers have it";
  write("tokenizer_config.json", {{"eos_token", "<|endoftext|>"}});
  EXPECT_EQ(ids(), (Ids{7, 900}));
  write("tokenizer_config.json", {{"eos_token", "</s>"}});
  EXPECT_EQ(ids(), (Ids{7, 900})) << "the tokenizer has none of that name";
}

TEST_F(StopTokens, AreWhatTheChatTemplateEndsTurnsWith) {
  const struct {
    const char* tokenizer;
    const char* chat_template;
    Ids expected;
  } cases[] = {
      {"qwen2", "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}", {902}},
      {"llama3", "{{'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + content + '<|eot_id|>'}}", {1107}},
      {"gemma", "{{ '<start_of_turn>' + role + '\\n' + content | trim + '<end_of_turn>\\n' }}", {5}},
      {"gemma", "{{ message['content'] + '<|im_end|>' }}", {}},
      {"qwen2", "{{ message['content'] + eos_token }}", {}}};
  for (const auto& each : cases) {
    std::filesystem::remove(folder_ / "tokenizer.json");
    take_tokenizer(each.tokenizer);
    write("tokenizer_config.json", {{"chat_template", each.chat_template}});
    EXPECT_EQ(ids(), each.expected) << each.chat_template;
    write("tokenizer_config.json", {{"chat_template",
                                     {{{"name", "tool_use"}, {"template", "{{ tools }}"}},
                                      {{"name", "default"}, {"template", each.chat_template}}}}});
    EXPECT_EQ(ids(), each.expected) << "several templates";
    std::filesystem::remove(folder_ / "tokenizer_config.json");
    EXPECT_EQ(ids(), Ids{});
    write_file(folder_ / "chat_template.jinja", each.chat_template);
    EXPECT_EQ(ids(), each.expected) << "a file of its own";
    std::filesystem::remove(folder_ / "chat_template.jinja");
  }
}

// Channels of one answer end in <|end|> there, and the answer in <|return|>.
TEST_F(StopTokens, DoNotDivideAnAnswerThatHasChannels) {
  json tokenizer = json::parse(test::read_file(test::project_folder() / "tests/tracer/tokenizer/qwen2/tokenizer.json"));
  for (json& token : tokenizer["added_tokens"]) {
    if (token["content"] == "<|im_start|>") token["content"] = "<|return|>";
    if (token["content"] == "<|im_end|>") token["content"] = "<|end|>";
  }
  write("tokenizer.json", tokenizer);
  tokenizer_ = std::make_unique<Tokenizer>(folder_.path(), std::nullopt);
  write_file(folder_ / "chat_template.jinja", "{{ analysis + '<|end|>' + content + '<|return|>' }}");
  EXPECT_EQ(ids(), Ids{901});
  write_file(folder_ / "chat_template.jinja", "{{ '<|user|>' + content + '<|end|>' }}");
  EXPECT_EQ(ids(), Ids{902});
}

TEST_F(StopTokens, MayBeNamedByIdOrText) {
  of_config_ = {3};
  take_tokenizer("qwen2");
  EXPECT_EQ(ids({.others = {"<tool_call>", "12"}}), (Ids{3, 12, 903}));
  EXPECT_EQ(ids({.by_model = false, .others = {"<tool_call>"}}), Ids{903});
  EXPECT_TRUE(ids({.by_model = false}).empty());
  const Encoding line = tokenizer_->encode("\n", false);
  ASSERT_EQ(line.ids.size(), 1u);
  EXPECT_EQ(ids({.by_model = false, .others = {"\n"}}), line.ids);
}

TEST_F(StopTokens, NamedByTextAreAllTokensOfThatText) {
  std::filesystem::copy(test::project_folder() / "tests/tracer/tokenizer/sentencepiece/tokenizer.model",
                        folder_ / "tokenizer.model");
  tokenizer_ = std::make_unique<Tokenizer>(folder_.path(), std::nullopt);
  EXPECT_EQ(ids({.others = {"</s>"}}), Ids{2}) << "in a text it would be ordinary";
  const Ids word = ids({.others = {" the"}});
  ASSERT_EQ(word.size(), 1u);
  EXPECT_EQ(tokenizer_->piece(word.front()), " the");
  EXPECT_NE(word, tokenizer_->encode("the.", false).ids) << "not what a text that begins with it begins with";
}

TEST_F(StopTokens, ExplainWhatTheyCannotBe) {
  const auto refused = [this](const std::string& stop) { return message_of<Error>([&] { ids({.others = {stop}}); }); };
  EXPECT_NE(refused("END").find("--stop END: the model's folder has no tokenizer"), std::string::npos)
      << refused("END");
  take_tokenizer("qwen2");
  EXPECT_NE(refused("1300").find("--stop 1300: is not in the model's vocabulary of 1300"), std::string::npos)
      << refused("1300");
  EXPECT_NE(refused("99999999999").find("--stop 99999999999: is not in the model's vocabulary"), std::string::npos);
  const std::string several = refused("zq\n<|im_end|>");
  EXPECT_NE(several.find("--stop zq\\n<|im_end|>: is no single token of the model, but "), std::string::npos)
      << several;
  EXPECT_NE(several.find("\"<|im_end|>\""), std::string::npos) << several;
  EXPECT_NE(refused("").find("--stop: an empty text"), std::string::npos) << refused("");
}

TEST_F(StopTokens, RefuseFilesThatAreNotWhatTheyShouldBe) {
  take_tokenizer("qwen2");
  const auto refused = [this]() { return message_of<Error>([this] { ids(); }); };
  write_file(folder_ / "tokenizer_config.json", "[");
  EXPECT_NE(refused().find("tokenizer_config.json: is not a valid JSON object"), std::string::npos) << refused();
  write("tokenizer_config.json", {{"eos_token", 3}});
  EXPECT_NE(refused().find("tokenizer_config.json: eos_token must be a text"), std::string::npos) << refused();
  write("tokenizer_config.json", {{"chat_template", 3}});
  EXPECT_NE(refused().find("tokenizer_config.json: chat_template must be a text"), std::string::npos) << refused();
}

}  // namespace
}  // namespace kvreplay::tracer
