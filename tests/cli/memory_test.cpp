// --memory is kept by the whole process, as the system counts it.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cstdio>
#include <string>
#include <vector>

#include "base/memory.h"
#include "cli/command.h"
#include "support/random_trace.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using testing::HasSubstr;

constexpr std::int64_t kMiB = 1 << 20;

// Reads "21.5 MiB" after `before`; 0 where that is not there.
std::int64_t size_after(const std::string& text, const std::string& before) {
  const std::size_t at = text.find(before);
  double size = 0;
  char unit = 0;
  if (at == std::string::npos || std::sscanf(text.c_str() + at + before.size(), "%lf %ciB", &size, &unit) != 2)
    return 0;
  return static_cast<std::int64_t>(size * static_cast<double>(unit == 'K' ? 1024 : unit == 'M' ? kMiB : 1024 * kMiB));
}

class Memory : public test::Commands {
 protected:
  // A process begins as a copy of the one that starts it, and the system counts that in.
  void SetUp() override {
    test::Commands::SetUp();
    give_memory_back();
  }

  // Runs a sweep in as little memory as it says that it takes, and in more.
  void expect_kept(const std::string& arguments) const {
    trim_memory();
    const std::string sweep = "sweep " + arguments + " -o results.h5";
    const test::Outcome refused = run(test::words(sweep + " --memory 1M"));
    EXPECT_EQ(refused.exit_code, 1);
    int enough = 0;
    const std::size_t advice = refused.errors.find("give --memory ");
    ASSERT_NE(advice, std::string::npos) << refused.errors;
    ASSERT_EQ(std::sscanf(refused.errors.c_str() + advice, "give --memory %dM,", &enough), 1) << refused.errors;
    const std::int64_t least = enough * kMiB;
    for (const std::int64_t limit : {least, least + least / 4, 4 * least}) {
      SCOPED_TRACE(fmt::format("{} --memory {}", sweep, limit));
      const test::Outcome outcome = succeed(test::words(fmt::format("{} --memory {}", sweep, limit)));
      const std::int64_t promised = size_after(outcome.errors, "at most ");
      EXPECT_LE(promised, limit + kMiB / 10) << outcome.errors;
      EXPECT_LE(outcome.peak_memory, promised) << outcome.errors;
    }
    SCOPED_TRACE(sweep);
    const test::Outcome unlimited = succeed(test::words(sweep));
    EXPECT_LE(unlimited.peak_memory, size_after(unlimited.errors, "at most "));
  }
};

TEST_F(Memory, IsKeptByPoliciesOfAllKinds) {
  RandomTrace{.num_layers = 3,
              .head_dim = 64,
              .hidden_size = 320,
              .prompt_length = 3000,
              .num_tokens = 3040,
              .captured_prompt_queries = 64,
              .type = DType::float16}
      .write(folder_ / "t.h5");
  for (const char* policies :
       {"snapkv+adakv", "restkv(alpha={0.1:0.9:0.1}) snapkv", "h2o keydiff lagkv knorm",
        "criticalkv(base=snapkv) caote tova", "pyramidkv streamingllm full random(seed={1:40})"}) {
    expect_kept(fmt::format("t.h5 -c 200,900 --threads 1 -p {}", policies));
    expect_kept(fmt::format("t.h5 -c 200,900 --threads 4 -p {}", policies));
  }
}

TEST_F(Memory, IsKeptByOraclesRankAgreementAndSharedSets) {
  RandomTrace{.head_dim = 32, .hidden_size = 128, .prompt_length = 1500, .num_tokens = 1530}.write(folder_ / "t.h5");
  expect_kept("t.h5 -c 100,700 --threads 3 --rank-agreement -p snapkv(window=16) h2o oracle-attention");
  expect_kept("t.h5 -c 100,700 --threads 3 --rank-agreement --heads layer -p snapkv(window=16) recent");
  expect_kept("t.h5 -c 100 --threads 3 -p oracle-reconstruction(exchanges=2) snapkv recent");
  expect_kept("t.h5 -c 100 --threads 3 --heads layer -p oracle-reconstruction(exchanges=2) recent");
}

TEST_F(Memory, IsKeptWhereEvictionsAreMany) {
  RandomTrace{.num_layers = 4, .head_dim = 64, .prompt_length = 3000, .num_tokens = 3030}.write(folder_ / "t.h5");
  expect_kept("t.h5 -c 20% --threads 2 --evict-at 1000,2000,3000 -p restkv snapkv(window={8,16,32})+adakv keydiff");
}

TEST_F(Memory, IsKeptWhereResultsAreMany) {
  RandomTrace{.num_layers = 6, .prompt_length = 300, .num_tokens = 330}.write(folder_ / "t.h5");
  expect_kept("t.h5 -c 20,40,80,160 --threads 2 --kept kept.h5 --csv r.csv --json r.json -p random(seed={1:200})");
}

}  // namespace
}  // namespace kvreplay
