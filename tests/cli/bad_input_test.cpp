// What users hand in by mistake: each ends in one line that says what, where and what to do, and nothing is written.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "support/places.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
#include "support/tiny_model.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::RandomTrace;
using testing::AllOf;
using testing::HasSubstr;

class BadTrace : public test::Commands {
 protected:
  BadTrace() { RandomTrace{}.write(folder_ / "run.h5"); }

  // Both commands that read traces refuse it, and an earlier results file survives.
  void expect_refused(const std::vector<std::string>& reasons, const std::string& policy = "recent") {
    test::write_file(folder_ / "results.h5", "precious");
    refuse({"inspect", "run.h5"}, 1, reasons);
    refuse(test::words("replay run.h5 --capacity 40 -o results.h5 --policy " + policy), 1, reasons);
  }

  void change(const std::function<void(std::int64_t)>& how) {
    RandomTrace{}.write(folder_ / "run.h5");
    test::edit(folder_ / "run.h5", how);
  }
};

TEST_F(BadTrace, Missing) {
  std::filesystem::remove(folder_ / "run.h5");
  expect_refused({"run.h5: cannot be opened: No such file or directory"});
}

TEST_F(BadTrace, AFolder) { refuse({"inspect", "."}, 1, {"it is a folder"}); }

TEST_F(BadTrace, Truncated) {
  std::filesystem::resize_file(folder_ / "run.h5", std::filesystem::file_size(folder_ / "run.h5") / 2);
  expect_refused({"run.h5: ", "truncated"});
}

TEST_F(BadTrace, NotHDF5) {
  test::write_file(folder_ / "run.h5", "trace,policy\n");
  expect_refused({"run.h5: ", "not an HDF5 file"});
}

TEST_F(BadTrace, NotATrace) {
  change([](auto file) { test::set_string(file, "/", "format", "kvreplay-results"); });
  expect_refused({"run.h5: ", "is not a kvtrace file"});
}

TEST_F(BadTrace, Unfinished) {
  change([](auto file) { test::remove_attribute(file, "/", "complete"); });
  expect_refused({"run.h5: ", "unfinished capture", "capture it again"});
}

TEST_F(BadTrace, OfAFutureVersion) {
  change([](auto file) { test::set_int(file, "/", "format_version", 7); });
  expect_refused({"run.h5: ", "version 7", "update kvreplay"});
}

// What no replay is right about yet, is refused; inspect shows it.
TEST_F(BadTrace, WithLayersThatReplaysCannotTakeIntoAccount) {
  const auto expect_only_shown = [&](const std::string& reason, const std::function<void(std::int64_t)>& how) {
    change(how);
    test::write_file(folder_ / "results.h5", "precious");
    EXPECT_EQ(run({"inspect", "run.h5"}).exit_code, 0) << reason;
    refuse(test::words("replay run.h5 --capacity 40 -o results.h5 --policy recent"), 1,
           {"run.h5: " + reason + ", which replays cannot take into account"});
  };
  const auto zeros = [](auto file, const std::string& path, const std::vector<Index>& shape) {
    Index count = 1;
    for (const Index extent : shape) count *= extent;
    test::replace_floats(file, path, shape, std::vector<float>(static_cast<std::size_t>(count)));
  };
  expect_only_shown("/layers/2: is missing, as in models whose layers do not all attend",
                    [](auto file) { test::set_int(file, "/model", "num_layers", 3); });
  expect_only_shown("/layers/1: reads the cache of layer 0 (cache_of)", [](auto file) {
    test::set_int(file, "/layers/1", "cache_of", 0);
    test::remove(file, "/layers/1/keys");
    test::remove(file, "/layers/1/values");
  });
  expect_only_shown("/layers/1: has its values in its keys (values_in_keys)", [](auto file) {
    test::set_int(file, "/layers/1", "values_in_keys", 8);
    test::remove(file, "/layers/1/values");
  });
  expect_only_shown("/layers/0: has key_dim 4 where the model's head_dim is 8", [&](auto file) {
    test::set_int(file, "/layers/0", "key_dim", 4);
    zeros(file, "/layers/0/keys", {2, 70, 4});
    zeros(file, "/layers/0/queries", {4, 70, 4});
  });
  expect_only_shown("/layers/0: has num_key_value_heads 1 where the model's num_key_value_heads is 2", [&](auto file) {
    test::set_int(file, "/layers/0", "num_key_value_heads", 1);
    zeros(file, "/layers/0/keys", {1, 70, 8});
    zeros(file, "/layers/0/values", {1, 70, 8});
  });
  expect_only_shown("/layers/1: has a gate between its outputs and the projection (output_gate)", [&](auto file) {
    zeros(file, "/layers/1/output_gate", {4, 70});
  });
  expect_only_shown("/layers/1: has a norm before its projection (projection_norm)", [&](auto file) {
    zeros(file, "/layers/1/projection_norm", {32});
    test::set_double(file, "/layers/1/projection_norm", "epsilon", 1e-6);
  });
}

