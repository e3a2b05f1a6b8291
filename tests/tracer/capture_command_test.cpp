// The capture command as a user types it.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "support/places.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using test::read_file;
using test::TemporaryFolder;
using test::TinyModel;
using test::write_file;

struct Outcome {
  int exit_code = -1;
  std::string output;
  std::string errors;
};

class CaptureCommand : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(std::filesystem::exists(test::kvreplay_executable().string())) << "build the target kvreplay_cli first";
    TinyModel({}).write(folder_ / "tiny");
    write_file(folder_ / "ids", "5 25 59 10\n72\n");
  }

  // Runs `kvreplay capture`, or another command, in the test's folder.
  Outcome run(const std::string& arguments, const std::string& name = "capture") const {
    const std::string command = fmt::format("cd '{}' && '{}' </dev/null {} {} >out 2>err", folder_.path().string(),
                                            test::kvreplay_executable().string(), name, arguments);
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder_ / "out"), read_file(folder_ / "err")};
  }

  TemporaryFolder folder_;
};

TEST_F(CaptureCommand, TellsWhatItMade) {
  const Outcome outcome = run("--model tiny --tokens ids --generate 3 --queries window:2 --threads 1");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_NE(outcome.output.find("run.h5: "), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.output.find("2 layers, 5 prompt tokens, 4 captured queries"), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.output.find("generated 3 tokens: "), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.errors.find("prefill: 5 tokens in "), std::string::npos) << outcome.errors;
  EXPECT_NE(outcome.errors.find("decode: 2 tokens in "), std::string::npos) << outcome.errors;
  EXPECT_EQ(outcome.errors.find('\r'), std::string::npos) << "no progress line where there is no terminal";
  const TraceReader trace(folder_ / "run.h5");
  EXPECT_EQ(trace.info().num_tokens(), 7);
  EXPECT_NE(trace.info().source.find("model tiny, prompt ids"), std::string::npos) << trace.info().source;
}

TEST_F(CaptureCommand, ReadsStandardInputAndSpans) {
  const std::string demo = (test::bundled_traces() / "demo-model").string();
  write_file(folder_ / "prompt", "The secret number of falcon is 48213.\n");
  write_file(folder_ / "spans", R"([{"label": "answer", "text": "48213"}])");
  const Outcome outcome = run(
      fmt::format("--model '{}' --prompt - --spans spans --dtype bfloat16 --no-projection -o needle.h5 <prompt", demo));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  const TraceReader trace(folder_ / "needle.h5");
  ASSERT_EQ(trace.info().spans.size(), 1u);
  EXPECT_EQ(trace.info().spans[0].end - trace.info().spans[0].start, 5) << "digits are tokens of their own";
  EXPECT_FALSE(trace.has_output_projection(0));
  EXPECT_NE(trace.info().source.find("prompt standard input by tokenizer.model"), std::string::npos);
  EXPECT_EQ(trace.info().token_ids.front(), 1);
}

// With a tokenizer.model the names of special tokens are ordinary text, BOS too.
TEST_F(CaptureCommand, RefusesATemplatedPromptWithATokenizerThatKnowsNoSpecialTokens) {
  write_file(folder_ / "prompt", "<s>The secret number of falcon is 48213.");
  const auto demo = test::bundled_traces() / "demo-model";
  const Outcome outcome = run(fmt::format("--model '{}' --prompt prompt --templated", demo.string()));
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_NE(outcome.errors.find("tokenizer.model takes the names of special tokens in a templated prompt for ordinary"),
            std::string::npos)
      << outcome.errors;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run.h5"));
}

TEST_F(CaptureCommand, CountsOneOfAThingAsOne) {
  write_file(folder_ / "single", "5");
  const Outcome outcome = run("--model tiny --tokens single --generate 1");
  EXPECT_NE(outcome.output.find("2 layers, 1 prompt token, 1 captured query\n"), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.errors.find("prefill: 1 token in "), std::string::npos) << outcome.errors;
}

