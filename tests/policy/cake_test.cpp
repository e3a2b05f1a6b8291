// How +cake divides positions over layers; scores and kept sets are held by the golden calls.
#include <gtest/gtest.h>

#include <numeric>

#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

// What the layers get of `capacity` positions each, for these entropies and variances.
std::vector<int> divided(const std::vector<std::pair<float, float>>& layers, int rows, int capacity,
                         const std::string& spec = "random+cake(window=4)") {
  std::vector<LayerSurvey> surveys;
  for (const auto& [entropy, variance] : layers) {
    // Two heads that each have half of it.
    surveys.push_back({{entropy / 2, variance / 2}, {entropy / 2, variance / 2}});
  }
  const Policy policy = make_policy(spec);
  std::vector<int> given;
  for (int layer = 0; layer < static_cast<int>(layers.size()); ++layer) {
    BudgetRequest request{.layer = layer,
                          .num_layers = static_cast<int>(layers.size()),
                          .layer_among_alike = layer,
                          .layers_alike = static_cast<int>(layers.size()),
                          .rows = rows,
                          .capacity = capacity,
                          .protection = {.window = 4},
                          .num_query_heads = 4,
                          .num_kv_heads = 2,
                          .query_head_scores = {},
                          .kv_head_scores = {},
                          .surveys = surveys};
    const std::vector<int> sets = policy.budget->allocate(request);
    EXPECT_EQ(sets.size(), 2u);
    EXPECT_EQ(sets.front(), sets.back());
    given.push_back(sets.front());
  }
  return given;
}

TEST(CakeBudget, SharesInProportionToPreference) {
  // Of 3 · 20 ranked positions: 1/6, 2/6, 3/6, and 4 of the window each.
  EXPECT_EQ(divided({{1, 2}, {2, 2}, {3, 2}}, 100, 24), (std::vector<int>{14, 24, 34}));
  // What cutting to whole positions leaves over goes to the first.
  EXPECT_EQ(divided({{1, 1}, {1, 1}, {1, 1}}, 100, 24), (std::vector<int>{24, 24, 24}));
  EXPECT_EQ(divided({{2, 1}, {2, 1}, {3, 1}}, 100, 24), (std::vector<int>{22, 21, 29}));
}

TEST(CakeBudget, NoLayerGetsMoreThanItHolds) {
  // The last one would get 57 of 60, and holds 30 before the window. The others share 27, the first one more; what
  // cutting left over goes to the first as well.
  const std::vector<int> given = divided({{1, 1}, {1, 1}, {38, 1}}, 34, 24);
  EXPECT_EQ(given, (std::vector<int>{20, 18, 34}));
  EXPECT_EQ(std::accumulate(given.begin(), given.end(), 0), 3 * 24);
}

TEST(CakeBudget, PowersAndNothingAtAll) {
  EXPECT_EQ(divided({{4, 1}, {1, 1}}, 100, 34, "random+cake(window=4,tau1=2)"), (std::vector<int>{44, 24}));
  EXPECT_EQ(divided({{1, 0}, {1, 0}}, 100, 14), (std::vector<int>{14, 14}));
}

// Layers whose sliding window leaves them fewer positions divide theirs among themselves.
TEST(CakeBudget, MeansAreKeptAmongLayersThatHoldAsMuch) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 6, .prompt_length = 120, .num_tokens = 124, .layer_windows = {41, 0, 41, 0, 41, 0}}.write(
      folder / "t.h5");
  const auto replays = replay(TraceReader(folder / "t.h5"), make_request({"cake(window=4)"}, {"20"}));
  const KeptSets& kept = replays.at(0).results.at(0).kept;
  EXPECT_NEAR((kept.mean_size(0) + kept.mean_size(2) + kept.mean_size(4)) / 3, 20, 1e-9);
  EXPECT_NEAR((kept.mean_size(1) + kept.mean_size(3) + kept.mean_size(5)) / 3, 20, 1e-9);
  EXPECT_NE(kept.mean_size(1), kept.mean_size(3));
}

// A unit of a sweep stays a layer: what is given for all layers divides each alone as a replay of all does.
TEST(CakeBudget, LayersCanBeDoneOneByOneFromGivenSurveys) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 4}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const ReplayRequest request =
      make_request({"cake(window=4)", "snapkv(window=4)", "caote(window=4)+cake(window=4)"}, {"12", "20"});
  const auto whole = replay(trace, request);
  const ReplayEngine surveying(std::span(&trace, 1), request);
  EXPECT_TRUE(surveying.surveys(0));
  std::vector<std::vector<LayerSurvey>> layers;
  for (int layer = 0; layer < 4; ++layer) layers.push_back(surveying.survey({0, layer}));
  for (int layer = 0; layer < 4; ++layer) {
    const ReplayEngine engine(std::span(&trace, 1), request);
    engine.give_surveys(0, layers);
    const std::vector<ReplayUnit> units = {{0, layer}};
    engine.decide(units, [&](const ReplayUnit&, const std::vector<LayerResidencies>& sets) {
      for (std::size_t s = 0; s < sets.size(); ++s) {
        const KeptSets& kept = whole.at(0).results[s].kept;
        for (int set = 0; set < kept.sets_per_layer; ++set) {
          EXPECT_EQ(sets[s][static_cast<std::size_t>(set)],
                    kept.sets[static_cast<std::size_t>(layer * kept.sets_per_layer + set)]);
        }
      }
    });
  }
}

}  // namespace
}  // namespace kvreplay::test