TEST_F(BadTrace, Inconsistent) {
  change([](auto file) { test::set_int(file, "/model", "num_key_value_heads", 3); });
  expect_refused({"run.h5: /model: ", "4 query heads cannot share 3 key/value heads"});
  change([](auto file) {
    test::set_int(file, "/", "format_version", 1);
    test::set_int(file, "/model", "num_layers", 3);
  });
  expect_refused({"run.h5: /layers/2: is missing, although /model counts 3 layers"});
  change([](auto file) { test::replace_floats(file, "/layers/1/keys", {2, 70, 4}, std::vector<float>(560)); });
  expect_refused({"run.h5: /layers/1/keys: has the shape (2, 70, 4)", "(2, 70, 8)"});
  change([](auto file) { test::replace_ints(file, "/query_positions", {0, 1, 2, 900}); });
  expect_refused({"run.h5: /query_positions: ", "900", "70 tokens"});
}

TEST_F(BadTrace, NotANumberIsNamedWithLayerHeadAndPosition) {
  change([](auto file) { test::poke(file, "/layers/1/values", {1, 37, 3}, std::numeric_limits<float>::quiet_NaN()); });
  expect_refused({"run.h5: /layers/1/values: NaN at layer 1, head 1, position 37"});
  change([](auto file) { test::poke(file, "/layers/0/queries", {3, 65, 0}, std::numeric_limits<float>::infinity()); });
  refuse(test::words("replay run.h5 --policy recent --capacity 40"), 1,
         {"run.h5: /layers/0/queries: infinity at layer 0, head 3, position 65"});
}

TEST_F(BadTrace, DamageIsFoundOnRequest) {
  change([](auto file) { test::poke(file, "/layers/1/values", {1, 37, 3}, 2.5f); });
  const test::Outcome outcome = run({"inspect", "run.h5", "--verify"});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, HasSubstr("run.h5: /layers/1/values: does not match its digest"));
  EXPECT_THAT(outcome.output, HasSubstr("mismatch"));
}

TEST_F(BadTrace, WithoutEvaluationQueries) {
  RandomTrace{.num_tokens = 60}.write(folder_ / "run.h5");
  refuse(test::words("replay run.h5 --policy recent --capacity 40"), 1,
         {"run.h5: no query at or after position 60", "--generate 2 or more", "--evict-at"});
  EXPECT_THAT(succeed({"inspect", "run.h5"}).output, HasSubstr("capture --generate"));
  succeed(test::words("replay run.h5 --policy recent --capacity 40 --evict-at 50"));
}

TEST_F(BadTrace, WithoutTheQueriesThatAPolicyNeeds) {
  RandomTrace{.captured_prompt_queries = 8, .attention_mass = false}.write(folder_ / "run.h5");
  refuse(test::words("replay run.h5 --policy snapkv --capacity 40"), 1,
         {"snapkv needs the last 32 queries", "holds 8 of them", "--queries window:32"});
  refuse(test::words("replay run.h5 --policy h2o --capacity 40"), 1,
         {"h2o needs", "--queries all", "attention_mass=True"});
  const test::Outcome outcome = succeed(test::words("replay run.h5 --policy h2o recent --capacity 40"));
  EXPECT_THAT(outcome.errors, HasSubstr("note: run.h5: left out: h2o needs"));
  EXPECT_THAT(outcome.output, HasSubstr("\nrecent "));
  refuse(test::words("replay run.h5 --policy h2o recent --capacity 40 --strict"), 1, {"h2o needs"});
  succeed(test::words("replay run.h5 --policy snapkv(window=8) --capacity 40"));
}

TEST_F(BadTrace, WithoutQueriesBeforeAnEarlyEviction) {
  RandomTrace{.captured_prompt_queries = 8}.write(folder_ / "run.h5");
  refuse(test::words("replay run.h5 --policy snapkv --capacity 40 --evict-at 45"), 1,
         {"snapkv needs the last 32 queries before position 45, and the trace holds none of them",
          "capture with --queries window:47 or all"});
  refuse(test::words("replay run.h5 --policy tova --capacity 40 --evict-at 45"), 1,
         {"tova needs the last query before position 45, and the trace holds none;", "window:16 or all"});
}