TEST_F(CaptureCommand, MarksWhereTurnsBegin) {
  const std::string demo = (test::bundled_traces() / "demo-model").string();
  write_file(folder_ / "prompt", "Naïve: The secret number of falcon is 48213.\nQ: What is it?\nQ: Who is it?\n");
  const auto starts = [&](const std::string& turns, const std::string& input) {
    write_file(folder_ / "turns", turns);
    const Outcome outcome = run(fmt::format("--model '{}' {} --turns turns -o turns.h5", demo, input));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return TraceReader(folder_ / "turns.h5").info().turn_starts;
  };
  const auto by_text = starts(R"([0, {"text": "Q:"}])", "--prompt prompt");
  ASSERT_EQ(by_text.size(), 3u);
  EXPECT_EQ(by_text[0], 0);
  const TraceReader trace(folder_ / "turns.h5");
  for (const std::size_t turn : {1, 2}) {
    const std::string& piece = trace.info().token_pieces[static_cast<std::size_t>(by_text[turn])];
    EXPECT_NE(piece.find('Q'), std::string::npos) << piece;
  }
  // The 45th character begins the second line; ï is one, though two bytes.
  EXPECT_EQ(starts(R"([0, {"character": 45}, {"character": 60}])", "--prompt prompt"), by_text);
  EXPECT_EQ(starts(fmt::format("[{}, 0, {}]", by_text[2], by_text[1]), "--prompt prompt"), by_text);
  EXPECT_EQ(starts("[0, 3]", "--tokens ids"), (std::vector<std::int32_t>{0, 3}));
  EXPECT_NE(run("turns.h5", "inspect").output.find("turns      2, beginning at 0, 3\n"), std::string::npos);
  EXPECT_NE(run("turns.h5 --json", "inspect").output.find("\"turn_starts\""), std::string::npos);
}

TEST_F(CaptureCommand, ExplainsTurnsThatCannotBe) {
  const std::string demo = (test::bundled_traces() / "demo-model").string();
  write_file(folder_ / "prompt", "The secret number of falcon is 48213.\n");
  const struct {
    const char* turns;
    const char* reason;
  } cases[] = {{"{}", "turns: is not a JSON list such as [0, 45]"},
               {"[]", "turns: names no turns"},
               {"[0, -1]", "turns: entry 2: must be a token position"},
               {"[1.5]", "turns: entry 1: must be a token position"},
               {R"([{"text": ""}])", "turns: entry 1: must be a token position"},
               {R"([{"text": "The", "character": 0}])", "turns: entry 1: must be a token position"},
               {"[0, 5000]", "turn at 5000: is not in the prompt of"},
               {"[3, 3]", "two turns begin at token 3"},
               {R"([{"position": 0, "role": "user"}, 3])", "turns: entry 2: has no \"role\", though others have"},
               {R"([{"position": 0, "role": ""}])", "turns: entry 1: must be a token position"},
               {R"([{"position": 0, "text": "The"}])", "turns: entry 1: must be a token position"},
               {R"([{"position": "0"}])", "turns: entry 1: must be a token position"},
               {R"([{"text": 3}])", "turns: entry 1: must be a token position"},
               {R"([{"role": "user"}])", "turns: entry 1: must be a token position"},
               {R"([{"text": "owl"}])", "turn \"owl\": does not occur in the prompt"},
               {R"([{"character": 900}])", "turn at character 900: does not occur in the prompt"}};
  for (const auto& wrong : cases) {
    write_file(folder_ / "turns", wrong.turns);
    const Outcome outcome = run(fmt::format("--model '{}' --prompt prompt --turns turns", demo));
    EXPECT_EQ(outcome.exit_code, 1) << wrong.turns;
    EXPECT_NE(outcome.errors.find(wrong.reason), std::string::npos) << outcome.errors;
  }
  write_file(folder_ / "turns", R"([{"text": "The"}])");
  EXPECT_NE(run("--model tiny --tokens ids --turns turns").errors.find("can only be found in a text prompt"),
            std::string::npos);
}

