// Specs with lists and ranges in braces.
#include "policy/expansion.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "policy/policy.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string refusal(const std::string& text) {
  return test::message_of<UsageError>([&text]() { expand_spec(text); });
}

TEST(Expansion, TextWithoutBracesStandsForItself) {
  for (const std::string text : {"snapkv", "restkv(alpha=0.5) + adakv", "kept(file=\"a,b\")", ""}) {
    EXPECT_THAT(expand_spec(text), ElementsAre(text));
  }
}

TEST(Expansion, AListIsEachOfItsItems) {
  EXPECT_THAT(expand_spec("restkv(temporal={ema, mean})"),
              ElementsAre("restkv(temporal=ema)", "restkv(temporal=mean)"));
  EXPECT_THAT(expand_spec("{snapkv,tova}"), ElementsAre("snapkv", "tova"));
  EXPECT_THAT(expand_spec("a(x={7})"), ElementsAre("a(x=7)"));
}

TEST(Expansion, ARangeIsExactAndIncludesItsEnd) {
  EXPECT_THAT(expand_spec("{0.1:0.9:0.1}"), ElementsAre("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"));
  EXPECT_THAT(expand_spec("{1:4}"), ElementsAre("1", "2", "3", "4"));
  EXPECT_THAT(expand_spec("{0:1:0.3}"), ElementsAre("0", "0.3", "0.6", "0.9"));
  EXPECT_THAT(expand_spec("{0.5:2:0.5}"), ElementsAre("0.5", "1", "1.5", "2"));
  EXPECT_THAT(expand_spec("{1:-1:-0.50}"), ElementsAre("1", "0.5", "0", "-0.5", "-1"));
  EXPECT_THAT(expand_spec("{32:16:-8}"), ElementsAre("32", "24", "16"));
  EXPECT_THAT(expand_spec("{3:3}"), ElementsAre("3"));
  EXPECT_THAT(expand_spec("{0.001:0.003:0.001}"), ElementsAre("0.001", "0.002", "0.003"));
  EXPECT_THAT(expand_spec("{100:300:100, 1000}"), ElementsAre("100", "200", "300", "1000"));
}

TEST(Expansion, TheLastBracesVaryFastest) {
  EXPECT_THAT(expand_spec("a(x={1,2},y={3:4})"), ElementsAre("a(x=1,y=3)", "a(x=1,y=4)", "a(x=2,y=3)", "a(x=2,y=4)"));
  EXPECT_EQ(expand_spec("a(x={1:10},y={1:10},z={1:10})").size(), 1000u);
}

TEST(Expansion, NestedSpecsAndBracesAreExpanded) {
  EXPECT_THAT(expand_spec("criticalkv(base=snapkv(window={16,32}))"),
              ElementsAre("criticalkv(base=snapkv(window=16))", "criticalkv(base=snapkv(window=32))"));
  EXPECT_THAT(expand_spec("criticalkv(base={snapkv(window={16,32},kernel=3),tova})"),
              ElementsAre("criticalkv(base=snapkv(window=16,kernel=3))", "criticalkv(base=snapkv(window=32,kernel=3))",
                          "criticalkv(base=tova)"));
}

TEST(Expansion, BracesInQuotesAreText) {
  EXPECT_THAT(expand_spec(R"(kept(file="a{1,2}.h5"))"), ElementsAre(R"(kept(file="a{1,2}.h5"))"));
  EXPECT_THAT(expand_spec(R"(kept(file={"a{b\"}","c,d:e"}))"),
              ElementsAre(R"(kept(file="a{b\"}"))", R"(kept(file="c,d:e"))"));
}

TEST(Expansion, WhatItYieldsArePolicies) {
  for (const std::string& spec : expand_spec("restkv(alpha={0.1:0.9:0.1},beta={200,400},window={16,32})")) {
    EXPECT_EQ(make_policy(spec).canonical.substr(0, 6), "restkv") << spec;
  }
}

TEST(Expansion, WhatCannotBeIsNamed) {
  EXPECT_THAT(refusal("a(x={})"), HasSubstr("policy 'a(x={})': has braces with nothing in them"));
  EXPECT_THAT(refusal("a(x={1,,2})"), HasSubstr("nothing between two commas"));
  EXPECT_THAT(refusal("a(x={1,2)"), HasSubstr("'{' without a '}'"));
  EXPECT_THAT(refusal("a(x=1})"), HasSubstr("'}' without a '{'"));
  EXPECT_THAT(refusal("a(x={1:2:0})"), HasSubstr("'1:2:0' has the step 0"));
  EXPECT_THAT(refusal("a(x={1:2:-1})"), HasSubstr("leads away from its end"));
  EXPECT_THAT(refusal("a(x={2:1})"), HasSubstr("negative step"));
  for (const std::string range : {"1:b", "1:2:3:4", ":", "1:", "1e3:2e3", "1.2.3:4", "1234567890123456:2"}) {
    EXPECT_THAT(refusal("a(x={" + range + "})"), HasSubstr("'" + range + "' is no range")) << range;
  }
  EXPECT_THAT(refusal("a(x={0.000000000000001:900000000000000})"), HasSubstr("too far apart"));
}

TEST(Expansion, CommasSeparateSpecsOutsideOfWhatBelongsTogether) {
  EXPECT_THAT(split_specs("snapkv"), ElementsAre("snapkv"));
  EXPECT_THAT(split_specs("snapkv(window=8,kernel=3)+chunks(size=4),{h2o,tova},kept(file=\"a,b(\")"),
              ElementsAre("snapkv(window=8,kernel=3)+chunks(size=4)", "{h2o,tova}", "kept(file=\"a,b(\")"));
  EXPECT_THAT(split_specs("a,"), ElementsAre("a", ""));
}

TEST(Expansion, ThereIsALimit) {
  EXPECT_EQ(expand_spec("{1:100000}").size(), kMostSpecs);
  for (const std::string text : {"{1:100001}", "{1:1000},{1:101}", "{1:60000,1:60000}", "{1:900000000000000}"}) {
    EXPECT_THAT(refusal(text), HasSubstr("more than 100000 settings")) << text;
  }
}

}  // namespace
}  // namespace kvreplay
