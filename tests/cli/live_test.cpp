// `kvreplay live` as a user types it.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "hdf5/hdf5.h"
#include "replay/results_reader.h"
#include "support/places.h"
#include "support/tiny_model.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::Outcome;
using test::TinyModel;
using test::TinyModelOptions;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class LiveCommand : public test::Commands {
 protected:
  void SetUp() override {
    write_model("tiny", 1);
    std::string ids;
    for (int i = 0; i < 80; ++i) ids += fmt::format("{} ", (i * i * 7 + i * 13 + 5) % 97);
    test::write_file(folder_ / "ids", ids);
    ASSERT_EQ(run("capture --model tiny --tokens ids --generate 9 -o run.h5").exit_code, 0);
  }

  void write_model(const std::string& name, unsigned seed, int layers = 2) const {
    TinyModelOptions options;
    options.layers = layers;
    options.kv_heads = 2;
    options.seed = seed;
    TinyModel(options).write(folder_ / name);
  }

  Outcome run(const std::string& line) const { return Commands::run(test::words(line)); }

  void expect_refused(const std::string& arguments, const std::string& message, int exit_code = 1) const {
    refuse(test::words("live " + arguments + " -o live.h5"), exit_code, {message});
  }
};

TEST_F(LiveCommand, ShowsWhatTheModelLosesAndWhatAReplayMeasures) {
  const Outcome live =
      run("live --model tiny --trace run.h5 -p full,snapkv(window=8),h2o,oracle-attention -c 16,50% -o live.h5 "
          "--kept live-kept.h5 --json live.json --csv live.csv");
  ASSERT_EQ(live.exit_code, 0) << live.errors;
  EXPECT_THAT(live.output, AllOf(HasSubstr("KL"), HasSubstr("loss +"), HasSubstr("agree"), HasSubstr("residual error"),
                                 HasSubstr("oracle-attention"), HasSubstr("(ORACLE)"), HasSubstr("wrote live.h5")));

  const ResultsReader results(folder_ / "live.h5");
  ASSERT_EQ(run("replay run.h5 -p full,snapkv(window=8),h2o,oracle-attention -c 16,50% -o replay.h5").exit_code, 0);
  const ResultsReader replay(folder_ / "replay.h5");
  ASSERT_EQ(results.results().size(), replay.results().size());
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    const StoredResult& result = results.results()[i];
    SCOPED_TRACE(result.policy + " at " + result.capacity_request);
    EXPECT_EQ(result.trace_digest, replay.results()[i].trace_digest);
    const Table kl = results.read(i, Measure::kl);
    ASSERT_EQ(kl.shape, (std::vector<Index>{8}));
    for (const float number : kl.numbers) {
      EXPECT_EQ(number > 0, result.policy != "full");
    }
    const Table nll = results.read(i, Measure::nll);
    EXPECT_FALSE(std::isnan(nll.numbers[6]));
    EXPECT_TRUE(std::isnan(nll.numbers[7])) << "nothing came after the last token";
    // The same run, by passes that were cut elsewhere.
    const Table errors = results.read(i, Measure::residual_error);
    const Table expected = replay.read(i, Measure::residual_error);
    ASSERT_EQ(errors.shape, expected.shape);
    for (std::size_t n = 0; n < errors.numbers.size(); ++n) {
      EXPECT_NEAR(errors.numbers[n], expected.numbers[n], 1e-4 * static_cast<double>(1 + expected.numbers[n]));
    }
  }
  const json document = json::parse(test::read_file(folder_ / "live.json"));
  int rows = 0;
  for (const json& row : document["summary"]) {
    if (row["measure"] != "kl") continue;
    EXPECT_EQ(row["layer"], "all");
    ++rows;
  }
  EXPECT_EQ(rows, static_cast<int>(results.results().size()));

  // Its kept sets give the same, named as sets.
  const Outcome again = run("live --model tiny --trace run.h5 -p kept(file=live-kept.h5,index=1) -c 16 -o again.h5");
  ASSERT_EQ(again.exit_code, 0) << again.errors;
  EXPECT_EQ(ResultsReader(folder_ / "again.h5").read(0, Measure::kl).numbers, results.read(1, Measure::kl).numbers);
}