// What follows the prompt is the model's turn.
TEST_F(CaptureCommand, MarksWhereTheGeneratedTurnBegins) {
  const auto turns = [&](const std::string& content, const std::string& more) {
    write_file(folder_ / "turns", content);
    const Outcome outcome = run(fmt::format("--model tiny --tokens ids --turns turns {}", more));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return TraceReader(folder_ / "run.h5").info();
  };
  using Starts = std::vector<std::int32_t>;
  EXPECT_EQ(turns("[0, 3]", "--generate 4").turn_starts, (Starts{0, 3, 5}));
  EXPECT_EQ(turns("[0, 3]", "--generate 1").turn_starts, (Starts{0, 3})) << "its token is not in the trace";
  EXPECT_EQ(turns("[4]", "--generate 2 --temperature 1").turn_starts, (Starts{4, 5}));
  EXPECT_TRUE(turns("[4]", "--generate 2").turn_roles.empty());
  const TraceInfo named = turns(R"([{"position": 3, "role": "user"}, {"position": 0, "role": "system"}])", "-n 3");
  EXPECT_EQ(named.turn_starts, (Starts{0, 3, 5}));
  EXPECT_EQ(named.turn_roles, (std::vector<std::string>{"system", "user", "assistant"}));
  EXPECT_NE(run("run.h5", "inspect").output.find("turns      3, beginning at 0 (system), 3 (user), 5 (assistant)\n"),
            std::string::npos);
  ASSERT_EQ(run("--model tiny --tokens ids --generate 4").exit_code, 0);
  EXPECT_TRUE(TraceReader(folder_ / "run.h5").info().turn_starts.empty()) << "nobody speaks of turns";
}

// As templates end a prompt with the beginning of the answer's turn: 59 ends turns here.
TEST_F(CaptureCommand, GoesOnWithATurnThatTheChatLeavesOpen) {
  nlohmann::json config = nlohmann::json::parse(read_file(folder_ / "tiny/config.json"));
  config["eos_token_id"] = 59;
  write_file(folder_ / "tiny/config.json", config.dump());
  const auto starts = [&](const std::string& ids, const std::string& turns) {
    write_file(folder_ / "ids", ids);
    write_file(folder_ / "turns", turns);
    const Outcome outcome = run("--model tiny --tokens ids --turns turns --generate 3 --ignore-stop");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return TraceReader(folder_ / "run.h5").info().turn_starts;
  };
  using Starts = std::vector<std::int32_t>;
  EXPECT_EQ(starts("5 25 59 10 72", "[0, 3]"), (Starts{0, 3}));
  EXPECT_EQ(starts("5 25 59 10 59", "[0, 3]"), (Starts{0, 3, 5})) << "all turns are over";
  EXPECT_EQ(starts("5 25 10 59 72", "[0, 2, 4]"), (Starts{0, 2, 4, 5})) << "turns end otherwise";
  EXPECT_EQ(starts("5 25 59 10 72", "[3]"), (Starts{3, 5})) << "nothing says how turns end";
}

// transformers shortens the cache of a model without windows to a sliding_window in its config.json; the prompt sees
// all.
TEST_F(CaptureCommand, RefusesToGenerateBeyondACacheThatIsCutWithoutAMask) {
  nlohmann::json config = nlohmann::json::parse(read_file(folder_ / "tiny/config.json"));
  config["sliding_window"] = 6;
  write_file(folder_ / "tiny/config.json", config.dump());
  const Outcome beyond = run("--model tiny --tokens ids --generate 3");
  EXPECT_EQ(beyond.exit_code, 1);
  EXPECT_NE(beyond.errors.find("config.json: sliding_window 6: the layers of llama have no window"), std::string::npos)
      << beyond.errors;
  EXPECT_EQ(run("--model tiny --tokens ids --generate 2").exit_code, 0) << "six tokens go through the model";
  write_file(folder_ / "ids", "5 25 59 10 72 4 8 9");
  EXPECT_EQ(run("--model tiny --tokens ids --generate 1").exit_code, 0) << "the prompt alone sees all of itself";
}

TEST_F(CaptureCommand, WarnsWhereAHeadIsNotTheEmbeddingsThatItIsSaidToBe) {
  nlohmann::json config = nlohmann::json::parse(read_file(folder_ / "tiny/config.json"));
  const std::string untied = run("--model tiny --tokens ids --generate 4").output;
  config["tie_word_embeddings"] = true;
  write_file(folder_ / "tiny/config.json", config.dump());
  const Outcome outcome = run("--model tiny --tokens ids --generate 4");
  EXPECT_EQ(outcome.output, untied) << "the file's own head decides";
  EXPECT_NE(outcome.errors.find("warning: tiny/config.json: tie_word_embeddings is true, but lm_head.weight is not"),
            std::string::npos)
      << outcome.errors;
}

