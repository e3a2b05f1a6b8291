// Files that the commands write: whole or absent, in the layout that docs/results-format.md promises, and agreeing.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <cmath>
#include <csignal>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/command.h"
#include "hdf5/hdf5.h"
#include "support/random_trace.h"
#include "support/tiny_model.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::RandomTrace;
using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

// Fields of each line; a quoted field may hold commas, quotes and line ends.
std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows = {{""}};
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"' && quoted && i + 1 < text.size() && text[i + 1] == '"') {
      rows.back().back() += text[++i];
    } else if (c == '"') {
      quoted = !quoted;
    } else if (c == ',' && !quoted) {
      rows.back().emplace_back();
    } else if (c == '\n' && !quoted) {
      rows.push_back({""});
    } else {
      rows.back().back() += c;
    }
  }
  EXPECT_FALSE(quoted);
  rows.pop_back();
  return rows;
}

double mean(const std::vector<float>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
}

class Outputs : public test::Commands {
 protected:
  Outputs() {
    RandomTrace{.spans = {{10, 14, "needle"}, {58, 64, "over the edge"}, {65, 68, "late"}}}.write(folder_ / "run.h5");
  }
  hdf5::File open(const std::string& name) const { return hdf5::File::open(folder_ / name); }
};

TEST_F(Outputs, ResultsHaveTheLayoutThatIsPromised) {
  succeed(
      test::words("replay run.h5 --policy full recent tova random(seed=3) --capacity 20,50% --heads query "
                  "--share max -o results.h5"));
  const hdf5::File file = open("results.h5");
  EXPECT_EQ(file.read_string("/", "format"), "kvreplay-results");
  EXPECT_EQ(file.read_int("/", "format_version"), 3);
  EXPECT_EQ(file.read_int("/", "complete"), 1);
  EXPECT_THAT(file.read_string("/", "created_by"), HasSubstr("kvreplay "));
  EXPECT_EQ(file.list("/results").size(), 7u);  // full once, the others at two capacities
  std::vector<std::int32_t> positions(10);
  std::iota(positions.begin(), positions.end(), 60);
  EXPECT_EQ(file.read_int32s("/evaluation_positions"), positions);
  const struct {
    const char* policy;
    const char* request;
    int capacity;
  } expected[] = {{"full", "all", 60}, {"recent", "20", 20},         {"recent", "50%", 30},        {"tova", "20", 20},
                  {"tova", "50%", 30}, {"random(seed=3)", "20", 20}, {"random(seed=3)", "50%", 30}};
  for (int i = 0; i < 7; ++i) {
    const std::string group = fmt::format("/results/{}", i);
    EXPECT_EQ(file.read_string(group, "trace"), "run.h5");
    EXPECT_EQ(file.read_string(group, "policy"), expected[i].policy);
    EXPECT_EQ(file.read_string(group, "capacity_request"), expected[i].request);
    EXPECT_EQ(file.read_int(group, "capacity"), expected[i].capacity);
    EXPECT_EQ(file.read_double(group, "kept"), expected[i].capacity);
    EXPECT_EQ(file.read_int(group, "evict_at"), 60);
    EXPECT_EQ(file.read_string(group, "heads"), "query");
    EXPECT_EQ(file.read_string(group, "share"), "max");
    EXPECT_EQ(file.read_string(group, "model"), "random");
    EXPECT_EQ(file.read_string(group, "trace_digest").size(), 16u);
    EXPECT_EQ(file.read_int(group, "num_layers"), 2);
    EXPECT_EQ(file.read_int(group, "num_query_heads"), 4);
    EXPECT_EQ(file.read_int(group, "prompt_length"), 60);
    EXPECT_EQ(file.read_int(group, "oracle"), 0);
    EXPECT_EQ(file.read_int32s(group + "/evaluation_positions"), positions);
    for (const char* measure : {"head_error", "attention_recall", "cosine"}) {
      EXPECT_THAT(file.dataset(group + "/" + measure).shape(), ElementsAre(2, 4, 10)) << measure;
    }
    EXPECT_THAT(file.dataset(group + "/layer_error").shape(), ElementsAre(2, 10));
    EXPECT_THAT(file.dataset(group + "/span_recall").shape(), ElementsAre(2, 4, 2));
    const auto spans = file.read_labelled_ranges(group + "/spans");
    ASSERT_EQ(spans.size(), 2u) << "a span that begins after the eviction cannot be lost";
    EXPECT_EQ(spans[1].label, "over the edge");
    EXPECT_EQ(spans[1].end, 64);
    EXPECT_THAT(file.list(group + "/spans"), ElementsAre("end", "label", "start"));
    EXPECT_THAT(file.read_int32s(group + "/spans/start"), ElementsAre(10, 58));
    EXPECT_THAT(file.read_strings(group + "/spans/label"), ElementsAre("needle", "over the edge"));
  }
  EXPECT_EQ(file.list("/overlap").size(), 2u);
  EXPECT_EQ(file.read_string("/overlap/1", "capacity_request"), "50%");
  EXPECT_EQ(file.read_string("/overlap/1", "trace"), "run.h5");
  EXPECT_EQ(file.read_int("/overlap/1", "evict_at"), 60);
  EXPECT_THAT(file.read_strings("/overlap/1/policies"), ElementsAre("full", "recent", "tova", "random(seed=3)"));
  EXPECT_THAT(file.dataset("/overlap/1/jaccard").shape(), ElementsAre(4, 4, 2, 4));
  EXPECT_THAT(file.dataset("/overlap/1/containment").shape(), ElementsAre(4, 4, 2, 4));
}