TEST_F(LiveCommand, GivesTheSameBytesForAnyNumberOfThreadsAndWithoutWhatAReplayMeasures) {
  const std::string common = "live --model tiny --trace run.h5 -p snapkv(window=8),knorm -c 16,25 ";
  ASSERT_EQ(run(common + "-o one.h5 --threads 1").exit_code, 0);
  ASSERT_EQ(run(common + "-o three.h5 --threads 3").exit_code, 0);
  EXPECT_EQ(test::read_file(folder_ / "one.h5"), test::read_file(folder_ / "three.h5"));
  const Outcome without = run(common + "-o without.h5 --no-offline");
  ASSERT_EQ(without.exit_code, 0) << without.errors;
  EXPECT_THAT(without.output, Not(HasSubstr("layer error")));
  const ResultsReader all(folder_ / "one.h5");
  const ResultsReader some(folder_ / "without.h5");
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(some.read(i, Measure::kl).numbers, all.read(i, Measure::kl).numbers);
    EXPECT_TRUE(some.read(i, Measure::layer_error).numbers.empty());
  }
}

TEST_F(LiveCommand, EvictsWhileTokensComeWhereThereIsASchedule) {
  const std::string line =
      "live --model tiny --trace run.h5 -p recent,h2o@h2o,snapkv(window=4)+every(2),triattention,oracle-residency "
      "-c 40 --generate 6 ";
  const Outcome outcome = run(line + "-o live.h5 --kept kept.h5");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.errors, HasSubstr("triattention keeps the same positions in all layers, and a running model has "
                                        "computed only the first ones when it decides; replay it"));
  EXPECT_THAT(outcome.errors, HasSubstr("oracle-residency looks at the queries to come, and a running model has none"));
  const ResultsReader results(folder_ / "live.h5");
  ASSERT_EQ(results.results().size(), 3U) << outcome.errors;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    const StoredResult& result = results.results()[i];
    SCOPED_TRACE(result.policy);
    EXPECT_EQ(results.read(i, Measure::kl).numbers.size(), 8U);
    EXPECT_EQ(results.read(i, Measure::layer_error).numbers.size(), 16U);
    const bool scheduled = result.policy != "recent";
    EXPECT_EQ(results.read(i, Measure::cache_size).numbers.empty(), !scheduled);
    for (const float size : results.read(i, Measure::cache_size).numbers) EXPECT_LE(size, 42.0f);
  }
  const Outcome without = run(line + "-o without.h5 --no-offline");
  ASSERT_EQ(without.exit_code, 0) << without.errors;
  for (std::size_t i = 0; i < 3; ++i) {
    for (const Measure measure : {Measure::kl, Measure::cache_size}) {
      EXPECT_EQ(ResultsReader(folder_ / "without.h5").read(i, measure).numbers, results.read(i, measure).numbers);
    }
  }
}

TEST_F(LiveCommand, ContinuesAsAsked) {
  ASSERT_EQ(run("capture --model tiny --tokens ids -o prompt.h5").exit_code, 0);
  const std::string common = "live --model tiny -p recent -c 20 -o live.h5 ";
  ASSERT_EQ(run(common + "--trace prompt.h5 --continue 5").exit_code, 0);
  EXPECT_EQ(ResultsReader(folder_ / "live.h5").results().front().evaluation_positions,
            (std::vector<int>{80, 81, 82, 83, 84}));
  // What the model writes itself is what the trace holds, which was written greedily.
  ASSERT_EQ(run(common + "--trace run.h5 --continue 8").exit_code, 0);
  const std::vector<float> own = ResultsReader(folder_ / "live.h5").read(0, Measure::kl).numbers;
  ASSERT_EQ(run(common + "--trace run.h5").exit_code, 0);
  EXPECT_EQ(ResultsReader(folder_ / "live.h5").read(0, Measure::kl).numbers, own);
  // An earlier eviction is followed by the rest of the prompt.
  ASSERT_EQ(run(common + "--trace run.h5 --evict-at 60").exit_code, 0);
  EXPECT_EQ(ResultsReader(folder_ / "live.h5").results().front().evaluation_positions.size(), 28U);

  std::filesystem::remove(folder_ / "live.h5");
  expect_refused(
      "--model tiny --trace prompt.h5 -p recent -c 20 --continue trace",
      "prompt.h5: has no token after the eviction at 80; continue with a number of tokens, as in --continue");
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --continue ids",
                 "ids: the model's folder has no tokenizer for this text; continue with a number of tokens");
}

