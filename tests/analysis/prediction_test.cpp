// How far offline measures rank settings as the model's loss does, where the answer is known.
#include "analysis/prediction.h"

#include <gmock/gmock.h>

#include <cmath>
#include <map>

#include "analysis/findings.h"
#include "analysis/made_results.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::Contains;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

const std::vector<std::string> kPolicies = {"snapkv", "restkv", "tova", "h2o", "recent"};

// A prompt where the policies have these layer errors and losses at a capacity.
struct MadePrompt {
  TraceReplay replay;

  explicit MadePrompt(const std::string& trace) : replay(MadeReplay{.trace = trace}.replay()) {}

  void add(int capacity, const std::vector<double>& errors, const std::vector<double>& losses) {
    for (std::size_t p = 0; p < errors.size(); ++p) add(kPolicies.at(p), capacity, errors[p], losses[p]);
  }

  ReplayResult& add(const std::string& policy, int capacity, double error, double loss) {
    ReplayResult& result = add_result(replay, policy, capacity, [error](int, int, int) { return error; });
    test::add_loss(result, [loss](int) { return loss; });
    return result;
  }
};

class LossPrediction : public testing::Test {
 protected:
  ResultSet set_of(const std::vector<TraceReplay>& replays) const {
    test::write_made(folder_ / "x.h5", replays);
    const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
    return ResultSet::open(files);
  }
  LossPredictions predicted(const std::vector<TraceReplay>& replays, const BootstrapOptions& bootstrap = {}) const {
    return loss_predictions(set_of(replays), bootstrap);
  }
  static Prediction of(const LossPredictions& all, const Predictor& predictor) {
    const auto found = std::ranges::find(all.predictions, predictor, &Prediction::predictor);
    EXPECT_NE(found, all.predictions.end());
    return found == all.predictions.end() ? Prediction{} : *found;
  }

  test::TemporaryFolder folder_;
};

TEST_F(LossPrediction, IsSpearmansWithinAPromptAndCapacityAndOverAll) {
  MadePrompt prompt("a.h5");
  prompt.add(16, {0.1, 0.2, 0.3, 0.4, 0.5}, {1, 2, 3, 4, 5});       // the same order
  prompt.add(32, {0.01, 0.02, 0.03, 0.04, 0.05}, {5, 4, 3, 2, 1});  // the reverse
  prompt.add(64, {0.6, 0.7, 0.8, 0.9, 1.0}, {2, 1, 4, 3, 5});       // 1 − 6 · 4 / (5 · 24)
  const Prediction found = of(predicted({prompt.replay}), {});
  EXPECT_EQ(found.groups, 3);
  EXPECT_EQ(found.prompts, 1);
  EXPECT_NEAR(found.mean, (1 - 1 + 0.8) / 3, 1e-12);
  EXPECT_NEAR(found.smallest, -1, 1e-12);
  EXPECT_NEAR(found.of_capacity.at("64"), 0.8, 1e-12);
  EXPECT_TRUE(std::isnan(found.interval.low)) << "of a single prompt";
  // Ranks of 15 settings: losses 1 to 5, three of each, which share 2, 5, 8, 11 and 14; Pearson's of the ranks.
  const std::vector<double> errors = {6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15};
  const std::vector<double> losses = {2, 5, 8, 11, 14, 14, 11, 8, 5, 2, 5, 2, 11, 8, 14};
  double covariance = 0;
  double of_errors = 0;
  double of_losses = 0;
  for (std::size_t i = 0; i < 15; ++i) {
    covariance += (errors[i] - 8) * (losses[i] - 8);
    of_errors += std::pow(errors[i] - 8, 2);
    of_losses += std::pow(losses[i] - 8, 2);
  }
  EXPECT_NEAR(found.all, covariance / std::sqrt(of_errors * of_losses), 1e-12);
}

