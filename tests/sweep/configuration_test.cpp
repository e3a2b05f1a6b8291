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
csv = """
one\
   \u00e9"""
json = """two
lines"""
memory = -1_000
seed = 0x10
share = 0.25
)toml",
                                          "sweep.toml");
  ASSERT_EQ(entries.size(), 12u);
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
  EXPECT_THAT(entries[7].values, ElementsAre("oneé"));
  EXPECT_THAT(entries[8].values, ElementsAre("two\nlines"));
  EXPECT_THAT(entries[9].values, ElementsAre("-1000"));
  EXPECT_THAT(entries[10].values, ElementsAre("16"));
  EXPECT_THAT(entries[11].values, ElementsAre("0.25"));
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
      {"a = 1\nb\nc = 2", "line 2: Error while parsing key-value pair: expected '='"},
      {"a =", "line 1: Error while parsing key-value pair: encountered end-of-file"},
      {"a = 1\nb = kv\n", "line 2: Error while parsing value: could not determine value type; text goes in quotes"},
      {"a = 25%", "line 1: Error while parsing decimal integer: expected digit, saw '%'; text goes in quotes"},
      {"a = \"kv", "line 1: Error while parsing string: encountered end-of-file"},
      {"a = 'kv\n'", "line 1: Error while parsing literal string"},
      {"a = \"\\q\"", "unknown escape sequence"},
      {"a = [1, 2", "Error while parsing array: encountered end-of-file"},
      {"a = [1 2]", "expected comma or closing ']'"},
      {"a = [\n  1,\n  [1]\n]", "line 3: the value of 'a' is neither text"},
      {"a = [1, {b = 1}]", "line 1: the value of 'a' is neither text"},
      {"a = 2024-02-29", "line 1: the value of 'a' is neither text"},
      {"a = 1 2", "line 1: Error while parsing key-value pair: expected a comment"},
      {"a = 1\na = 2", "line 2: Error while parsing key-value pair: cannot redefine existing integer 'a'"},
      {"b = 1\n[sweep]\na = 1", "line 2: 'sweep' is a table; every option stands by itself"},
      {"[[sweep]]\na = 1", "line 1: 'sweep' is a table"},
      {"a.b = 1", "line 1: 'a' is a table"},
      {"a = {b = 1}", "line 1: 'a' is a table"},
      {"= 1", "line 1: Error while parsing root table"},
      {"a = 1\nb = '\xe9.h5'", "line 2: Encountered invalid utf-8 sequence"},
  };
  for (const auto& [text, reason] : cases) {
    EXPECT_THAT(refusal(text), testing::AllOf(HasSubstr("sweep.toml: line "), HasSubstr(reason))) << text;
    EXPECT_THAT(refusal(text), testing::Not(HasSubstr("\n"))) << text;
  }
}

TEST(Configuration, OnlyTextIsWritten) {
  EXPECT_EQ(test::message_of<UsageError>([]() {
              write_configuration({{"traces", {"a.h5", "\xe9.h5"}, true, 0}});
            }),
            "traces '\\xe9.h5' is not UTF-8 text, and TOML is");
}

TEST(SweepIdentityTest, SurvivesItsFile) {
  SweepIdentity identity;
  identity.version = "1.2";
  identity.policies = {"snapkv", "kept(file=\"a,b\")"};
  identity.capacities = {"64", "25%"};
  identity.evaluate_from = "prompt";
  identity.rank_agreement = true;
  identity.traces = {{"a b.h5", 1234567890123, "00ff"}};
  const test::TemporaryFolder folder;
  test::write_file(folder / "\xe9.so", "not UTF-8");
  identity.files = {identity_of(folder / "\xe9.so"), {"sets.h5", 2, "22"}};
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