TEST_F(LiveCommand, LetsTheModelWrite) {
  const std::string demo = (test::project_folder() / "traces" / "demo-model").string();
  const std::string prompt = (test::project_folder() / "tests" / "data" / "reference-prompt.txt").string();
  const Outcome outcome =
      run(fmt::format("live --model {} --prompt {} -p recent,restkv -c 64 --continue 4 --generate 6 --answer 12345 "
                      "--json live.json",
                      demo, prompt));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("same text  answered"), HasSubstr("the full cache")));
  const json written = json::parse(test::read_file(folder_ / "live.json"))["traces"][0]["generations"];
  EXPECT_EQ(written["full"]["tokens"], 6);
  EXPECT_TRUE(written["full"]["first_difference"].is_null());
  EXPECT_EQ(written["full"]["answered"], false);
  ASSERT_EQ(written["evicted"].size(), 2U);
  EXPECT_EQ(written["evicted"][1]["policy"], "restkv");
  // A word of what it writes.
  const std::string text = written["full"]["text"];
  const std::size_t word = text.find_first_not_of(" \n");
  const std::string answer = text.substr(word, text.find_first_of(" \n", word) - word);
  const Outcome answered = run(fmt::format(
      "live --model {} --prompt {} -p full -c 64 --continue 4 --generate 6 --answer {}", demo, prompt, answer));
  EXPECT_THAT(answered.output, HasSubstr(" 100 % ")) << answered.errors;
}

TEST_F(LiveCommand, DrawsWhatItWritesWhereAskedTo) {
  ASSERT_EQ(run("capture --model tiny --tokens ids -o prompt.h5").exit_code, 0);
  const std::string common = "live --model tiny --trace prompt.h5 -p full,recent -c 20 --continue 4 --generate 12 ";
  const auto written = [&](const std::string& more) {
    const Outcome outcome = run(common + more + " -o live.h5");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    const auto file = hdf5::File::open(folder_ / "live.h5");
    return std::vector{file.read_int32s("/results/0/full_generation/ids"),
                       file.read_int32s("/results/0/generation/ids"), file.read_int32s("/results/1/generation/ids")};
  };
  const auto greedy = written("");
  const auto drawn = written("--temperature 2 --seed 5 --threads 1");
  EXPECT_EQ(drawn, written("--temperature 2 --seed 5 --threads 2"));
  EXPECT_NE(drawn, greedy);
  EXPECT_NE(drawn, written("--temperature 2 --seed 6"));
  EXPECT_EQ(drawn[0], drawn[1]) << "the same numbers for every text";
  EXPECT_NE(drawn[0], drawn[2]);
  EXPECT_EQ(written("--temperature 2 --top-k 1"), greedy);
  // The continuation is drawn by the same numbers as a captured run's.
  ASSERT_EQ(run("capture --model tiny --tokens ids --generate 5 --temperature 2 --seed 5").exit_code, 0);
  const std::vector<std::int32_t> captured = TraceReader(folder_ / "run.h5").info().token_ids;
  ASSERT_EQ(captured.size(), 84U);
  EXPECT_TRUE(std::equal(captured.begin() + 80, captured.end(), drawn[0].begin()));
  const Outcome told = run(common + "--temperature 2 --seed 5 --top-p 0.9 -o live.h5");
  EXPECT_THAT(told.errors, HasSubstr("what the model writes is drawn: sampling at temperature 2, top-p 0.9, seed 5"));
}