TEST_F(LossPrediction, ThatOfPromptsIsTheirMeanWithAnInterval) {
  std::vector<TraceReplay> replays;
  // 1, 0.8 and −1; the last prompt has two capacities, which weigh no more.
  const std::vector<double> errors = {0.1, 0.2, 0.3, 0.4, 0.5};
  const std::map<std::string, std::vector<double>> losses = {
      {"a.h5", {1, 2, 3, 4, 5}}, {"b.h5", {2, 1, 4, 3, 5}}, {"c.h5", {5, 4, 3, 2, 1}}};
  for (const auto& [trace, of_policies] : losses) {
    MadePrompt prompt(trace);
    prompt.add(16, errors, of_policies);
    if (trace == "c.h5") prompt.add(32, errors, of_policies);
    replays.push_back(prompt.replay);
  }
  const Prediction found = of(predicted(replays), {});
  EXPECT_EQ(found.groups, 4);
  EXPECT_EQ(found.prompts, 3);
  EXPECT_NEAR(found.mean, 0.8 / 3, 1e-12);
  EXPECT_NEAR(found.of_capacity.at("16"), 0.8 / 3, 1e-12);
  EXPECT_NEAR(found.of_capacity.at("32"), -1, 1e-12);
  EXPECT_LT(found.interval.low, found.mean);
  EXPECT_GT(found.interval.high, found.mean);
  EXPECT_GE(found.interval.low, -1);
  EXPECT_LE(found.interval.high, 1);
  const Prediction again = of(predicted(replays, {.resampling = Resampling::queries}), {});
  EXPECT_EQ(again.interval.low, found.interval.low) << "prompts are drawn, whatever other means draw";
}

TEST_F(LossPrediction, SquaresAreMeantBeforeTheyAreRanked) {
  // Equal means of which the squares differ: queries that are much worse than others cost most.
  TraceReplay a = MadeReplay{.queries = 4}.replay();
  for (int p = 0; p < 5; ++p) {
    const double spread = 0.05 * p;
    test::add_loss(add_result(a, kPolicies[static_cast<std::size_t>(p)], 16,
                              [=](int, int, int query) { return 0.5 + (query % 2 == 0 ? spread : -spread); }),
                   [p](int) { return p; });
  }
  const LossPredictions all = predicted({a});
  ASSERT_THAT(all.predictors,
              ElementsAre(Predictor{Measure::layer_error, false}, Predictor{Measure::layer_error, true}));
  EXPECT_NEAR(of(all, {Measure::layer_error, true}).mean, 1, 1e-12);
  EXPECT_EQ(all.predictions.front().predictor, (Predictor{Measure::layer_error, true})) << "the best first";
  EXPECT_NEAR(all.settings[4].offline[1], 0.25 + 0.04, 1e-6);
}

TEST_F(LossPrediction, RootsOfMeanSquaresAreOfAllAndOfLateLayers) {
  TraceReplay a = MadeReplay{.layers = 4, .queries = 4}.replay();
  for (int p = 0; p < 4; ++p) {
    ReplayResult& result = add_result(a, kPolicies[static_cast<std::size_t>(p)], 16, [](int, int, int) { return 0.5; });
    test::add_loss(result, [p](int) { return p; });
    const auto spread = static_cast<float>(p);
    result.measures[Measure::residual_error] = {{4, 4}, std::vector<float>(16, 4)};
    std::vector<float>& numbers = result.measures[Measure::residual_error].numbers;
    numbers[0] = 4 - 2 * spread;  // in the first third of the layers
    numbers[4] = 4 + spread;
    numbers[5] = 4 - spread;
  }
  const LossPredictions all = predicted({a});
  const Predictor late{.measure = Measure::residual_error, .late = true};
  EXPECT_THAT(all.predictors, ElementsAre(Predictor{}, Predictor{.squared = true},
                                          Predictor{.measure = Measure::residual_error}, late));
  EXPECT_EQ(late.noun(), "residual error of late layers");
  EXPECT_NEAR(of(all, late).mean, 1, 1e-12);
  EXPECT_EQ(all.predictions.front().predictor, late);
  // 4² each, but for 0² in the first layer, and 6² and 2² in the second.
  EXPECT_NEAR(all.settings[2].offline[2], std::sqrt((16.0 * 16 - 16 + 8) / 16), 1e-6);
  EXPECT_NEAR(all.settings[2].offline[3], std::sqrt((12.0 * 16 + 8) / 12), 1e-6);
}

