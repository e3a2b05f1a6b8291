// What a replay shows for traces of every shape, for several of them, and for any number of threads.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <map>
#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "hdf5/hdf5.h"
#include "support/random_trace.h"
#include "support/tiny_model.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::RandomTrace;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class ReplayCommand : public test::Commands {
 protected:
  // The mean of a measure over all layers, as the JSON file has it.
  double mean_of(const std::string& file, const std::string& trace, const std::string& measure) const {
    const json document = json::parse(test::read_file(folder_ / file));
    for (const json& row : document["summary"]) {
      if (row["trace"] == trace && row["layer"] == "all" && row["measure"] == measure) return row["mean"];
    }
    ADD_FAILURE() << "no " << measure << " of " << trace;
    return -1;
  }
};

// Everything below the root of two files is the same: groups, attributes' texts and the bytes of all datasets.
void expect_equal(const hdf5::File& a, const hdf5::File& b, const std::string& group = "/") {
  ASSERT_EQ(a.list(group), b.list(group)) << group;
  for (const std::string& name : a.list(group)) {
    const std::string path = (group == "/" ? "" : group) + "/" + name;
    if (a.is_group(path)) {
      expect_equal(a, b, path);
    } else {
      EXPECT_EQ(a.dataset(path).shape(), b.dataset(path).shape()) << path;
      EXPECT_EQ(a.dataset(path).compute_xxh64(), b.dataset(path).compute_xxh64()) << path;
    }
  }
}

TEST_F(ReplayCommand, GivesTheSameBitsForAnyNumberOfThreads) {
  RandomTrace{.num_attention_heads = 6, .num_key_value_heads = 3, .spans = {{5, 9, "x"}}}.write(folder_ / "run.h5");
  for (const std::string threads : {"1", "2"}) {
    succeed({"replay",
             "run.h5",
             "--policy",
             "full",
             "restkv(window=8)",
             "snapkv(window=8)",
             "h2o(window=8)",
             "tova",
             "random",
             "snapkv(window=8)+adakv",
             "--capacity",
             "20,50%",
             "--rank-agreement",
             "--threads",
             threads,
             "-o",
             "results" + threads + ".h5",
             "--csv",
             "results" + threads + ".csv",
             "--kept",
             "kept" + threads + ".h5"});
  }
  for (const std::string name : {"results", "kept"}) {
    EXPECT_TRUE(test::read_file(folder_ / (name + "1.h5")) == test::read_file(folder_ / (name + "2.h5"))) << name;
  }
  EXPECT_EQ(test::read_file(folder_ / "results1.csv"), test::read_file(folder_ / "results2.csv"));
}

TEST_F(ReplayCommand, CaptureGivesTheSameBitsForAnyNumberOfThreads) {
  test::TinyModelOptions model;
  model.kv_heads = 2;
  test::TinyModel(model).write(folder_ / "model");
  std::string ids;
  for (int i = 0; i < 150; ++i) ids += std::to_string((i * 31 + i * i) % 97) + " ";
  test::write_file(folder_ / "ids", ids);
  for (const std::string threads : {"1", "2"}) {
    succeed({"capture", "--model", "model", "--tokens", "ids", "--generate", "5", "--threads", threads, "-o",
             "run" + threads + ".h5"});
  }
  const auto one = hdf5::File::open(folder_ / "run1.h5");
  const auto two = hdf5::File::open(folder_ / "run2.h5");
  expect_equal(one, two);
  if (one.read_string("/", "created_at") == two.read_string("/", "created_at")) {
    EXPECT_TRUE(test::read_file(folder_ / "run1.h5") == test::read_file(folder_ / "run2.h5"));
  }
}

TEST_F(ReplayCommand, OddShapesAreReplayed) {
  const std::pair<const char*, RandomTrace> shapes[] = {
      {"one-head.h5", {.num_attention_heads = 1, .num_key_value_heads = 1}},
      {"eight-to-one.h5", {.num_attention_heads = 8, .num_key_value_heads = 1}},
      {"one-layer.h5", {.num_layers = 1}},
      {"one-dimension.h5", {.head_dim = 1, .hidden_size = 1}},
      {"float16.h5", {.type = DType::float16}},
      {"bfloat16.h5", {.type = DType::bfloat16}},
      {"no-projection.h5", {.output_projection = false}},
      {"sliding.h5", {.sliding_window = 7}},
      {"capped.h5", {.softcapping = 2}},
      {"one-prompt-token.h5", {.prompt_length = 1, .num_tokens = 4}},
      {"shorter-than-the-window.h5", {.prompt_length = 10, .num_tokens = 14}},
  };
  for (const auto& [name, trace] : shapes) {
    trace.write(folder_ / name);
    SCOPED_TRACE(name);
    const test::Outcome outcome =
        succeed({"replay", name, "--policy", "full", "recent", "snapkv(window=1)", "restkv(window=1)", "tova",
                 "h2o(window=1)", "random", "knorm", "--capacity", "1,5", "--json", "results.json"});
    EXPECT_THAT(outcome.output, AllOf(Not(HasSubstr("nan")), Not(HasSubstr("inf"))));
    EXPECT_EQ(mean_of("results.json", name, "layer_error"), 0) << "full comes first";
    EXPECT_EQ(mean_of("results.json", name, "attention_recall"), 1);
  }
  // Below its window a prompt is kept whole, whatever the policy would protect.
  EXPECT_THAT(succeed(test::words("replay shorter-than-the-window.h5 --policy snapkv --capacity 64")).errors,
              HasSubstr("capacity 64 exceeds the 10 positions"));
}

