// Settings that differ in one thing.
#include "analysis/step_effects.h"

#include <gmock/gmock.h>

#include <cmath>

#include "analysis/made_results.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;
using testing::SizeIs;

constexpr double kExact = 1e-6;

class StepEffects : public testing::Test {
 protected:
  // A result per policy at capacity 16, with an error that varies about `error`.
  ResultSet set_of(const std::vector<std::pair<std::string, double>>& errors) const {
    TraceReplay replay = MadeReplay{.queries = 20}.replay();
    for (const auto& [policy, error] : errors) {
      add_result(replay, policy, 16, [error = error](int layer, int, int query) {
        return error * (layer + 1) + 0.01 * std::sin(query * (1 + error));
      });
    }
    test::write_made(folder_ / "x.h5", {replay});
    const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
    return ResultSet::open(files);
  }
  static std::vector<StepEffect> effects(const ResultSet& results) {
    return step_effects(results, Measure::layer_error, {.resamples = 200});
  }
  static std::vector<std::string> told(const std::vector<StepEffect>& found) {
    std::vector<std::string> texts;
    for (const StepEffect& effect : found) {
      if (effect.layer < 0) texts.push_back(effect.step + " | " + effect.change);
    }
    return texts;
  }

  test::TemporaryFolder folder_;
};

TEST_F(StepEffects, AreCalledByReSTKVsSteps) {
  const auto found = effects(set_of({{"restkv", 0.5},
                                     {"restkv(temporal=mean)", 0.6},
                                     {"restkv(alpha=0.7)", 0.6},
                                     {"restkv(spatial=none)", 0.6},
                                     {"restkv(beta=100)", 0.6},
                                     {"restkv(kernel=9)", 0.6},
                                     {"restkv(window=16)", 0.6},
                                     {"restkv(projection=false)", 0.6},
                                     {"restkv(metric=before)", 0.6},
                                     {"attention(temporal=ema,spatial=adaptive)", 0.6},
                                     {"attention(temporal=ema,spatial=adaptive,values=true)", 0.6},
                                     {"restkv(alpha=0.7,window=16)", 0.6},  // two things
                                     {"tova", 0.6}}));
  EXPECT_THAT(told(found),
              testing::UnorderedElementsAre(
                  "indicator | projection: true → false", "indicator | metric: after → before",
                  "indicator | method: restkv → attention", "indicator | method: restkv → attention, values=true",
                  // attention's settings differ in one thing too
                  "indicator | values: false → true", "temporal smoothing | temporal: ema → mean",
                  "temporal smoothing | alpha: 0.3 → 0.7", "spatial smoothing | spatial: adaptive → none",
                  "spatial smoothing | beta: 2000 → 100", "spatial smoothing | kernel: 5 → 9",
                  "observation window | window: 32 → 16"));
  EXPECT_EQ(found.front().reference, "restkv");
}

TEST_F(StepEffects, AreDifferencesOverAllLayersAndInEach) {
  const auto found = effects(set_of({{"restkv", 0.5}, {"restkv(alpha=0.7)", 0.25}}));
  ASSERT_THAT(found, SizeIs(3));
  EXPECT_EQ(found[0].layer, -1);
  EXPECT_NEAR(found[0].difference.mean, -0.25 * 1.5, 0.01);
  EXPECT_NEAR(found[1].difference.mean, -0.25, 0.01);
  EXPECT_NEAR(found[2].difference.mean, -0.5, 0.01);
  EXPECT_EQ(found[0].difference.wins, 1);
  EXPECT_EQ(found[0].difference.adjusted, found[0].difference.p_value) << "a single comparison";
  EXPECT_EQ(found[0].changed, "restkv(alpha=0.7)");
  EXPECT_EQ(found[0].capacity_request, "16");
}

TEST_F(StepEffects, StartFromTheSettingNearestToTheDefaultsWhereTheseAreMissing) {
  // Most settings differ in one thing from alpha=0.7, which is further away.
  const auto found = effects(set_of({{"restkv(alpha=0.7)", 0.5},
                                     {"restkv(alpha=0.5)", 0.5},
                                     {"restkv(alpha=0.7,window=16)", 0.5},
                                     {"restkv(alpha=0.7,kernel=3)", 0.5}}));
  EXPECT_THAT(told(found), ElementsAre("temporal smoothing | alpha: 0.5 → 0.7"));
  EXPECT_EQ(found[0].reference, "restkv(alpha=0.5)");
}

TEST_F(StepEffects, OfEquallyNearSettingsStartFromWhatMostDifferFrom) {
  const auto found =
      effects(set_of({{"snapkv(window=16)", 0.5}, {"snapkv(window=64)", 0.5}, {"snapkv(window=64,kernel=3)", 0.4}}));
  EXPECT_EQ(found[0].reference, "snapkv(window=64)");
}

TEST_F(StepEffects, ParametersOfAnyMethodGoByTheirSteps) {
  EXPECT_THAT(told(effects(set_of({{"restkv+adakv", 0.5},
                                   {"restkv+adakv(floor=0.5)", 0.5},
                                   {"restkv(tau=2)+adakv", 0.5},
                                   {"streamingllm", 0.4},
                                   {"streamingllm(sinks=8)", 0.5},
                                   {"criticalkv", 0.4},
                                   {"criticalkv(base=snapkv(window=16))", 0.4}}))),
              testing::UnorderedElementsAre("budget | adakv.floor: 0.2 → 0.5", "indicator | tau: 1 → 2",
                                            "protection | sinks: 4 → 8", "observation window | base.window: 32 → 16"));
}

TEST_F(StepEffects, OfPlugInsThatAreNotLoadedNothingIsGuessed) {
  EXPECT_THAT(effects(set_of({{"mine", 0.5}, {"mine(x=1)", 0.6}, {"mine(y=2)", 0.6}, {"no spec ((", 0.5}})), IsEmpty());
  EXPECT_THAT(told(effects(set_of({{"mine(x=1)", 0.5}, {"mine(x=2)", 0.6}}))), ElementsAre("x | x: 1 → 2"));
}

TEST_F(StepEffects, PointsAreSettingsThatDifferInNumbers) {
  const ResultSet results = set_of({{"full", 0},
                                    {"restkv(alpha=0.5,window=16)", 0.5},
                                    {"restkv(alpha=0.7,beta=10,window=16)", 0.6},
                                    {"restkv(temporal=mean)", 0.6},
                                    {"restkv(temporal=mean,beta=50)", 0.25},
                                    {"snapkv", 0.3}});
  const auto points = parameter_points(compare(results, {.bootstrap = {.resamples = 0}}));
  ASSERT_THAT(points, SizeIs(4));
  for (const ParameterPoint& point : points) {
    if (point.policy == "restkv(alpha=0.5,window=16)") {
      EXPECT_EQ(point.method, "restkv(window=16)");
      EXPECT_THAT(point.parameters, ElementsAre(Pair("alpha", 0.5), Pair("beta", 2000)));
      EXPECT_NEAR(point.mean, 0.75, 0.01);
    }
    if (point.policy == "restkv(temporal=mean,beta=50)" || point.policy == "restkv(beta=50,temporal=mean)") {
      EXPECT_EQ(point.method, "restkv(temporal=mean)");
      EXPECT_THAT(point.parameters, ElementsAre(Pair("beta", 50)));
    }
  }
}

}  // namespace
}  // namespace kvreplay