TEST_F(BadTrace, AmongGoodOnesLosesNothing) {
  test::write_file(folder_ / "results.h5", "precious");
  test::write_file(folder_ / "bad.h5", "nonsense");
  refuse(test::words("replay run.h5 bad.h5 --policy recent --capacity 40 -o results.h5 --csv results.csv"), 1,
         {"bad.h5: ", "not an HDF5 file"});
}

TEST_F(BadTrace, CapacityBelowTheWindow) {
  refuse(test::words("replay run.h5 --policy snapkv --capacity 16"), 1,
         {"run.h5: capacity 16 is below the 32 positions that snapkv always keeps"});
  refuse(test::words("replay run.h5 --policy snapkv --capacity 40,16 --strict"), 1,
         {"run.h5: capacity 16 is below the 32 positions that snapkv always keeps"});
  EXPECT_EQ(succeed(test::words("replay run.h5 --policy snapkv --capacity 40,16")).errors,
            "note: run.h5: left out: snapkv at 16: capacity 16 is below the 32 positions that snapkv always keeps; ask "
            "for a larger capacity or protect fewer\n");
  refuse(test::words("replay run.h5 --policy snapkv --capacity 25%"), 1, {"capacity 25% (15 of 60 positions)"});
}

TEST_F(BadTrace, CapacityAboveThePromptKeepsAllAndSaysSo) {
  const test::Outcome above = succeed(test::words("replay run.h5 --policy restkv --capacity 61"));
  EXPECT_THAT(above.errors, HasSubstr("note: run.h5: capacity 61 exceeds the 60 positions before the eviction"));
  EXPECT_THAT(above.output, HasSubstr("100.0 %"));
  EXPECT_THAT(succeed(test::words("replay run.h5 --policy restkv --capacity 100%")).errors,
              HasSubstr("capacity 100% is all the 60 positions"));
  EXPECT_EQ(succeed(test::words("replay run.h5 --policy restkv --capacity 59")).errors, "");
}

TEST_F(BadTrace, EvictionOutsideTheTrace) {
  refuse(test::words("replay run.h5 --policy recent --capacity 40 --evict-at 71"), 1,
         {"eviction position 71 is outside the trace's 70 tokens"});
  refuse(test::words("replay run.h5 --policy recent --capacity 40 --evict-at 70"), 1, {"no query at or after"});
}

TEST_F(BadTrace, KeptSetsThatDoNotFit) {
  succeed(test::words("replay run.h5 --policy recent --capacity 40 --kept kept.h5"));
  RandomTrace{.num_layers = 3}.write(folder_ / "deeper.h5");
  refuse(test::words("replay deeper.h5 --policy kept(file=kept.h5) --capacity 40"), 1, {"kept.h5: /kept/0", "4 sets"});
  refuse(test::words("replay run.h5 --policy kept(file=kept.h5) --capacity 40 --evict-at 50"), 1, {"position 60"});
  refuse(test::words("replay run.h5 --policy kept(file=none.h5) --capacity 40"), 1, {"none.h5: cannot be opened"});
  refuse(test::words("replay run.h5 --policy kept(file=run.h5) --capacity 40"), 1, {"run.h5: holds no kept sets"});
  refuse(test::words("replay run.h5 --policy kept(file=kept.h5,index=5) --capacity 40"), 1, {"/kept/5 does not exist"});
}

TEST_F(BadTrace, KeptSetsOfAnotherTrace) {
  RandomTrace{.first_token = 100}.write(folder_ / "other.h5");
  // Two traces in one file of kept sets, by either command.
  for (const std::string command : {"replay", "sweep"}) {
    succeed(test::words(command + " run.h5 other.h5 --policy recent --capacity 40 -o results.h5 --kept kept.h5"));
    const std::string reason = "which has other tokens before the eviction; name kept sets of this trace";
    refuse(test::words("replay other.h5 --policy kept(file=kept.h5) --capacity 40"), 1,
           {"kept.h5: /kept/0: is of run.h5, " + reason});
    refuse(test::words("replay run.h5 --policy kept(file=kept.h5,index=1) --capacity 40"), 1,
           {"kept.h5: /kept/1: is of other.h5, " + reason});
    EXPECT_EQ(succeed(test::words("replay other.h5 --policy kept(file=kept.h5,index=1) --capacity 40")).errors, "");
  }
  // What can be measured is.
  const test::Outcome some = succeed(test::words("replay other.h5 --policy kept(file=kept.h5) recent --capacity 40"));
  EXPECT_THAT(some.errors, HasSubstr("kept.h5: /kept/0: is of run.h5, which has other tokens"));

  std::filesystem::copy_file(folder_ / "run.h5", folder_ / "copy.h5");
  EXPECT_EQ(succeed(test::words("replay copy.h5 --policy kept(file=kept.h5) --capacity 40")).errors, "");
  RandomTrace{.seed = 2}.write(folder_ / "again.h5");
  EXPECT_THAT(succeed(test::words("replay again.h5 --policy kept(file=kept.h5) --capacity 40")).errors,
              HasSubstr("kept.h5: its kept sets are of another run of the same tokens, run.h5"));
}

