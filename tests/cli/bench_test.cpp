#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "support/random_trace.h"

namespace kvreplay::test {
namespace {

class Bench : public Commands {
 protected:
  void write_trace() const {
    RandomTrace{
        .head_dim = 16, .hidden_size = 64, .prompt_length = 700, .num_tokens = 710, .captured_prompt_queries = 40}
        .write(folder_ / "t.h5");
  }
};

TEST_F(Bench, HoldsEveryStageAgainstItsFloor) {
  write_trace();
  const Outcome outcome = succeed({"bench", "t.h5", "--runs", "1", "--capacity", "64", "--json", "bench.json"});
  for (const char* said : {"float32 products in cache", "the same by Eigen", "exponentials in cache", "reading memory",
                           "times floor", "restkv without projection", "measuring one setting", "wrote bench.json"}) {
    EXPECT_THAT(outcome.output, testing::HasSubstr(said));
  }
  const auto document = nlohmann::json::parse(read_file(folder_ / "bench.json"));
  EXPECT_EQ(document["prompt_length"], 700);
  for (const auto& [name, rate] : document["ceilings"].items()) EXPECT_GT(rate.get<double>(), 0) << name;
  const auto& ceilings = document["ceilings"];
  EXPECT_EQ(ceilings["products"],
            std::max(ceilings["products_by_kernel"].get<double>(), ceilings["products_by_eigen"].get<double>()));
  ASSERT_EQ(document["stages"].size(), 8u);
  for (const auto& stage : document["stages"]) {
    EXPECT_GT(stage["seconds"].get<double>(), 0) << stage;
    EXPECT_GT(stage["bytes"].get<double>(), 0) << stage;
    EXPECT_GT(stage["floor"].get<double>(), 0) << stage;
  }
  // What is counted follows from the shape: 2 tensors of 2 heads × 710 positions × 16 dimensions in float32, per layer.
  EXPECT_EQ(document["stages"][0]["bytes"], 2 * 2 * 710 * 16 * 4);
  EXPECT_EQ(document["stages"][0]["operations"], 0);
  // 4 query heads × 32 queries of the window × 700 positions: a product over 16 dimensions each, and an exponential.
  EXPECT_EQ(document["stages"][1]["exponentials"], 4 * 32 * 700);
  EXPECT_GE(document["stages"][1]["operations"], 2 * 16 * 4 * 32 * 700);
}

TEST_F(Bench, RefusesWhatCannotBeMeasured) {
  write_trace();
  refuse({"bench", "t.h5", "--capacity", "700"}, 2, {"--capacity 700", "all of the trace's 700"});
  refuse({"bench", "t.h5", "--capacity", "32"}, 2, {"above ReST-KV's window of 32"});
  refuse({"bench", "t.h5", "--runs", "0"}, 2, {"a number of runs"});
  refuse({"bench", "absent.h5"}, 1, {"absent.h5", "cannot be opened"});
}

}  // namespace
}  // namespace kvreplay::test