TEST_F(CaptureCommand, DrawsTheSameTokensForTheSameSeedOnAnyNumberOfThreads) {
  const auto drawn = [&](const std::string& more) {
    const Outcome outcome = run("--model tiny --tokens ids --generate 24 " + more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return TraceReader(folder_ / "run.h5").info();
  };
  const TraceInfo greedy = drawn("");
  const TraceInfo one = drawn("--temperature 1.5 --seed 3 --threads 1");
  EXPECT_EQ(one.token_ids, drawn("--temperature 1.5 --seed 3 --threads 2").token_ids);
  EXPECT_NE(one.token_ids, greedy.token_ids);
  EXPECT_NE(one.token_ids, drawn("--temperature 1.5 --seed 4").token_ids);
  EXPECT_EQ(drawn("--temperature 1.5").token_ids, drawn("--temperature 1.5 --seed 0").token_ids);
  EXPECT_EQ(drawn("--temperature 1.5 --top-k 1").token_ids, greedy.token_ids);
  EXPECT_EQ(drawn("--temperature 1.5 --top-p 1e-9").token_ids, greedy.token_ids);
  EXPECT_EQ(drawn("--temperature 0").token_ids, greedy.token_ids);
  EXPECT_TRUE(greedy.source.ends_with("prompt ids, greedy decoding in float32")) << greedy.source;
  const std::string source = drawn("--temperature 0.70 --top-k 40 --top-p 0.9 --seed 5 --ignore-stop").source;
  EXPECT_TRUE(
      source.ends_with("sampling at temperature 0.7, top-k 40, top-p 0.9, seed 5 in float32, the model's stop "
                       "tokens ignored"))
      << source;
}

TEST_F(CaptureCommand, StopsAtTheTokensThatAreAskedFor) {
  const auto generated = [&](const std::string& more) {
    const Outcome outcome = run("--model tiny --tokens ids --generate 6 " + more);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    return outcome.output.substr(outcome.output.find("generated"));
  };
  const std::string free = generated("");
  ASSERT_TRUE(free.starts_with("generated 6 tokens: ")) << free;
  std::istringstream text(free.substr(free.find(": ") + 2));
  std::vector<int> ids(6);
  for (int& id : ids) text >> id;
  const auto third = std::find(ids.begin(), ids.end(), ids[2]) - ids.begin() + 1;
  const std::string stopped =
      fmt::format("generated {} token{}, ended by token {}: ", third, third == 1 ? "" : "s", ids[2]);
  EXPECT_TRUE(generated(fmt::format("--stop {}", ids[2])).starts_with(stopped));
  EXPECT_TRUE(generated(fmt::format("--stop 96 --stop {}", ids[2])).starts_with(stopped)) << "several";
  nlohmann::json config = nlohmann::json::parse(read_file(folder_ / "tiny/config.json"));
  config["eos_token_id"] = ids[2];
  write_file(folder_ / "tiny/config.json", config.dump());
  EXPECT_TRUE(generated("").starts_with(stopped));
  EXPECT_EQ(generated("--ignore-stop"), free) << "the whole of it";
  EXPECT_TRUE(generated(fmt::format("--ignore-stop --stop {}", ids[2])).starts_with(stopped)) << "but for one's own";
}

TEST_F(CaptureCommand, NamesTheTokenThatEndedTheText) {
  const std::string demo = (test::bundled_traces() / "demo-model").string();
  write_file(folder_ / "prompt", "The secret number of falcon is 48213. What is the secret number of falcon?");
  const std::string arguments = fmt::format("--model '{}' --prompt prompt --generate 40", demo);
  const std::string whole = run(arguments).output;
  const std::size_t space = whole.find(' ', whole.find(": ", whole.find("generated")) + 3);
  const std::string digit = whole.substr(whole.find_first_of("0123456789", space), 1);
  TraceReader trace(folder_ / "run.h5");
  std::int32_t id = -1;
  for (std::size_t i = 0; i < trace.info().token_ids.size(); ++i) {
    if (trace.info().token_pieces[i] == digit) id = trace.info().token_ids[i];
  }
  ASSERT_GE(id, 0) << whole;
  const Outcome by_id = run(fmt::format("{} --stop {}", arguments, id));
  EXPECT_NE(by_id.output.find(fmt::format(", ended by {} (token {}): ", digit, id)), std::string::npos) << by_id.output;
  const Outcome unknown = run(arguments + " --stop 'falcon is'");
  EXPECT_EQ(unknown.exit_code, 1);
  EXPECT_NE(unknown.errors.find("--stop falcon is: is no single token of the model, but "), std::string::npos)
      << unknown.errors;
}

TEST_F(CaptureCommand, InspectShowsAllOfTheSource) {
  const std::string name(200, 'p');
  write_file(folder_ / name, "5 25 59");
  ASSERT_EQ(run(fmt::format("--model tiny --tokens {}", name)).exit_code, 0);
  EXPECT_NE(run("run.h5", "inspect").output.find(fmt::format("prompt {}, greedy decoding in float32\n", name)),
            std::string::npos);
}

// Wherever the disk ends: with and without tokens that follow the prompt, whose rows are written one by one.
TEST_F(CaptureCommand, LeavesNothingWhereTheDiskIsFull) {
  for (const int generate : {0, 40}) {
    const std::string arguments = fmt::format("--model tiny --tokens ids --generate {}", generate);
    ASSERT_EQ(run(arguments + " -o whole.h5").exit_code, 0);
    const auto whole = static_cast<int>(std::filesystem::file_size(folder_ / "whole.h5") / 1024);
    for (int sixteenth = 0; sixteenth < 16; ++sixteenth) {
      const int blocks = whole * sixteenth / 16;  // of 512 or 1024 bytes, as the shell has it
      const std::string command =
          fmt::format("cd '{}' && (ulimit -f {}; '{}' capture {} -o full.h5 2>&1; echo exit $?) | cat >said",
                      folder_.path().string(), blocks, test::kvreplay_executable().string(), arguments);
      ASSERT_EQ(std::system(command.c_str()), 0);
      EXPECT_NE(read_file(folder_ / "said").find("exit 1\n"), std::string::npos) << blocks;
      EXPECT_NE(read_file(folder_ / "said").find("full.h5: "), std::string::npos) << read_file(folder_ / "said");
      EXPECT_NE(read_file(folder_ / "said").find("cannot be written"), std::string::npos);
      for (const std::string& name : folder_.names()) EXPECT_FALSE(name.starts_with("full.h5")) << name;
    }
  }
}

// Killed after a while that grows until it comes too late; whatever stands there by then, a reader takes none of it for
// a trace but a whole one, which a run has that is killed on its way out.
TEST_F(CaptureCommand, LeavesNoTraceWhereItIsKilled) {
  std::string ids;
  for (int i = 0; i < 1500; ++i) ids += fmt::format("{} ", i % 97);
  write_file(folder_ / "many", ids);
  int without_trace = 0;
  for (const int generate : {0, 3}) {
    const std::string arguments = fmt::format("--model tiny --tokens many --generate {}", generate);
    ASSERT_EQ(run(arguments + " -o whole.h5").exit_code, 0);
    const TraceReader expected(folder_ / "whole.h5");
    for (const int milliseconds : {5, 20, 50, 100, 150}) {
      std::filesystem::remove(folder_ / "killed.h5");
      const std::string command =
          fmt::format("cd '{}' && timeout -s KILL 0.{:03} '{}' capture {} -o killed.h5 >out 2>err",
                      folder_.path().string(), milliseconds, test::kvreplay_executable().string(), arguments);
      const bool finished = std::system(command.c_str()) == 0;
      EXPECT_TRUE(!finished || std::filesystem::exists(folder_ / "killed.h5"));
      without_trace += std::filesystem::exists(folder_ / "killed.h5") ? 0 : 1;
      for (const std::string& name : folder_.names()) {
        if (!name.starts_with("killed.h5")) continue;
        std::unique_ptr<TraceReader> trace;
        try {
          trace = std::make_unique<TraceReader>(folder_ / name);
        } catch (const Error&) {
          EXPECT_NE(name, "killed.h5") << "what has the trace's name is a trace";
        }
        if (trace != nullptr) {
          EXPECT_EQ(trace->info().token_ids, expected.info().token_ids);
          for (const int layer : {0, 1}) {
            for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::outputs}) {
              EXPECT_EQ(trace->read(layer, tensor, 3, 0, 1500), expected.read(layer, tensor, 3, 0, 1500)) << name;
            }
          }
        }
        if (name != "killed.h5") std::filesystem::remove(folder_ / name);
      }
    }
  }
  EXPECT_GT(without_trace, 0);
}