TEST_F(Outputs, RankAgreementIsThereWhereItIsAskedFor) {
  const std::string replay = "replay run.h5 --policy full recent snapkv(window=4) oracle-attention --capacity 20,50% ";
  const test::Outcome without = succeed(test::words(replay + "-o without.h5 --csv without.csv --json without.json"));
  const test::Outcome with =
      succeed(test::words(replay + "--rank-agreement -o with.h5 --csv with.csv --json with.json"));
  EXPECT_THAT(without.output, Not(HasSubstr("Kendall")));
  EXPECT_THAT(with.output, AllOf(HasSubstr("Spearman  Kendall"), HasSubstr("1.000    1.000"),
                                 HasSubstr("how far scores rank positions as oracle-attention does")));
  const hdf5::File results = open("with.h5");
  const hdf5::File bare = open("without.h5");
  for (const std::string& index : results.list("/results")) {
    const std::string group = "/results/" + index;
    const std::string policy = results.read_string(group, "policy");
    const bool ranks = policy != "full" && policy != "recent";
    for (const char* measure : {"/spearman", "/kendall"}) {
      EXPECT_FALSE(bare.exists(group + measure));
      ASSERT_EQ(results.exists(group + measure), ranks) << policy;
      if (!ranks) continue;
      EXPECT_THAT(results.dataset(group + measure).shape(), ElementsAre(2, 4));
      const std::vector<float> numbers = results.read_floats(group + measure);
      EXPECT_EQ(numbers[0], numbers[1]) << "heads that share a set have one order";
      EXPECT_EQ(*std::ranges::min_element(numbers) == 1, policy == "oracle-attention");
    }
    EXPECT_EQ(results.read_floats(group + "/layer_error"), bare.read_floats(group + "/layer_error"));
  }
  const auto rows = parse_csv(test::read_file(folder_ / "with.csv"));
  const auto bare_rows = parse_csv(test::read_file(folder_ / "without.csv"));
  EXPECT_EQ(rows.size() - bare_rows.size(), 2u * 4u * 3u) << "two measures, four settings, two layers and all of them";
  const json document = json::parse(test::read_file(folder_ / "with.json"));
  EXPECT_EQ(document["summary"].size(), rows.size() - 1);
  for (const json& row : document["summary"]) {
    if (row["measure"] != "kendall" || row["policy"] != "oracle-attention") continue;
    EXPECT_EQ(row["worst"], 1.0);
  }
}

TEST_F(Outputs, NotesStandWithTheResultsTheyAreAbout) {
  RandomTrace{.output_projection = false}.write(folder_ / "bare.h5");
  const test::Outcome outcome = succeed(test::words("replay bare.h5 --policy restkv --capacity 40,61 -o results.h5"));
  const hdf5::File file = open("results.h5");
  const std::vector<std::string> notes = file.read_strings("/results/0/notes");
  EXPECT_THAT(notes, Contains(HasSubstr("no output projection")));
  EXPECT_THAT(notes, Contains(HasSubstr("capacity 61 exceeds")));
  for (const std::string& note : notes) EXPECT_THAT(outcome.errors, HasSubstr("note: bare.h5: " + note + "\n"));
  EXPECT_FALSE(file.exists("/results/0/spans"));
  EXPECT_FALSE(file.exists("/results/0/span_recall"));
}

