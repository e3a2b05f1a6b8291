// The claims of the demo, on the bundled model and prompts: what a user sees first must be true.
#include <gmock/gmock.h>

#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/command.h"
#include "hdf5/hdf5.h"
#include "support/places.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class Demo : public test::Commands {
 protected:
  const std::filesystem::path traces_ = test::bundled_traces();

  std::string capture(const std::string& prompt, const std::string& answer) {
    const std::string text = traces_ / "prompts" / (prompt + ".txt");
    const std::string spans = traces_ / "prompts" / (prompt + ".spans.json");
    const std::string model = traces_ / "demo-model";
    const test::Outcome outcome = succeed({"capture", "--model", model, "--prompt", text, "--spans", spans,
                                           "--generate", "12", "--queries", "all", "-o", prompt + ".h5"});
    EXPECT_THAT(outcome.output, HasSubstr(answer)) << "the model retrieves what was planted";
    return prompt + ".h5";
  }

  // The mean recall of the planted fact that is asked for.
  static double needle_recall(const hdf5::File& file, const std::string& group) {
    const auto spans = file.read_labelled_ranges(group + "/spans");
    const std::vector<float> recall = file.read_floats(group + "/span_recall");
    double sum = 0;
    int count = 0;
    for (std::size_t i = 0; i < recall.size(); ++i) {
      if (!spans[i % spans.size()].label.starts_with("needle")) continue;
      sum += static_cast<double>(recall[i]);
      ++count;
    }
    return sum / count;
  }
};

TEST_F(Demo, ReconstructionAndAttentionBeatTheBaselines) {
  const std::vector<std::string> captured = {capture("needle", "70416"), capture("facts", "83107")};
  for (const std::string heads : {"kv", "query"}) {
    SCOPED_TRACE(heads);
    succeed({"replay", captured[0], captured[1], "--policy", "full", "random", "recent", "streamingllm", "snapkv",
             "restkv", "--capacity", "64,128,25%", "--heads", heads, "-o", "results.h5"});
    const auto file = hdf5::File::open(folder_ / "results.h5");
    std::map<std::string, std::map<std::string, double>> error;  // [capacity][policy], over the traces
    std::map<std::string, std::map<std::string, double>> needle;
    for (const std::string& index : file.list("/results")) {
      const std::string group = "/results/" + index;
      const std::vector<float> errors = file.read_floats(group + "/layer_error");
      const std::string policy = file.read_string(group, "policy");
      if (policy == "full") {
        EXPECT_THAT(errors, testing::Each(0.0f));
        continue;
      }
      const std::string capacity = file.read_string(group, "capacity_request");
      error[capacity][policy] +=
          std::accumulate(errors.begin(), errors.end(), 0.0) / static_cast<double>(errors.size()) / 2;
      needle[capacity][policy] += needle_recall(file, group) / 2;
    }
    ASSERT_EQ(error.size(), 3u);
    for (const std::string capacity : {"64", "128", "25%"}) {
      for (const std::string policy : {"snapkv", "restkv"}) {
        for (const std::string baseline : {"recent", "random"}) {
          EXPECT_LT(error[capacity][policy], error[capacity][baseline]) << policy << " at " << capacity;
        }
        EXPECT_GT(needle[capacity][policy], needle[capacity]["streamingllm"]) << policy << " at " << capacity;
      }
    }
  }
}

// Evaluated from the eviction on, most queries of the rest of the prompt look at what stays for free; on the queries
// that other evictions are evaluated on, the order is another.
TEST_F(Demo, WhichPolicyIsBetterDependsOnWhichQueriesAreEvaluated) {
  const std::string facts = capture("facts", "83107");
  const auto error_of = [&](const std::string& start) {
    succeed({"replay", facts, "--policy", "lagkv", "h2o", "--capacity", "128", "--evict-at", "1240", "--evaluate-from",
             start, "--json", "results.json"});
    std::map<std::string, double> error;
    const json document = json::parse(test::read_file(folder_ / "results.json"));
    for (const json& row : document["summary"]) {
      if (row["layer"] == "all" && row["measure"] == "layer_error") error[row["policy"]] = row["mean"];
    }
    return error;
  };
  auto from_eviction = error_of("1240");
  EXPECT_LT(from_eviction["lagkv"], from_eviction["h2o"]);
  auto from_prompt_end = error_of("prompt");
  EXPECT_GT(from_prompt_end["lagkv"], from_prompt_end["h2o"]);
}

TEST_F(Demo, APromptMayComeFromStandardInput) {
  const std::string model = traces_ / "demo-model";
  const test::Outcome outcome = run({.arguments = {"capture", "--model", model, "--prompt", "-", "--generate", "2",
                                                   "--queries", "window:3", "--dtype", "bfloat16", "-o", "run.h5"},
                                     .input = "The secret number of falcon is 48213.\n"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  const json trace = json::parse(succeed({"inspect", "run.h5", "--json", "--verify"}).output);
  EXPECT_THAT(trace["source"].get<std::string>(), HasSubstr("standard input"));
  EXPECT_EQ(trace["queries"]["in_prompt"], 3);
  EXPECT_EQ(trace["queries"]["after_prompt"], 1);
  EXPECT_EQ(trace["tensors"][0]["types"][0], "bfloat16");
}

}  // namespace
}  // namespace kvreplay
