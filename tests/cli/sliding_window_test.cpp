// What is said and shown of traces whose layers hold no more than their sliding window.
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "support/places.h"
#include "support/random_trace.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using test::RandomTrace;
using test::words;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class SlidingWindowCommands : public test::Commands {
 protected:
  SlidingWindowCommands() {
    RandomTrace{.num_layers = 4, .layer_windows = {11, 11, 0, 11}, .spans = {{3, 9, "early"}}}.write(folder_ / "w.h5");
    RandomTrace{.num_layers = 4, .sliding_window = 11}.write(folder_ / "narrow.h5");
  }

  // The mean of a measure over layers, as the JSON file has it.
  json row_of(const std::string& file, const json& layer, const std::string& measure) const {
    const json document = json::parse(test::read_file(folder_ / file));
    for (const json& row : document["summary"]) {
      if (row["layer"] == layer && row["measure"] == measure) return row;
    }
    return {};
  }

  static double number(const json& row, const char* name) { return row.at(name).get<double>(); }
};

TEST_F(SlidingWindowCommands, ANoteNamesTheLayersAndSharesAreOfWhatIsHeld) {
  const test::Outcome outcome = succeed(words("replay w.h5 -p knorm -c 15 --json r.json"));
  EXPECT_THAT(outcome.errors,
              HasSubstr("note: w.h5: layers 0, 1, 3 hold the last 10 positions of their sliding window alone; "
                        "capacities and shares are of these, and at 15 nothing is evicted there"));
  // 3 × 10 and 15 of 3 × 10 and 60 positions.
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("of held"), HasSubstr("50.0 %"), HasSubstr("11.2")));
  EXPECT_THAT(outcome.output, HasSubstr("of held: share of the positions"));
  const json document = json::parse(test::read_file(folder_ / "r.json"));
  EXPECT_EQ(document["traces"][0]["held"], (json{10, 10, 60, 10}));
}

TEST_F(SlidingWindowCommands, FullLayersAloneAreInMeansWhereThatIsAskedFor) {
  const test::Outcome all = succeed(words("replay w.h5 -p knorm -c 15 --json all.json --csv all.csv -o r.h5"));
  const test::Outcome full = succeed(words("replay w.h5 -p knorm -c 15 --json full.json --csv full.csv --full-layers"));
  EXPECT_THAT(full.output, AllOf(HasSubstr("of prompt"), HasSubstr("25.0 %"), HasSubstr("means over full layers")));
  const double of_full = number(row_of("full.json", "full", "layer_error"), "mean");
  EXPECT_GT(of_full, 0);
  EXPECT_NEAR(number(row_of("all.json", "all", "layer_error"), "mean"), of_full / 4, 1e-6);
  EXPECT_EQ(number(row_of("full.json", "full", "layer_error"), "kept"), 15);
  EXPECT_THAT(test::read_file(folder_ / "full.csv"), AllOf(HasSubstr(",full,layer_error,"), Not(HasSubstr(",all,"))));
  // The early span is gone from layers with a window, which so have no part in its recall.
  EXPECT_EQ(row_of("full.json", "full", "span_recall")["mean"], row_of("all.json", "all", "span_recall")["mean"]);

  succeed(words("sweep w.h5 -p knorm -c 15 -o s.h5 --json swept.json --full-layers"));
  EXPECT_EQ(row_of("swept.json", "full", "layer_error"), row_of("full.json", "full", "layer_error"));

  succeed(words("analyze r.h5 --resamples 0 --csv analyzed.csv"));
  EXPECT_THAT(succeed(words("analyze r.h5 --resamples 0 --csv analyzed-full.csv --full-layers")).errors,
              HasSubstr("note: --full-layers: of layers, only those that held the whole prompt"));
  EXPECT_THAT(test::read_file(folder_ / "analyzed.csv"),
              AllOf(HasSubstr(",kept share,0.5,"), HasSubstr(",kept,11.25,")));
  EXPECT_THAT(test::read_file(folder_ / "analyzed-full.csv"),
              AllOf(HasSubstr(",kept share,0.25,"), HasSubstr(",kept,15,")));
}

TEST_F(SlidingWindowCommands, SpansThatALayerNoLongerHeldHaveNoPartInMeans) {
  succeed(words("replay w.h5 -p knorm -p recent -c 15 --json r.json -o r.h5"));
  const json row = row_of("r.json", json(2), "span_recall");
  EXPECT_EQ(row_of("r.json", "all", "span_recall")["mean"], row["mean"]);
  EXPECT_TRUE(row_of("r.json", json(0), "span_recall")["mean"].is_null());
  succeed(words("analyze r.h5 --measure span_recall --resamples 0 --baseline recent"));
}

// Of its four layers three have a window of 21.
TEST_F(SlidingWindowCommands, Gemma3LosesNothingInLayersWhoseWindowTheCapacityHolds) {
  const std::string model = (test::project_folder() / "tests" / "tracer" / "families" / "gemma3").string();
  std::string ids;
  for (int i = 0; i < 200; ++i) ids += std::to_string((i * 31 + i * i) % 191) + " ";
  test::write_file(folder_ / "ids", ids);
  succeed({"capture", "--model", model, "--tokens", "ids", "-o", "g.h5"});
  std::vector<std::string> replay = words("replay g.h5 -c 32 --evict-at 150 --csv g.csv -p");
  const std::vector<std::string> policies = {"random",
                                             "recent",
                                             "streamingllm",
                                             "h2o",
                                             "tova",
                                             "snapkv(window=8)",
                                             "restkv(window=8)",
                                             "attention(window=8)",
                                             "knorm",
                                             "keydiff",
                                             "lagkv",
                                             "lacache",
                                             "caote(window=8)",
                                             "adakv(window=8)",
                                             "pyramidkv(window=8)",
                                             "criticalkv(base=tova)",
                                             "oracle-attention"};
  replay.insert(replay.end(), policies.begin(), policies.end());
  EXPECT_THAT(succeed(replay).errors, HasSubstr("layers 0, 1, 3 hold the last 20 positions"));
  const std::string csv = test::read_file(folder_ / "g.csv");
  for (const char* layer : {"0", "1", "3"}) {
    std::size_t found = 0;
    const std::string exact = std::string(",") + layer + ",layer_error,0,0,0,0,nan,nan\n";
    for (std::size_t at = csv.find(exact); at != std::string::npos; at = csv.find(exact, at + 1)) ++found;
    EXPECT_EQ(found, policies.size()) << "layer " << layer;
  }
  EXPECT_THAT(csv, Not(HasSubstr(",2,layer_error,0,0,0,0,nan,nan\n"))) << "the layer that holds the whole prompt";
}

TEST_F(SlidingWindowCommands, FullLayersAreRefusedWhereThereIsNone) {
  for (const char* command :
       {"replay narrow.h5 -p knorm -c 5 --full-layers", "sweep narrow.h5 -p knorm -c 5 -o s.h5 --full-layers"}) {
    refuse(words(command), 2, {"--full-layers", "narrow.h5", "no layer holds all 60 positions"});
  }
  succeed(words("replay narrow.h5 -p knorm -c 5 -o r.h5"));
  refuse(words("analyze r.h5 --full-layers"), 2, {"--full-layers", "held the whole prompt"});
}

}  // namespace
}  // namespace kvreplay