TEST_F(Outputs, TablesAgreeWithResults) {
  succeed(
      test::words("replay run.h5 --policy full snapkv(window=4,kernel=3) recent --capacity 20,50% -o results.h5 "
                  "--csv results.csv --json results.json"));
  const auto rows = parse_csv(test::read_file(folder_ / "results.csv"));
  ASSERT_GT(rows.size(), 1u);
  for (const auto& row : rows) ASSERT_EQ(row.size(), rows[0].size());
  const auto column = [&](const std::string& name) { return std::ranges::find(rows[0], name) - rows[0].begin(); };
  std::map<std::string, std::string> csv_means;  // policy|capacity|layer|measure
  for (std::size_t r = 1; r < rows.size(); ++r) {
    const auto at = [&](const char* name) { return rows[r].at(static_cast<std::size_t>(column(name))); };
    csv_means[at("policy") + "|" + at("capacity_request") + "|" + at("layer") + "|" + at("measure")] = at("mean");
  }
  EXPECT_EQ(csv_means.size(), rows.size() - 1) << "rows that cannot be told apart";

  const json document = json::parse(test::read_file(folder_ / "results.json"));
  EXPECT_EQ(document["summary"].size(), rows.size() - 1);
  EXPECT_EQ(document["traces"][0]["trace"], "run.h5");
  EXPECT_EQ(document["traces"][0]["evaluation_queries"], 10);
  const hdf5::File file = open("results.h5");
  std::size_t compared = 0;
  for (const std::string& index : file.list("/results")) {
    const std::string group = "/results/" + index;
    for (const json& row : document["summary"]) {
      if (row["policy"] != file.read_string(group, "policy")) continue;
      if (row["capacity_request"] != file.read_string(group, "capacity_request")) continue;
      std::vector<float> numbers = file.read_floats(group + "/" + row["measure"].get<std::string>());
      std::string layer = "all";
      if (row["layer"].is_number()) {
        layer = std::to_string(row["layer"].get<int>());
        const std::ptrdiff_t half = static_cast<std::ptrdiff_t>(numbers.size()) / 2;
        const auto first = numbers.begin() + row["layer"].get<int>() * half;
        numbers = {first, first + half};
      }
      EXPECT_DOUBLE_EQ(row["mean"].get<double>(), mean(numbers)) << row;
      const bool error = row["measure"].get<std::string>().ends_with("error");
      const float worst = error ? *std::ranges::max_element(numbers) : *std::ranges::min_element(numbers);
      EXPECT_EQ(row["worst"].get<double>(), static_cast<double>(worst)) << row;
      const std::string key =
          fmt::format("{}|{}|{}|{}", row["policy"].get<std::string>(), row["capacity_request"].get<std::string>(),
                      layer, row["measure"].get<std::string>());
      ASSERT_TRUE(csv_means.contains(key)) << key;
      EXPECT_DOUBLE_EQ(std::stod(csv_means[key]), row["mean"].get<double>()) << key;
      ++compared;
    }
  }
  EXPECT_EQ(compared, document["summary"].size());
  for (const json& pair : document["overlap"]) {
    if (pair["policy"] == pair["other"]) {
      EXPECT_EQ(pair["jaccard"], 1.0);
    }
  }
  EXPECT_EQ(document["overlap"].size(), 2u * 3u * 3u) << "two capacities, three policies";
}