TEST_F(BadTrace, KeptSetsThatDoNotSayOfWhichTrace) {
  const std::string data = test::test_data().string();
  const std::string file = data + "/reference-needle-live.h5";
  const test::Outcome outcome = succeed(test::words(fmt::format(
      "replay {}/reference-needle.h5 --policy kept(file={}) kept(file={},index=1) --capacity 40", data, file, file)));
  const std::string note = file + ": does not say which tokens its kept sets are of (tokens_digest), so whether";
  EXPECT_THAT(outcome.errors, HasSubstr(note));
  EXPECT_EQ(outcome.errors.find(note), outcome.errors.rfind(note)) << "once for all of the file's sets";
}

class BadModel : public test::Commands {
 protected:
  BadModel() {
    test::TinyModel({}).write(folder_ / "model");
    test::write_file(folder_ / "ids", "5 25 59 10 72");
  }

  void expect_refused(const std::vector<std::string>& reasons) {
    test::write_file(folder_ / "run.h5", "precious");
    refuse(test::words("capture --model model --tokens ids --generate 2 -o run.h5"), 1, reasons);
  }

  void change_config(const std::function<void(json&)>& how) {
    json config = json::parse(test::read_file(folder_ / "model" / "config.json"));
    how(config);
    test::write_file(folder_ / "model" / "config.json", config.dump());
  }

  // Changes the header of the weights as how() wants and leaves their bytes as they are.
  void change_header(const std::function<void(json&)>& how) {
    test::TinyModel({}).write(folder_ / "model");
    const std::string bytes = test::read_file(weights_);
    const auto length = static_cast<std::size_t>(*reinterpret_cast<const std::uint64_t*>(bytes.data()));
    json header = json::parse(bytes.substr(8, length));
    how(header);
    test::write_file(weights_, test::safetensors_bytes(header.dump(), bytes.substr(8 + length)));
  }

  const std::filesystem::path weights_ = folder_ / "model" / "model.safetensors";
  const std::string norm_ = "model.layers.1.input_layernorm.weight";
};

TEST_F(BadModel, NoFolderOrNoModelInIt) {
  refuse(test::words("capture --model none --tokens ids"), 1, {"none: "});
  std::filesystem::create_directory(folder_ / "bare");
  refuse(test::words("capture --model bare --tokens ids"), 1, {"bare", "config.json"});
  std::filesystem::remove(weights_);
  expect_refused({"model", "safetensors"});
}

TEST_F(BadModel, MissingShard) {
  std::filesystem::remove(weights_);
  test::TinyModel({}).write(folder_ / "model", 3);
  std::filesystem::remove(folder_ / "model" / "model-00002-of-00003.safetensors");
  expect_refused({"model-00002-of-00003.safetensors: the shard is missing"});
}

TEST_F(BadModel, MissingTensor) {
  change_header([this](json& header) {
    header["something.else"] = header[norm_];
    header.erase(norm_);
  });
  expect_refused({"model", norm_});
}

TEST_F(BadModel, MisshapenTensor) {
  change_header([this](json& header) { header[norm_]["shape"] = {6, 8}; });
  expect_refused({"model.safetensors: tensor " + norm_ + " has shape [6, 8]; expected [48]"});
}

TEST_F(BadModel, UnsupportedDtype) {
  change_header([this](json& header) { header[norm_]["dtype"] = "I32"; });
  expect_refused({norm_, "I32", "supported are F32, F16 and BF16"});
}

TEST_F(BadModel, UnsupportedArchitecture) {
  change_config([](json& config) { config["architectures"] = {"MambaForCausalLM"}, config["model_type"] = "mamba"; });
  expect_refused({"config.json", "not supported"});
}