TEST_F(ReplayCommand, EvictsAnywhereInTheTrace) {
  RandomTrace{}.write(folder_ / "run.h5");
  const test::Outcome outcome =
      succeed(test::words("replay run.h5 --policy recent --capacity 20 --evict-at 1,30,69,30 --evaluate-from 1 "
                          "--csv results.csv -o results.h5"));
  EXPECT_THAT(outcome.output,
              AllOf(HasSubstr("evicted at 1 to 69"), HasSubstr("every eviction position weighs the same")));
  EXPECT_THAT(outcome.errors, HasSubstr("capacity 20 exceeds the 1 position before the eviction"));
  const auto file = hdf5::File::open(folder_ / "results.h5");
  ASSERT_EQ(file.list("/results").size(), 3u) << "30 is evicted at once";
  EXPECT_EQ(file.read_int("/results/2", "evict_at"), 69);
  EXPECT_THAT(file.dataset("/results/2/layer_error").shape(), testing::ElementsAre(2, 1));
  EXPECT_FALSE(file.exists("/evaluation_positions")) << "the results have different ones";
  EXPECT_THAT(outcome.errors, HasSubstr("note: run.h5: evictions at 1, 30, 69 are evaluated on different queries"));
}

TEST_F(ReplayCommand, DrawsKeptSetsAlone) {
  RandomTrace{}.write(folder_ / "run.h5");
  const std::string line = "replay run.h5 -p recent,snapkv(window=4)+every(2),knorm -c 12,20 --kept ";
  succeed(test::words(line + "all.h5"));
  EXPECT_THAT(succeed(test::words(line + "sets.h5 --no-measures")).output, HasSubstr("Nothing was measured"));
  EXPECT_EQ(test::read_file(folder_ / "sets.h5"), test::read_file(folder_ / "all.h5"));
  refuse(test::words("replay run.h5 -p recent -c 12 --no-measures"), 2, {"--kept FILE"});
  refuse(test::words("replay run.h5 -p recent -c 12 --no-measures --kept k.h5 -o r.h5"), 2, {"leave them out"});
}

TEST_F(ReplayCommand, EvaluatesWhereItIsTold) {
  RandomTrace{}.write(folder_ / "run.h5");
  const auto first_position = [this](const std::string& options) {
    const test::Outcome outcome =
        succeed(test::words("replay run.h5 --policy recent --capacity 20 -o results.h5" + options));
    EXPECT_EQ(outcome.errors, "");
    const auto file = hdf5::File::open(folder_ / "results.h5");
    for (const std::string& index : file.list("/results")) {
      EXPECT_EQ(file.read_int32s("/results/" + index + "/evaluation_positions"),
                file.read_int32s("/evaluation_positions"));
    }
    return std::pair(file.read_int32s("/evaluation_positions").front(), outcome.output);
  };
  EXPECT_EQ(first_position(" --evict-at 30").first, 30);
  EXPECT_EQ(first_position(" --evict-at 30 --evaluate-from prompt").first, 60);
  EXPECT_EQ(first_position(" --evict-at 30 --evaluate-from 45").first, 45);
  EXPECT_EQ(first_position(" --evaluate-from 45").first, 60) << "what was not evicted yet is not evaluated";
  const auto [first, output] = first_position(" --evict-at 30,50");
  EXPECT_EQ(first, 50);
  EXPECT_THAT(output, HasSubstr("evicted at 30 to 50, evaluated from 50 on, 20 evaluation queries"));
  refuse(test::words("replay run.h5 --policy recent --capacity 20 --evict-at 30 --evaluate-from 70"), 1,
         {"run.h5: no query at or after position 70", "--evaluate-from"});
  for (const std::string start : {"0", "-3", "end", "1.5"}) {
    refuse({"replay", "run.h5", "--policy", "recent", "--capacity", "20", "--evaluate-from", start}, 2,
           {"--evaluate-from: '" + start + "' is not a position to evaluate from", "or prompt"});
  }
}