TEST_F(Outputs, KeptSetsHaveTheirLayoutAndReplayToTheSameMeasures) {
  for (const std::string heads : {"query", "kv", "layer"}) {
    succeed({"replay", "run.h5", "--policy", "snapkv(window=4)", "random", "--capacity", "20", "--heads", heads,
             "--kept", "kept.h5", "-o", "first.h5"});
    const hdf5::File kept = open("kept.h5");
    EXPECT_EQ(kept.read_string("/", "format"), "kvreplay-kept");
    EXPECT_EQ(kept.read_int("/", "complete"), 1);
    ASSERT_EQ(kept.list("/kept").size(), 2u);
    const std::size_t sets = heads == "query" ? 8 : 4;
    for (const std::string group : {"/kept/0", "/kept/1"}) {
      EXPECT_EQ(kept.read_string(group, "heads"), heads == "query" ? "query" : "kv");
      EXPECT_EQ(kept.read_int(group, "evict_at"), 60);
      EXPECT_EQ(kept.read_int(group, "capacity"), 20);
      const auto offsets = kept.read_int64s(group + "/offsets");
      const auto positions = kept.read_int32s(group + "/kept");
      ASSERT_EQ(offsets.size(), sets + 1);
      EXPECT_EQ(offsets.front(), 0);
      EXPECT_EQ(offsets.back(), static_cast<std::int64_t>(positions.size()));
      for (std::size_t s = 0; s < sets; ++s) {
        EXPECT_EQ(offsets[s + 1] - offsets[s], 20);
        for (std::int64_t i = offsets[s] + 1; i < offsets[s + 1]; ++i) {
          EXPECT_LT(positions[static_cast<std::size_t>(i - 1)], positions[static_cast<std::size_t>(i)]);
        }
      }
    }
    succeed({"replay", "run.h5", "--policy", "kept(file=kept.h5)", "kept(file=kept.h5,index=1)", "--capacity", "20",
             "-o", "second.h5"});
    const hdf5::File first = open("first.h5");
    const hdf5::File second = open("second.h5");
    for (const std::string index : {"0", "1"}) {
      EXPECT_EQ(second.read_string("/results/" + index, "capacity_request"), "20");
      for (const char* measure : {"head_error", "layer_error", "attention_recall", "cosine", "span_recall"}) {
        const std::string path = "/results/" + index + "/" + measure;
        EXPECT_EQ(first.read_floats(path), second.read_floats(path)) << heads << path;
      }
    }
  }
}

TEST_F(Outputs, InputsAreNeverOverwritten) {
  const std::string replay = "replay run.h5 --policy recent --capacity 20 ";
  succeed(test::words(replay + "--kept kept.h5"));
  for (const char* output : {"-o run.h5", "--csv ./run.h5", "-o same --json same"}) {
    refuse(test::words(replay + output), 2, {"would overwrite"});
  }
  refuse(test::words("replay run.h5 --policy kept(file=kept.h5) --capacity 20 --kept ./kept.h5"), 2,
         {"kept.h5: would overwrite"});
  std::filesystem::create_symlink("run.h5", folder_ / "link.h5");
  refuse(test::words(replay + "-o link.h5"), 2, {"link.h5: would overwrite"});

  test::TinyModel({}).write(folder_ / "model");
  test::write_file(folder_ / "ids", "5 25 59");
  const std::string capture = "capture --model model --tokens ids -o ";
  refuse(test::words(capture + "ids"), 2, {"ids: the trace would overwrite what it is made from"});
  const std::string config = test::read_file(folder_ / "model" / "config.json");
  refuse(test::words(capture + "model/config.json"), 2, {"would overwrite a file of the model"});
  EXPECT_EQ(test::read_file(folder_ / "model" / "config.json"), config);
}

TEST_F(Outputs, OnlyFilesAreReplaced) {
  const std::string replay = "replay run.h5 --policy recent --capacity 20 -o ";
  std::filesystem::create_directory(folder_ / "folder");
  refuse(test::words(replay + "folder"), 1, {"folder: is a folder; name a file to write"});
  refuse(test::words(replay + "missing/results.h5"), 1, {"missing/results.h5: cannot be written: No such file"});
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  refuse(test::words(replay + "pipe"), 1, {"pipe: is a device or a pipe"});
  // What /dev/stdout is: a link to the process's stream.
  std::filesystem::create_symlink("/proc/self/fd/1", folder_ / "stream");
  refuse(test::words(replay + "stream"), 1, {"stream: is a device or a pipe"});
  EXPECT_TRUE(std::filesystem::is_symlink(folder_ / "stream"));
  // A link to a place elsewhere stays one, and the results are there.
  std::filesystem::create_symlink("folder/results.h5", folder_ / "link.h5");
  succeed(test::words(replay + "link.h5"));
  EXPECT_TRUE(std::filesystem::is_symlink(folder_ / "link.h5"));
  EXPECT_EQ(open("folder/results.h5").read_int("/", "complete"), 1);
}