TEST_F(LiveCommand, StopsWhereAskedTo) {
  ASSERT_EQ(run("capture --model tiny --tokens ids -o prompt.h5").exit_code, 0);
  const auto written = [&](const std::string& more) {
    const Outcome outcome =
        run("live --model tiny --trace prompt.h5 -p full -c 20 --continue 1 --generate 8 -o live.h5 " + more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return hdf5::File::open(folder_ / "live.h5").read_int32s("/results/0/full_generation/ids");
  };
  const std::vector<std::int32_t> free = written("");
  ASSERT_EQ(free.size(), 8U);
  const auto end = std::ranges::find(free, free[3]) + 1;
  const std::vector<std::int32_t> stopped(free.begin(), end);
  ASSERT_NE(free[0], free[3]) << "the continuation has the first token";
  EXPECT_EQ(written(fmt::format("--stop {}", free[3])), stopped);
  json config = json::parse(test::read_file(folder_ / "tiny" / "config.json"));
  config["eos_token_id"] = free[3];
  test::write_file(folder_ / "tiny" / "config.json", config.dump());
  EXPECT_EQ(written(""), stopped);
  EXPECT_EQ(written("--ignore-stop"), free);
}

TEST_F(LiveCommand, LeavesOutWhatCannotBeDecided) {
  const Outcome outcome = run("live --model tiny --trace run.h5 -p snapkv(window=32),recent -c 16 -o live.h5");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.errors, HasSubstr("capacity 16 is below the 32 positions that snapkv"));
  EXPECT_EQ(ResultsReader(folder_ / "live.h5").results().size(), 1U);
}

TEST_F(LiveCommand, RefusesATraceOfAnotherModel) {
  write_model("seeds", 2);
  write_model("layers", 1, 3);
  expect_refused("--model seeds --trace run.h5 -p recent -c 20",
                 "run.h5: is not a run of the model in seeds: the key of");
  expect_refused("--model layers --trace run.h5 -p recent -c 20",
                 "run.h5: is not a run of the model in layers: its num_layers is 2, and the model's 3");
  // What keys do not tell.
  TinyModelOptions options;
  options.kv_heads = 2;
  options.intermediate = 80;
  TinyModel(options).write(folder_ / "wider");
  expect_refused("--model wider --trace run.h5 -p recent -c 20",
                 "run.h5: is not a run of the model in wider: its weights have other names or shapes");
  options.intermediate = TinyModelOptions{}.intermediate;
  TinyModel headless(options);
  for (std::size_t i = 0; i < static_cast<std::size_t>(options.hidden); ++i) {
    headless.set_weight("model.norm.weight", i, i % 2 == 0 ? -1 : 1);
  }
  headless.write(folder_ / "norm");
  expect_refused("--model norm --trace run.h5 -p recent -c 20",
                 "run.h5: is not a run of the model in norm: the logit of token");
  // Half precision is no other model.
  ASSERT_EQ(run("capture --model tiny --tokens ids --generate 3 --dtype bfloat16 -o half.h5").exit_code, 0);
  EXPECT_EQ(run("live --model tiny --trace half.h5 -p recent -c 20").exit_code, 0);
  // An earlier version's trace tells less of its model.
  const auto live = [&](const std::filesystem::path& trace) {
    return run(fmt::format("live --model {} --trace {} -p recent -c 64 --no-offline",
                           (test::project_folder() / "traces/demo-model").string(), trace.string()));
  };
  EXPECT_EQ(live(test::test_data() / "reference-needle.h5").exit_code, 0);
}

TEST_F(LiveCommand, TakesKeptSetsOfTheSameTokensAlone) {
  const std::string demo = (test::project_folder() / "traces" / "demo-model").string();
  test::write_file(folder_ / "prompt.txt", "The castle is old. Nobody lives there now, and the road is long.");
  test::write_file(folder_ / "other.txt", "The castle is new. Nobody lives there now, and the road is long.");
  const std::string line = fmt::format("live --model {} -c 8 --continue 4 --no-offline ", demo);
  succeed(test::words(line + "--prompt prompt.txt -p knorm --kept kept.h5"));
  EXPECT_EQ(succeed(test::words(line + "--prompt prompt.txt -p kept(file=kept.h5)")).errors, "");
  refuse(test::words(line + "--prompt other.txt -p kept(file=kept.h5)"), 1,
         {"other.txt: kept.h5: /kept/0: is of prompt.txt, which has other tokens before the eviction"});

  // A capture of the prompt is another run of it.
  succeed(test::words(fmt::format("capture --model {} --prompt prompt.txt --generate 4 -o prompt.h5", demo)));
  const std::string note = "kept.h5: its kept sets are of another run of the same tokens, prompt.txt";
  for (const std::string& command : {std::string("replay prompt.h5 -c 8"), line + "--trace prompt.h5"}) {
    EXPECT_THAT(succeed(test::words(command + " -p kept(file=kept.h5)")).errors, HasSubstr(note));
  }
}