TEST_F(ReplayCommand, WhatIsGivenTwiceIsReplayedOnceAndTold) {
  RandomTrace{}.write(folder_ / "run.h5");
  const test::Outcome outcome = succeed(test::words(
      "replay run.h5 ./run.h5 --policy snapkv snapkv(window=32) --capacity 40,40,66.7%,66.70% --json results.json"));
  EXPECT_THAT(outcome.output, HasSubstr("1 trace of random"));
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("note: ./run.h5: is given more than once"),
                                    HasSubstr("note: policy snapkv is given more than once")));
  const json document = json::parse(test::read_file(folder_ / "results.json"));
  EXPECT_EQ(document["traces"].size(), 1u);
  EXPECT_EQ(document["summary"].size(), 2u * 4u * 3u)
      << "40 and 66.7%, which are alike, for 4 measures of 2 layers and all";
}

TEST_F(ReplayCommand, SharesOfThePromptMayBeFractions) {
  RandomTrace{}.write(folder_ / "run.h5");
  succeed(test::words("replay run.h5 --policy recent --capacity 12.5%,0.1% -o results.h5"));
  const auto file = hdf5::File::open(folder_ / "results.h5");
  EXPECT_EQ(file.read_int("/results/0", "capacity"), 7);
  EXPECT_EQ(file.read_string("/results/0", "capacity_request"), "12.5%");
  EXPECT_EQ(file.read_int("/results/1", "capacity"), 1) << "something is always kept";
}

TEST_F(ReplayCommand, TracesOfDifferentModelsAreToldApart) {
  RandomTrace{}.write(folder_ / "a.h5");
  RandomTrace{.num_layers = 3, .num_attention_heads = 8, .num_key_value_heads = 1, .seed = 2}.write(folder_ / "b.h5");
  const std::string options = " --policy recent snapkv --capacity 40 --json ";
  const test::Outcome both = succeed(test::words("replay a.h5 b.h5" + options + "both.json"));
  EXPECT_THAT(both.output,
              AllOf(HasSubstr("2 traces of 2 models"), HasSubstr("2 layers, 4 query heads on 2 KV heads"),
                    HasSubstr("3 layers, 8 query heads on 1 KV head\n"), HasSubstr("every trace weighs the same")));
  double sum = 0;
  for (const std::string name : {"a.h5", "b.h5"}) {
    succeed(test::words("replay " + name + options + "one.json"));
    for (const char* measure : {"layer_error", "head_error", "attention_recall", "cosine"}) {
      EXPECT_EQ(mean_of("one.json", name, measure), mean_of("both.json", name, measure)) << name << measure;
    }
    sum += mean_of("one.json", name, "layer_error");
  }
  EXPECT_THAT(both.output, HasSubstr(fmt::format("{:.4f}", sum / 2)));
}

TEST_F(ReplayCommand, TheSameNoteAboutManyTracesIsOneLine) {
  for (const std::string name : {"a.h5", "b.h5", "c.h5"}) RandomTrace{}.write(folder_ / name);
  const test::Outcome outcome = succeed(test::words("replay a.h5 b.h5 c.h5 --policy recent --capacity 99"));
  EXPECT_EQ(
      outcome.errors,
      "note: a.h5 and 2 more traces: capacity 99 exceeds the 60 positions before the eviction: everything is kept\n");
}

TEST_F(ReplayCommand, RowsOfFewerTracesStandBehindAndSaySo) {
  RandomTrace{}.write(folder_ / "all.h5");
  RandomTrace{.captured_prompt_queries = 8, .seed = 2}.write(folder_ / "few.h5");
  const std::string replay = "replay all.h5 few.h5 --policy random snapkv(window=16) snapkv(window=8) --capacity 20 ";
  const test::Outcome outcome = succeed(test::words(replay + "--csv results.csv"));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr(" on\n"), HasSubstr("  2 of 2\n"), HasSubstr("  1 of 2\n"),
                                    HasSubstr("on: how many traces and eviction positions")));
  EXPECT_LT(outcome.output.find("\nrandom "), outcome.output.find("\nsnapkv(window=16) "))
      << "whatever its error is: it is of other traces";
  EXPECT_THAT(outcome.errors, HasSubstr("note: few.h5: left out: snapkv(window=16) "));
  EXPECT_THAT(succeed(test::words("replay all.h5 --policy random snapkv(window=16) --capacity 20")).output,
              AllOf(Not(HasSubstr(" of 1\n")), Not(HasSubstr("on: how many"))));
}