TEST_F(Outputs, AFullDiskLeavesTheOldFileAndNoOther) {
  for (const std::string option : {"-o", "--kept", "--csv", "--json"}) {
    test::write_file(folder_ / "old", "precious");
    const auto before = files();
    const test::Outcome outcome =
        run({.arguments = {"replay", "run.h5", "--policy", "recent", "snapkv", "--capacity", "40", option, "old"},
             .largest_file = 500});
    EXPECT_EQ(outcome.exit_code, 1) << option;
    EXPECT_THAT(outcome.errors, AllOf(HasSubstr("kvreplay: old: "), HasSubstr("cannot be written"),
                                      HasSubstr("File too large"), Not(HasSubstr("tmp-"))))
        << option;
    EXPECT_THAT(outcome.output, HasSubstr("layer error")) << "the table need not be lost";
    EXPECT_THAT(outcome.output, Not(HasSubstr("wrote"))) << option;
    EXPECT_EQ(files(), before) << option;
  }
  test::TinyModel({}).write(folder_ / "model");
  test::write_file(folder_ / "ids", "5 25 59");
  const auto before = files();
  const test::Outcome outcome = run(
      {.arguments = test::words("capture --model model --tokens ids --generate 2 -o run.h5"), .largest_file = 9000});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("run.h5: "), HasSubstr("File too large"), Not(HasSubstr("tmp-"))));
  EXPECT_EQ(files(), before);
}

TEST_F(Outputs, AFolderThatCannotBeWrittenToIsToldBeforeTheWork) {
  ASSERT_EQ(::chmod(folder_.path().c_str(), 0555), 0);
  const auto before = files();
  const test::Outcome outcome = run(
      {.arguments = test::words("replay run.h5 --policy recent --capacity 20 -o results.h5"), .unprivileged = true});
  ::chmod(folder_.path().c_str(), 0755);
  if (outcome.exit_code == 127) GTEST_SKIP() << "the program cannot be reached without privileges";
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.errors, "kvreplay: results.h5: cannot be written: Permission denied\n");
  EXPECT_EQ(outcome.output, "");
  EXPECT_EQ(files(), before);
}

TEST_F(Outputs, AWriteProtectedFileStaysAsItIs) {
  test::write_file(folder_ / "results.h5", "precious");
  ASSERT_EQ(::chmod((folder_ / "results.h5").c_str(), 0444), 0);
  ASSERT_EQ(::chmod(folder_.path().c_str(), 0777), 0);
  const test::Outcome outcome = run(
      {.arguments = test::words("replay run.h5 --policy recent --capacity 20 -o results.h5"), .unprivileged = true});
  if (outcome.exit_code == 127) GTEST_SKIP() << "the program cannot be reached without privileges";
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.errors, "kvreplay: results.h5: is write-protected; name another file\n");
  EXPECT_EQ(test::read_file(folder_ / "results.h5"), "precious");
}

TEST_F(Outputs, AnOutputThatCannotBeShownIsAFailure) {
  const std::vector<std::string> replay = test::words("replay run.h5 --policy recent --capacity 20 -o results.h5");
  for (const auto& invocation : {test::Invocation{.arguments = replay, .closed_output = true},
                                 test::Invocation{.arguments = {"--help"}, .closed_output = true},
                                 test::Invocation{.arguments = {"inspect", "run.h5", "--json"}, .closed_output = true},
                                 test::Invocation{.arguments = replay, .output_file = "/dev/full"}}) {
    const test::Outcome outcome = run(invocation);
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_THAT(outcome.errors, HasSubstr("kvreplay: standard output cannot be written"));
  }
  EXPECT_EQ(open("results.h5").read_int("/", "complete"), 1) << "no message in it";
}

TEST_F(Outputs, AnInterruptionLeavesNothing) {
  RandomTrace{.num_layers = 8, .num_attention_heads = 8, .head_dim = 64, .prompt_length = 800, .num_tokens = 900}.write(
      folder_ / "large.h5");
  test::write_file(folder_ / "results.h5", "precious");
  const test::Outcome outcome =
      interrupt({.arguments = test::words("replay large.h5 --policy full recent random(seed={0:15}) --heads query "
                                          "--capacity 64,128,256,300,400 -o results.h5 --csv results.csv"),
                 .interrupt_when = ".tmp-"});
  EXPECT_EQ(outcome.signal, SIGINT) << "as a shell expects of what was interrupted";
  EXPECT_THAT(outcome.errors, HasSubstr("kvreplay: interrupted"));
  EXPECT_THAT(folder_.names(), Not(Contains(HasSubstr("tmp-"))));
  if (test::read_file(folder_ / "results.h5") != "precious") {
    EXPECT_EQ(open("results.h5").read_int("/", "complete"), 1);
  }
}

}  // namespace
}  // namespace kvreplay