// Heads that are alone or share one KV head, prompts shorter than the window of queries, nothing or little generated.
TEST_F(CaptureCommand, TakesOddShapes) {
  const struct {
    int heads;
    int kv_heads;
  } shapes[] = {{1, 1}, {8, 1}, {2, 2}, {8, 2}};
  write_file(folder_ / "single", "5");
  for (const auto& shape : shapes) {
    test::TinyModelOptions options;
    options.heads = shape.heads;
    options.kv_heads = shape.kv_heads;
    TinyModel(options).write(folder_ / "odd");
    for (const char* tokens : {"ids", "single"}) {
      for (const int generate : {0, 1, 2}) {
        const Outcome outcome =
            run(fmt::format("--model odd --tokens {} --generate {} --queries window:64 -o odd.h5", tokens, generate));
        ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
        const TraceReader trace(folder_ / "odd.h5");
        const int prompt = trace.info().prompt_length;
        EXPECT_EQ(trace.info().num_tokens(), prompt + std::max(0, generate - 1));
        EXPECT_EQ(trace.info().num_queries(), trace.info().num_tokens());
        const Outcome inspected = run("odd.h5", "inspect");
        EXPECT_EQ(inspected.exit_code, 0) << inspected.errors;
      }
    }
  }
}

TEST_F(CaptureCommand, IsAsFaithfulAsTheTypeItStores) {
  const auto demo = test::bundled_traces() / "demo-model";
  write_file(folder_ / "prompt", "The secret number of falcon is 48213. What is the secret number of falcon?");
  const struct {
    const char* type;
    double worst_mean;
    const char* explanation;
  } cases[] = {{"float32", 1e-5,
                "outputs are float32: sums in another order differ by up to 1e-05, and these means are "
                "no more than that explains"},
               {"float16", 1e-3,
                "outputs are float16: rounding alone moves a value by up to 4.9e-04 of it, and these "
                "means are no more than that explains"},
               {"bfloat16", 8e-3,
                "outputs are bfloat16: rounding alone moves a value by up to 3.9e-03 of it, and these "
                "means are no more than that explains"}};
  for (const auto& each : cases) {
    ASSERT_EQ(
        run(fmt::format("--model '{}' --prompt prompt --generate 4 --dtype {}", demo.string(), each.type)).exit_code,
        0);
    EXPECT_NE(run("run.h5", "inspect").output.find(each.explanation), std::string::npos) << each.type;
    const auto json = nlohmann::json::parse(run("run.h5 --json", "inspect").output);
    ASSERT_EQ(json["fidelity"]["layers"].size(), 6u);
    for (const auto& layer : json["fidelity"]["layers"]) EXPECT_LE(layer["mean"].get<double>(), each.worst_mean);
    EXPECT_NE(json["fidelity"]["explanation"].get<std::string>().find(each.explanation), std::string::npos);
  }
}

