#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <string>

#include "support/places.h"

namespace {

struct Outcome {
  int exit_code = 0;
  std::string output;  // standard output and error
};

Outcome kvreplay(const std::string& arguments) {
  const std::string command = "'" + kvreplay::test::kvreplay_executable().string() + "' " + arguments + " 2>&1";
  Outcome outcome;
  FILE* const pipe = ::popen(command.c_str(), "r");
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) outcome.output += static_cast<char>(c);
  const int status = ::pclose(pipe);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

std::string plugin(const std::string& name) {
  return " --plugin '" + (kvreplay::test::test_plugins() / name).string() + ".so' ";
}

const std::string kTrace = "'" + (kvreplay::test::golden_folder() / "random-gqa.h5").string() + "' ";

TEST(PluginOption, PoliciesListsAndExplainsThem) {
  const Outcome list = kvreplay("policies" + plugin("recency_attention") + plugin("matrices"));
  EXPECT_EQ(list.exit_code, 0) << list.output;
  EXPECT_NE(list.output.find("\nrecency-attention(window=32, half_life=1000)\n"), std::string::npos) << list.output;
  EXPECT_NE(list.output.find("\nmatrices\n"), std::string::npos) << list.output;
  const Outcome one = kvreplay("policies" + plugin("recency_attention") + "'recency-attention(half_life=9)'");
  EXPECT_EQ(one.exit_code, 0) << one.output;
  EXPECT_NE(one.output.find("canonical: recency-attention(half_life=9)"), std::string::npos) << one.output;
  EXPECT_EQ(kvreplay("policies recency-attention").exit_code, 2);
}

TEST(PluginOption, ReplayTakesThemBeforeAndAfterTheSpecs) {
  for (const std::string& arguments :
       {plugin("recency_attention") + kTrace + "-p recency-attention -c 40",
        kTrace + "-p 'recency-attention(half_life=10)' -c 40" + plugin("recency_attention")}) {
    const Outcome outcome = kvreplay("replay " + arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("recency-attention"), std::string::npos) << outcome.output;
  }
}

TEST(PluginOption, AFailureIsOneLine) {
  for (const char* name : {"absent", "no_plugin", "other_version", "other_layout", "missing_symbol", "taken_name"}) {
    const Outcome outcome = kvreplay("policies" + plugin(name));
    EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
    EXPECT_TRUE(outcome.output.starts_with("kvreplay: " + (kvreplay::test::test_plugins() / "").string()))
        << outcome.output;
    EXPECT_EQ(outcome.output.find('\n'), outcome.output.size() - 1) << outcome.output;
  }
}

}  // namespace