TEST_F(LossPrediction, ALossOfWhatShouldBeLargeCountsAsAnError) {
  TraceReplay a = MadeReplay{.queries = 4}.replay();
  for (int p = 0; p < 4; ++p) {
    ReplayResult& result =
        add_result(a, kPolicies[static_cast<std::size_t>(p)], 16, [p](int, int, int) { return 0.1 * p; });
    test::add_loss(result, [p](int) { return p; });
    Table& recall = result.measures[Measure::attention_recall];
    recall.shape = {2, 4, 4};
    recall.numbers.assign(32, 1 - 0.1F * static_cast<float>(p));
  }
  const LossPredictions all = predicted({a});
  EXPECT_NEAR(of(all, {Measure::attention_recall, false}).mean, 1, 1e-12);
  EXPECT_THAT(all.predictors, Not(Contains(Predictor{Measure::attention_recall, true})));
}

TEST_F(LossPrediction, OraclesAndWhatKeepsEverythingHaveNoPart) {
  MadePrompt prompt("a.h5");
  prompt.add(16, {0.1, 0.2, 0.3, 0.4}, {1, 2, 3, 4});
  prompt.add("oracle-attention", 16, 0.9, 0.1);
  prompt.add("full", 0, 0, 0);
  prompt.add("recent", 100, 0, 7);  // as long as the prompt
  const LossPredictions all = predicted({prompt.replay});
  EXPECT_THAT(all.settings, SizeIs(4));
  EXPECT_NEAR(of(all, {}).all, 1, 1e-12);
}

TEST_F(LossPrediction, FewPoliciesAreNoOrder) {
  MadePrompt prompt("a.h5");
  prompt.add(16, {0.1, 0.2, 0.3}, {1, 2, 3});
  prompt.add(32, {0.1, 0.1, 0.1, 0.1}, {1, 2, 3, 4});  // which ranks nothing
  const Prediction found = of(predicted({prompt.replay}), {});
  EXPECT_EQ(found.groups, 0);
  EXPECT_TRUE(std::isnan(found.mean));
  EXPECT_TRUE(std::isnan(found.smallest));
  EXPECT_FALSE(std::isnan(found.all)) << "of seven settings";
  prompt.replay.results.resize(3);
  EXPECT_TRUE(std::isnan(of(predicted({prompt.replay}), {}).all));
}

TEST_F(LossPrediction, NothingIsPredictedWhereOneOfTheTwoIsMissing) {
  TraceReplay offline = MadeReplay{}.replay();
  add_result(offline, "snapkv", 16, [](int, int, int) { return 0.5; });
  EXPECT_THAT(predicted({offline}).predictions, IsEmpty());
  MadePrompt live("a.h5");
  live.add(16, {0.1, 0.2, 0.3, 0.4}, {1, 2, 3, 4});
  for (ReplayResult& result : live.replay.results) test::remove_layers(result);
  EXPECT_THAT(predicted({live.replay}).settings, IsEmpty());
}

TEST_F(LossPrediction, IsAFindingWithTheBestMeasure) {
  std::vector<TraceReplay> replays;
  for (const char* trace : {"a.h5", "b.h5"}) {
    TraceReplay& replay = replays.emplace_back(MadeReplay{.trace = trace, .queries = 4}.replay());
    for (int p = 0; p < 5; ++p) {
      // By the mean 0.8 of the right order; by the squares all of it.
      const double error = std::vector<double>{0.11, 0.10, 0.13, 0.12, 0.14}[static_cast<std::size_t>(p)];
      const double spread = std::vector<double>{0.03, 0.06, 0.07, 0.10, 0.11}[static_cast<std::size_t>(p)];
      test::add_loss(add_result(replay, kPolicies[static_cast<std::size_t>(p)], 16,
                                [=](int, int, int query) { return error + (query % 2 == 0 ? spread : -spread); }),
                     [p](int) { return p + 1; });
    }
  }
  const auto said = [&]() {
    AnalysisOptions options;
    options.measure = Measure::kl;
    return findings(analyze({set_of(replays), {}, {}}, options), 10);
  };
  EXPECT_THAT(said(), Contains("The layer error predicts the loss here with Spearman 0.80 [0.80, 0.80] at the "
                               "same prompt and capacity (0.80 at worst); the squared layer error does better, "
                               "with 1.00 [1.00, 1.00] (1.00 at worst)."));
  replays.pop_back();
  EXPECT_THAT(said(), Contains(HasSubstr("How sure that is, a single prompt does not say.")));
  replays.front().results.resize(3);
  EXPECT_THAT(said(), Each(Not(HasSubstr("Spearman"))));
}

}  // namespace
}  // namespace kvreplay