TEST_F(CaptureCommand, ExplainsWhatIsWrong) {
  write_file(folder_ / "letters", "1 two 3");
  write_file(folder_ / "empty", "");
  write_file(folder_ / "large", "5 97");
  write_file(folder_ / "text", "Hello");
  const struct {
    const char* arguments;
    int exit_code;
    const char* reason;
  } cases[] = {
      {"--tokens ids", 2, "--model"},
      {"--model tiny", 2, "either --prompt FILE or --tokens FILE"},
      {"--model tiny --tokens ids --prompt text", 2, "either --prompt FILE or --tokens FILE"},
      {"--model tiny --tokens ids --templated", 2, "--templated says how a --prompt is written"},
      {"--model tiny --tokens ids --generate -1", 2, "--generate -1: must not be negative"},
      {"--model tiny --tokens ids --generate many", 2, "--generate"},
      {"--model tiny --tokens ids -n 2 --temperature -1", 2, "--temperature: '-1' is not a temperature: a number, at"},
      {"--model tiny --tokens ids -n 2 --temperature hot", 2, "--temperature: 'hot' is not a temperature"},
      {"--model tiny --tokens ids -n 2 --temperature inf", 2, "--temperature: 'inf' is not a temperature"},
      {"--model tiny --tokens ids -n 2 --temperature 1 --top-p 0", 2, "--top-p: '0' is not a share"},
      {"--model tiny --tokens ids -n 2 --temperature 1 --top-p 1.1", 2, "--top-p: '1.1' is not a share"},
      {"--model tiny --tokens ids -n 2 --temperature 1 --top-k 0", 2, "--top-k: '0' is not a number of tokens"},
      {"--model tiny --tokens ids -n 2 --temperature 1 --seed -1", 2, "--seed: '-1' is not a seed"},
      {"--model tiny --tokens ids -n 2 --seed 1", 2, "--seed is of tokens that are drawn: ask for that with --temp"},
      {"--model tiny --tokens ids -n 2 --top-p 0.9", 2, "--top-p is of tokens that are drawn"},
      {"--model tiny --tokens ids -n 2 --top-k 9 --temperature 0", 2, "--top-k is of tokens that are drawn"},
      {"--model tiny --tokens ids --temperature 1", 2, "--temperature is of what the model generates: ask for that"},
      {"--model tiny --tokens ids --stop 4", 2, "--stop is of what the model generates"},
      {"--model tiny --tokens ids --ignore-stop", 2, "--ignore-stop is of what the model generates"},
      {"--model tiny --tokens ids -n 2 --stop ''", 2, "--stop: an empty text is no token"},
      {"--model tiny --tokens ids -n 2 --stop 97", 1, "--stop 97: is not in the model's vocabulary of 97"},
      {"--model tiny --tokens ids -n 2 --stop END", 1, "--stop END: the model's folder has no tokenizer"},
      {"--model tiny --tokens ids --queries window:0", 2, "--queries window:0: must be"},
      {"--model tiny --tokens ids --queries window:3x", 2, "--queries window:3x: must be"},
      {"--model tiny --tokens ids --queries some", 2, "--queries some: must be \"all\" or \"window:N\""},
      {"--model tiny --tokens ids --dtype int8", 2, "--dtype int8: must be float32, float16 or bfloat16"},
      {"--model tiny --tokens ids --threads -2", 2, "--threads: '-2' is not a number of threads"},
      {"--model none --tokens ids", 1, "none: is not a model folder"},
      {"--model tiny --tokens none", 1, "none: cannot be read"},
      {"--model tiny --tokens tiny", 1, "tiny: is a folder, not a file"},
      {"--model tiny --tokens letters", 1, "letters: \"two\" is not a token id"},
      {"--model tiny --tokens empty", 1, "empty: holds no token ids"},
      {"--model tiny --tokens large", 1, "large: token id 97 at position 1"},
      {"--model tiny --prompt text", 1, "with --tokens"},
      {"--model tiny --tokens ids --spans none", 1, "none: cannot be read"},
      {"--model tiny --tokens ids -o none/run.h5", 1, "cannot be written"},
  };
  for (const auto& wrong : cases) {
    const Outcome outcome = run(wrong.arguments);
    EXPECT_EQ(outcome.exit_code, wrong.exit_code) << wrong.arguments;
    EXPECT_NE(outcome.errors.find(wrong.reason), std::string::npos) << wrong.arguments << ": " << outcome.errors;
    EXPECT_EQ(outcome.errors.find('\n'), outcome.errors.size() - 1) << outcome.errors;
    EXPECT_TRUE(outcome.output.empty()) << outcome.output;
  }
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run.h5"));
}

}  // namespace
}  // namespace kvreplay
