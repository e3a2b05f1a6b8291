// Configuration files, and what tells one sweep from another.
#include "sweep/configuration.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::string refusal(const std::string& text) {
  return test::message_of<UsageError>([&text]() { read_configuration(text, "sweep.toml"); });
}

TEST(Configuration, TomlIsRead) {
  const auto entries = read_configuration(R"toml(# a sweep
traces = ["a.h5", 'b "2".h5']   # two
policy = [
  "restkv(alpha={0.1:0.9:0.1})",  # a grid

  'kept(file="a,b.h5")',
]
capacity = 64
evict-at = [ 10, 20 ]
"output" = "C:\\sweep\t\"1\".h5"
kept = true
heads = []
)toml",
                                          "sweep.toml");
  ASSERT_EQ(entries.size(), 7u);
  EXPECT_EQ(entries[0].key, "traces");
  EXPECT_EQ(entries[0].line, 2);
  EXPECT_THAT(entries[0].values, ElementsAre("a.h5", "b \"2\".h5"));
  EXPECT_THAT(entries[1].values, ElementsAre("restkv(alpha={0.1:0.9:0.1})", "kept(file=\"a,b.h5\")"));
  EXPECT_THAT(entries[2].values, ElementsAre("64"));
  EXPECT_FALSE(entries[2].list);
  EXPECT_EQ(entries[2].line, 8);
  EXPECT_THAT(entries[3].values, ElementsAre("10", "20"));
  EXPECT_THAT(entries[4].values, ElementsAre("C:\\sweep\t\"1\".h5"));
  EXPECT_THAT(entries[5].values, ElementsAre("true"));
  EXPECT_TRUE(entries[6].list);
  EXPECT_THAT(entries[6].values, IsEmpty());
  EXPECT_THAT(read_configuration("", "x"), IsEmpty());
  EXPECT_THAT(read_configuration("a = 1", "x")[0].values, ElementsAre("1")) << "without an end of line";
}

TEST(Configuration, WhatIsWrittenIsReadBack) {
  const std::vector<ConfigurationEntry> entries = {{"policy", {"a(b=\"c\\\")", "d\n\x01#"}, true, 0},
                                                   {"heads", {""}, false, 0},
                                                   {"traces", {}, true, 0},
                                                   {"output", {"größe.h5"}, false, 0}};
  const auto back = read_configuration(write_configuration(entries), "x");
  ASSERT_EQ(back.size(), entries.size());
  for (std::size_t i = 0; i < back.size(); ++i) {
    EXPECT_EQ(back[i].key, entries[i].key);
    EXPECT_EQ(back[i].values, entries[i].values);
    EXPECT_EQ(back[i].list, entries[i].list);
  }
}

TEST(Configuration, WhatIsWrongIsNamedWithItsLine) {
  const struct {
    std::string text;
    std::string reason;
  } cases[] = {
      {"a = 1\nb", "line 2: expected '=' after 'b'"},
      {"a =", "line 1: expected a value"},
      {"a = kv", "line 1: text goes in quotes: \"kv\""},
      {"a = \"kv", "expected a closing \""},
      {"a = 'kv\n'", "line 1: expected a closing '"},
      {"a = \"\\q\"", "unknown escape"},
      {"a = [1, 2", "expected ',' or ']'"},
      {"a = [1 2]", "expected ',' or ']'"},
      {"a = [[1]]", "expected a value"},
      {"a = 1 2", "unexpected text after the value of 'a'"},
      {"a = 1\na = 2", "line 2: 'a' stands twice"},
      {"[sweep]\na = 1", "line 1: tables are not known"},
      {"= 1", "expected a key"},
      {"a = {b = 1}", "expected a value"},
  };
  for (const auto& [text, reason] : cases) {
    EXPECT_THAT(refusal(text), testing::AllOf(HasSubstr("sweep.toml: line "), HasSubstr(reason))) << text;
  }
}

TEST(SweepIdentityTest, SurvivesItsFile) {
  SweepIdentity identity;
  identity.version = "1.2";
  identity.policies = {"snapkv", "kept(file=\"a,b\")"};
  identity.capacities = {"64", "25%"};
  identity.traces = {{"a b.h5", 1234567890123, "00ff"}};
  identity.files = {{"plugin.so", 1, "11"}, {"sets.h5", 2, "22"}};
  const SweepIdentity back = SweepIdentity::from_text(identity.text(), "x");
  EXPECT_EQ(difference(identity, back), "");
  EXPECT_EQ(back.text(), identity.text());
  SweepIdentity other = back;
  other.files[1].content = "23";
  EXPECT_EQ(difference(identity, other), "the content of sets.h5 is another, of the same size");
  EXPECT_THAT(test::message_of<UsageError>([]() { SweepIdentity::from_text("version = 1", "x"); }),
              HasSubstr("x: has no 'policy'"));
}

}  // namespace
}  // namespace kvreplay