TEST_F(BadModel, HeaderThatLies) {
  const auto offsets = [this](std::uint64_t begin, std::uint64_t end) {
    change_header([&](json& header) { header[norm_]["data_offsets"] = {begin, end}; });
  };
  offsets(0, std::uint64_t{1} << 40);
  expect_refused({"model.safetensors", norm_});
  offsets(1000, 8);
  expect_refused({"model.safetensors", norm_});
  offsets(std::numeric_limits<std::uint64_t>::max() - 8, std::numeric_limits<std::uint64_t>::max());
  expect_refused({"model.safetensors", norm_});
  change_header([this](json& header) { header[norm_]["shape"] = {std::uint64_t{1} << 62, 8}; });
  expect_refused({"model.safetensors", norm_});
  test::write_file(weights_, std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8) + "{}");
  expect_refused({"model.safetensors", "header"});
  test::write_file(weights_, "short");
  expect_refused({"model.safetensors", "too short"});
}

TEST_F(BadModel, WeightsThatAreNotNumbers) {
  test::TinyModel model({});
  model.set_weight(norm_, 3, std::numeric_limits<double>::quiet_NaN());
  model.write(folder_ / "model");
  expect_refused({"layer 1"});
}

TEST_F(BadModel, TokenIdsOutOfRange) {
  test::write_file(folder_ / "ids", "5 97 3");
  expect_refused({"ids: token id 97 at position 1 is not in the model's vocabulary of 97"});
  test::write_file(folder_ / "ids", "5 -1 3");
  expect_refused({"ids: \"-1\" is not a token id"});
  test::write_file(folder_ / "ids", "5 99999999999");
  expect_refused({"ids: \"99999999999\" is not a token id"});
}

TEST_F(BadModel, EmptyPrompt) {
  test::write_file(folder_ / "ids", " \n");
  expect_refused({"ids: holds no token ids"});
  test::write_file(folder_ / "empty.txt", "");
  const std::string demo = (test::bundled_traces() / "demo-model").string();
  refuse({"capture", "--model", demo, "--prompt", "empty.txt"}, 1, {"empty.txt: the prompt is empty"});
  refuse({"capture", "--model", demo, "--prompt", "-"}, 1, {"standard input: the prompt is empty"});
}

TEST_F(BadModel, PromptThatIsNotText) {
  test::write_file(folder_ / "latin1.txt",
                   "Gr\xfc\xdf"
                   "e");
  refuse({"capture", "--model", (test::bundled_traces() / "demo-model").string(), "--prompt", "latin1.txt"}, 1,
         {"latin1.txt: byte 2 is not UTF-8"});
}

TEST_F(BadModel, TextForAModelWithoutATokenizer) {
  test::write_file(folder_ / "prompt.txt", "Hello");
  refuse(test::words("capture --model model --prompt prompt.txt"), 1, {"--tokens"});
}

TEST_F(BadModel, PromptBeyondTheModelsPositionsIsWarnedOf) {
  change_config([](json& config) { config["max_position_embeddings"] = 4; });
  const test::Outcome outcome = succeed(test::words("capture --model model --tokens ids --generate 2 -o run.h5"));
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("warning: "), HasSubstr("6 positions"), HasSubstr("made for 4")));
  succeed({"inspect", "run.h5", "--verify"});
}

TEST_F(BadModel, TooFewTokensGeneratedToMeasureWithIsTold) {
  for (const char* generate : {"0", "1"}) {
    const auto outcome = succeed({"capture", "--model", "model", "--tokens", "ids", "--generate", generate});
    EXPECT_THAT(outcome.errors, AllOf(HasSubstr("note: the trace has no query after the prompt"),
                                      HasSubstr("--generate 2 or more adds some")));
  }
  const auto outcome = succeed(test::words("capture --model model --tokens ids --generate 2"));
  EXPECT_EQ(outcome.errors.find("note: "), std::string::npos) << outcome.errors;

  // Where the model has nothing to say, asking for more of it is no advice.
  const int first = std::stoi(outcome.output.substr(outcome.output.rfind(": ") + 2));
  change_config([&](json& config) { config["eos_token_id"] = first; });
  const auto ended = succeed(test::words("capture --model model --tokens ids --generate 500"));
  EXPECT_THAT(ended.errors,
              AllOf(HasSubstr("note: the trace has no query after the prompt"),
                    HasSubstr("the first token ended the text; go on with --ignore-stop, or replay it with an"),
                    Not(HasSubstr("--generate 2"))));
}

}  // namespace
}  // namespace kvreplay