TEST_F(LiveCommand, ReplacesNothingThatItReads) {
  for (const char* output : {"-o tiny/config.json", "--csv tiny/model.safetensors", "-o run.h5", "--kept run.h5"}) {
    refuse(test::words(fmt::format("live --model tiny --trace run.h5 -p recent -c 20 {}", output)), 2,
           {"would overwrite what is read"});
  }
  test::write_file(folder_ / "more.txt", "more");
  refuse(test::words("live --model tiny --trace run.h5 -p recent -c 20 --continue more.txt --csv more.txt"), 2,
         {"more.txt: would overwrite what is read"});
}

TEST_F(LiveCommand, ContinuesWithATextBehindThePromptsOwnTokens) {
  const std::string demo = (test::project_folder() / "traces" / "demo-model").string();
  test::write_file(folder_ / "prompt.txt", "The castle is old. Nobody lives there now, and the road is long.");
  test::write_file(folder_ / "more.txt", " Remember that the river is wide.");
  test::write_file(folder_ / "empty.txt", "");
  const std::string line =
      fmt::format("live --model {} --prompt prompt.txt -p recent -c 8 -o live.h5 --continue ", demo);
  ASSERT_EQ(run(line + "more.txt").exit_code, 0);
  EXPECT_GT(ResultsReader(folder_ / "live.h5").results().front().evaluation_positions.size(), 4U);
  std::filesystem::remove(folder_ / "live.h5");
  refuse(test::words(line + "empty.txt"), 1, {"empty.txt: is empty"});

  // Another text is another run.
  test::write_file(folder_ / "second.txt", "A second prompt that is read after the first one was done.");
  test::Invocation stopped{.arguments = test::words(line + "more.txt --prompt second.txt")};
  stopped.interrupt_when = "run-0.h5";
  interrupt(stopped, "live.h5");
  test::write_file(folder_ / "more.txt", " Remember that the river is narrow and cold.");
  refuse(test::words(line + "more.txt --prompt second.txt --resume"), 1, {"more.txt"});
}

TEST_F(LiveCommand, TellsPromptsOfTheSameNameApart) {
  const std::string demo = (test::project_folder() / "traces" / "demo-model").string();
  for (const char* folder : {"one", "two"}) {
    std::filesystem::create_directory(folder_ / folder);
    test::write_file(folder_ / folder / "prompt.txt",
                     fmt::format("The {} castle is old and the road is long.", folder));
  }
  const Outcome outcome = succeed(test::words(fmt::format(
      "live --model {} --prompt one/prompt.txt two/prompt.txt -p recent -c 8 --continue 2 --generate 2 --no-offline",
      demo)));
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("2 prompts of demo-model"), HasSubstr("\none/prompt.txt "),
                                    HasSubstr("\ntwo/prompt.txt ")));
}

TEST_F(LiveCommand, SeesThatATextFromAPipeIsAnother) {
  const std::string demo = (test::project_folder() / "traces" / "demo-model").string();
  test::write_file(folder_ / "second.txt", "A second prompt that is read after the first one was done.");
  const std::string line =
      fmt::format("live --model {} --prompt /dev/stdin second.txt -p recent -c 8 --continue 4 -o live.h5", demo);
  test::Invocation stopped{.arguments = test::words(line), .input = "The castle is old and the road is long."};
  stopped.interrupt_when = "run-0.h5";
  interrupt(stopped, "live.h5");
  test::Invocation resumed{.arguments = test::words(line + " --resume"), .input = "The castle is new and the road is"};
  const Outcome refused = run_in(folder_.path(), resumed);
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.errors, HasSubstr("the size of /dev/stdin was 39 bytes, is 33"));
  resumed.input = stopped.input;
  EXPECT_EQ(run_in(folder_.path(), resumed).exit_code, 0);
}