TEST_F(ReplayCommand, CapacitiesStandAsTheyWereAskedForWhereAPolicyLacksSome) {
  RandomTrace{}.write(folder_ / "run.h5");
  const test::Outcome outcome =
      succeed(test::words("replay run.h5 -p snapkv(window=24) recent -c 8 16 32 40 -o results.h5"));
  const std::string analyzed = succeed(test::words("analyze results.h5")).output;
  for (const std::string& output : {outcome.output, analyzed}) {
    std::size_t last = 0;
    for (const int capacity : {8, 16, 32, 40}) {
      const std::size_t at = output.find(fmt::format("\n{:<19}{:>8} ", "recent", capacity));
      ASSERT_NE(at, std::string::npos) << capacity << output;
      EXPECT_LT(last, at);
      last = at;
    }
  }
}

TEST_F(ReplayCommand, WhatHasNothingToChooseIsMarked) {
  RandomTrace{}.write(folder_ / "run.h5");
  const test::Outcome outcome = succeed(test::words("replay run.h5 -p snapkv(window=16) recent -c 16 32"));
  EXPECT_THAT(outcome.output,
              AllOf(HasSubstr("\nsnapkv(window=16) †        16 "), HasSubstr("\nsnapkv(window=16)          32 "),
                    HasSubstr("†: nothing to choose at that capacity")));
  EXPECT_THAT(succeed(test::words("replay run.h5 -p snapkv(window=16) -c 32")).output, Not(HasSubstr("†")));
}

TEST_F(ReplayCommand, NotesOfOneEvictionSayOfWhich) {
  RandomTrace{}.write(folder_ / "run.h5");
  const test::Outcome outcome =
      succeed(test::words("replay run.h5 -p snapkv(window=16) recent -c 8 40% --evict-at 20 60"));
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("run.h5 evicted at 20: left out: snapkv(window=16) at 8, 40%"),
                                    HasSubstr("run.h5 evicted at 60: left out: snapkv(window=16) at 8: ")));
}

TEST_F(ReplayCommand, BytesPerTokenTellWhatIsNoEqualBudget) {
  RandomTrace{}.write(folder_ / "run.h5");
  const auto line_of = [](const std::string& output, const std::string& policy) {
    const std::size_t first = output.find("\n" + policy + " ");
    EXPECT_NE(first, std::string::npos) << output;
    return output.substr(first + 1, output.find('\n', first + 1) - first - 1);
  };
  const std::string output =
      succeed(test::words("replay run.h5 --policy full snapkv(window=4) snapkv(window=4)+pyramid "
                          "snapkv@rest-kv(window=4) --capacity 15 --json results.json --csv "
                          "results.csv -o results.h5"))
          .output;
  EXPECT_THAT(output, HasSubstr("B/token"));
  EXPECT_THAT(line_of(output, "full"), HasSubstr("  128   "));
  EXPECT_THAT(line_of(output, "snapkv(window=4)"), HasSubstr("  32   ")) << "15 of 60 positions";
  EXPECT_THAT(line_of(output, "snapkv@rest-kv(window=4)"), HasSubstr("  64*  ")) << "a set per query head";
  EXPECT_THAT(test::read_file(folder_ / "results.csv"), HasSubstr(",kept,bytes_per_token,evict_at,evaluate_from,"));
  std::map<std::string, double> bytes;
  const json document = json::parse(test::read_file(folder_ / "results.json"));
  for (const json& row : document["summary"]) {
    bytes[row["policy"]] = row["bytes_per_token"];
    EXPECT_EQ(row["evaluate_from"], 60);
    EXPECT_EQ(row["nothing_to_choose"], false);
  }
  EXPECT_EQ(bytes["snapkv@rest-kv(window=4)"], 64);
  const auto file = hdf5::File::open(folder_ / "results.h5");
  EXPECT_EQ(file.read_double("/results/1", "bytes_per_token"), 32);
  EXPECT_EQ(file.read_int("/results/1", "nothing_to_choose"), 0);
}

TEST_F(ReplayCommand, SpansHaveAColumnWhereThereAreAny) {
  RandomTrace{.spans = {{50, 60, "end"}}}.write(folder_ / "with.h5");
  RandomTrace{}.write(folder_ / "without.h5");
  const std::string options = " --policy recent --capacity 5";
  EXPECT_THAT(succeed(test::words("replay with.h5 without.h5" + options)).output,
              AllOf(HasSubstr("spans kept"), HasSubstr("50.0 %"), HasSubstr("share of the annotated spans'")));
  EXPECT_THAT(succeed(test::words("replay without.h5" + options)).output, Not(HasSubstr("spans")));
}

}  // namespace
}  // namespace kvreplay