TEST_F(LiveCommand, GoesOnWhereItWasInterrupted) {
  std::string ids = test::read_file(folder_ / "ids");
  for (const char* name : {"a", "b", "c"}) {
    ids = name + ids.substr(1);
    test::write_file(folder_ / name, "7 " + ids.substr(2));
    ASSERT_EQ(run(fmt::format("capture --model tiny --tokens {} --generate 5 -o {}.h5", name, name)).exit_code, 0);
  }
  const std::string line = "live --model tiny --trace a.h5 b.h5 c.h5 -p recent,knorm -c 16,32 --generate 4 ";
  ASSERT_EQ(run(line + "-o whole.h5 --kept whole-kept.h5 --csv whole.csv").exit_code, 0);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "whole.h5.units"));

  test::Invocation stopped{.arguments = test::words(line + "-o live.h5 --kept kept.h5 --csv live.csv")};
  stopped.interrupt_when = "run-1.h5";
  const Outcome interrupted = interrupt(stopped, "live.h5");
  EXPECT_NE(interrupted.exit_code, 0);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "live.h5"));
  EXPECT_THAT(interrupted.errors,
              HasSubstr("of 3 prompts are finished and kept in live.h5.units; go on with --resume"));

  refuse(test::words(line + "-o live.h5 --kept kept.h5 --csv live.csv"), 1, {"go on with --resume"});
  refuse(
      test::words("live --model tiny --trace a.h5 b.h5 c.h5 -p recent,knorm -c 16,32 --generate 3 -o live.h5 --resume"),
      1, {"what is asked of a live run", "--generate"});
  // What was written is damaged in one place and done again.
  test::write_file(folder_ / "live.h5.units" / "run-0.h5", "no results");
  const Outcome resumed = run(line + "-o live.h5 --kept kept.h5 --csv live.csv --resume");
  ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
  EXPECT_THAT(resumed.errors, HasSubstr("it is done again"));
  for (const auto& [one, other] :
       {std::pair("live.h5", "whole.h5"), {"kept.h5", "whole-kept.h5"}, {"live.csv", "whole.csv"}}) {
    EXPECT_EQ(test::read_file(folder_ / one), test::read_file(folder_ / other)) << one;
  }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "live.h5.units"));
}

TEST_F(LiveCommand, LeavesNothingBehindOnAFullDisk) {
  test::Invocation full{.arguments = test::words("live --model tiny --trace run.h5 -p recent -c 16 -o live.h5")};
  full.largest_file = 2000;
  const Outcome outcome = Commands::run(full);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "live.h5"));
}

TEST_F(LiveCommand, TellsHowItIsUsed) {
  expect_refused("--model tiny -p recent -c 20", "live needs what the model reads: --prompt FILE or --trace FILE", 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --generate 3 --evict-at 60",
                 "--generate: the model writes", 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --evict-at 60,70", "--evict-at: a live run evicts once",
                 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --evict-at 89", "run.h5: eviction position 89 is beyond",
                 1);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --templated",
                 "--templated says how a --prompt is written", 2);
  refuse(test::words("live --model tiny --trace run.h5 -p recent -c 20 --resume"), 2, {"name it with -o"});
  for (const char* number : {"0", "-1", "99999999999"}) {
    expect_refused(fmt::format("--model tiny --trace run.h5 -p recent -c 20 --continue {}", number),
                   "a number of tokens", 2);
  }
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --answer x", "ask for that with --generate N", 2);
  refuse({"live", "--model", "tiny", "--trace", "run.h5", "-p", "recent", "-c", "20", "-n", "3", "--answer", ""}, 2,
         {"--answer: an empty text is in every answer"});
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --temperature 1",
                 "--temperature is of what the model writes: ask for that with --continue N or --generate N", 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 --ignore-stop", "--ignore-stop is of what the model", 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 -n 3 --seed 1", "--seed is of tokens that are drawn", 2);
  expect_refused("--model tiny --trace run.h5 -p recent -c 20 -n 3 --stop 97", "--stop 97: is not in the model's", 1);
  expect_refused("--model nowhere --trace run.h5 -p recent -c 20", "nowhere", 1);
  expect_refused("--model tiny --trace missing.h5 -p recent -c 20", "missing.h5", 1);
}

}  // namespace
}  // namespace kvreplay
