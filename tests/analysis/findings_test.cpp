// What is said of results, and that nothing is claimed that is not sure.
#include "analysis/findings.h"

#include <gmock/gmock.h>

#include <cmath>
#include <tuple>

#include "analysis/made_results.h"
#include "analysis/spec_structure.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::AllOf;
using testing::Contains;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;

class FindingsTest : public testing::Test {
 protected:
  Analysis analysis_of(const std::vector<TraceReplay>& replays, AnalysisOptions options = {}) const {
    test::write_made(folder_ / "x.h5", replays);
    const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
    return analyze({ResultSet::open(files), {}, {}}, std::move(options));
  }

  // Errors about `error`; `noise` scatters each query's.
  static test::MadeNumbers about(double error, double noise, double phase = 0) {
    return [=](int layer, int, int query) { return error + 0.01 * layer + noise * std::sin(2.4 * query + phase); };
  }

  test::TemporaryFolder folder_;
};

TEST_F(FindingsTest, SayWhatIsBestAndWhatItGains) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "full", 0, about(0, 0));
  for (const int capacity : {16, 32}) {
    add_result(a, "snapkv", capacity, about(8.0 / capacity, 0.01));
    add_result(a, "restkv", capacity, about(6.4 / capacity, 0.01, 1));
    add_result(a, "recent", capacity, about(12.0 / capacity, 0.01, 2));
    add_result(a, "oracle-attention", capacity, about(2.0 / capacity, 0.01));
  }
  const Analysis analysis = analysis_of({a});
  EXPECT_EQ(analysis.options.baseline, "snapkv");
  EXPECT_NEAR(*analysis.options.goal, 0.255, 1e-3) << "the baseline's mean at the middle capacity";
  EXPECT_EQ(analysis.oracle, "oracle-attention");
  EXPECT_EQ(analysis.regret.size(), 6u);
  const auto sentences = findings(analysis, 10);
  EXPECT_THAT(sentences, ElementsAre(StartsWith("restkv has the smallest layer error at both capacities: 0.405 at 16"),
                                     AllOf(StartsWith("Against snapkv, restkv gains most at capacity 16: -0.0997 ["),
                                           HasSubstr("better in 100 % of the pairs"),
                                           HasSubstr("2 are surely better and 2 surely")),
                                     AllOf(StartsWith("For a layer error of 0.255, restkv keeps"),
                                           HasSubstr("snapkv 32"), HasSubstr("1 of 3 policies does not reach it")),
                                     HasSubstr("What could still be gained is largest at capacity 16")));
  EXPECT_EQ(findings(analysis, 1).size(), 1u);
}

// Three policies whose layers lose other amounts than the model: snapkv least of the former, restkv of the latter.
TraceReplay live_run() {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  const auto add = [&](const std::string& policy, int capacity, double error, double loss) {
    test::add_loss(add_result(
                       a, policy, capacity, [=](int layer, int, int) { return error + 0.01 * layer; },
                       [=](int, int, int) { return error; }),
                   [=](int query) { return loss + 0.01 * std::sin(2.4 * query); });
  };
  add_result(a, "full", 0, [](int, int, int) { return 0; });
  for (const int capacity : {16, 32}) {
    add("snapkv", capacity, 6.4 / capacity, 32.0 / capacity);
    add("restkv", capacity, 8.0 / capacity, 1.0 / capacity);
    add("recent", capacity, 9.6 / capacity, 64.0 / capacity);
  }
  return a;
}

TEST_F(FindingsTest, BeginWithWhatTheModelLosesWhereItRanOn) {
  const TraceReplay a = live_run();
  test::write_made(folder_ / "x.h5", {a});
  const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
  std::vector<std::string> notes;
  AnalysisOptions options;
  options.measure = default_measure(ResultSet::open(files), false, notes);
  EXPECT_EQ(options.measure, Measure::kl) << "though full has none";
  EXPECT_THAT(notes, ElementsAre(AllOf(HasSubstr("go by its KL divergence"), HasSubstr("--measure layer_error"))));
  const Analysis analysis = analysis_of({a}, options);
  EXPECT_THAT(findings(analysis, 1), ElementsAre(StartsWith("restkv has the smallest KL divergence at both capacities: "
                                                            "0.0626 at 16 and 0.0313 at 32")));
  // The layer error stays beside it: over all, and of each layer.
  EXPECT_EQ(analysis.layer_measure, Measure::layer_error);
  ASSERT_EQ(analysis.beside.size(), 7u);
  EXPECT_EQ(analysis.beside[1].key.policy, "snapkv");
  EXPECT_NEAR(analysis.beside[1].distribution.mean, 0.405, 1e-6);
  EXPECT_FALSE(analysis.beside[1].difference);
  EXPECT_THAT(analysis.by_layer, testing::SizeIs(14));
  EXPECT_THAT(analysis.by_head, testing::SizeIs(6 * 2 * 4));
}

TEST_F(FindingsTest, GoByTheLayersWhereLayersAreAskedForOrNotAllRanOn) {
  TraceReplay a = live_run();
  const auto measure = [&](bool of_layers, std::vector<std::string>& notes) {
    test::write_made(folder_ / "y.h5", {a});
    const std::vector<std::filesystem::path> files = {folder_ / "y.h5"};
    return default_measure(ResultSet::open(files), of_layers, notes);
  };
  std::vector<std::string> notes;
  EXPECT_EQ(measure(true, notes), Measure::layer_error);
  EXPECT_THAT(notes, IsEmpty());
  a.results.back().measures[Measure::kl] = {};
  EXPECT_EQ(measure(false, notes), Measure::layer_error);
  EXPECT_THAT(notes, ElementsAre(AllOf(HasSubstr("5 of 6 results have a KL divergence"), HasSubstr("--measure kl"))));
  for (ReplayResult& result : a.results) test::remove_layers(result);
  notes.clear();
  EXPECT_EQ(measure(false, notes), Measure::kl) << "there is nothing else";
  for (ReplayResult& result : a.results) result.measures[Measure::kl] = {};
  notes.clear();
  EXPECT_EQ(measure(false, notes), Measure::layer_error);
  EXPECT_THAT(notes, IsEmpty());
}

TEST_F(FindingsTest, ResultsOfTheModelAloneAreAnalysed) {
  TraceReplay a = live_run();
  for (ReplayResult& result : a.results) test::remove_layers(result);
  AnalysisOptions options;
  options.measure = Measure::kl;
  const Analysis analysis = analysis_of({a}, options);
  EXPECT_THAT(analysis.comparison, testing::SizeIs(6));
  EXPECT_THAT(analysis.beside, IsEmpty());
  EXPECT_THAT(analysis.by_layer, IsEmpty());
  EXPECT_THAT(analysis.by_head, IsEmpty());
  EXPECT_THAT(analysis.step_effects, IsEmpty());
  EXPECT_THAT(findings(analysis, 1), ElementsAre(StartsWith("restkv has the smallest KL divergence")));
}

TEST_F(FindingsTest, SingleChangesOfLayersAreOfTheLayerError) {
  TraceReplay a = MadeReplay{.queries = 12}.replay();
  for (const auto& [policy, error, loss] : {std::tuple{"snapkv", 0.2, 1.0}, {"snapkv(window=16)", 0.3, 3.0}}) {
    test::add_loss(add_result(a, policy, 40, [e = error](int layer, int, int) { return e * (1 + layer); }),
                   [l = loss](int query) { return l + 0.1 * std::sin(query); });
  }
  AnalysisOptions options;
  options.measure = Measure::kl;
  const Analysis analysis = analysis_of({a}, options);
  ASSERT_THAT(analysis.step_effects, testing::SizeIs(3));
  EXPECT_EQ(analysis.step_effects[0].layer, -1);
  EXPECT_NEAR(std::abs(analysis.step_effects[0].difference.mean), 2, 1e-6);
  EXPECT_EQ(analysis.step_effects[1].layer, 0);
  EXPECT_NEAR(std::abs(analysis.step_effects[1].difference.mean), 0.1, 1e-6);
  EXPECT_NEAR(std::abs(analysis.step_effects[2].difference.mean), 0.2, 1e-6);
}

TEST_F(FindingsTest, TheGoalIsSoughtAmongPoliciesWithSeveralCapacities) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  // At one capacity the best of all, where it reaches every goal.
  add_result(a, "snapkv(window=20)", 32, about(0.1, 0));
  for (const int capacity : {16, 32}) {
    add_result(a, "recent", capacity, about(12.0 / capacity, 0));
    add_result(a, "tova", capacity, about(8.0 / capacity, 0));
  }
  AnalysisOptions options;
  options.goal = 0.2;
  EXPECT_THAT(findings(analysis_of({a}, options), 10),
              AllOf(Contains("None of the 2 policies with several capacities reaches a layer error of 0.2 at these."),
                    Each(Not(HasSubstr("No policy reaches")))));
  options.goal = 0.3;
  EXPECT_THAT(findings(analysis_of({a}, options), 10),
              Contains(AllOf(StartsWith("For a layer error of 0.3, of the 2 policies with several capacities, tova"),
                             HasSubstr("; 1 does not reach it at these capacities"))));
  // Where all have several, they are all that is spoken of.
  add_result(a, "snapkv(window=20)", 24, about(0.25, 0));
  options.goal = 0.05;
  EXPECT_THAT(findings(analysis_of({a}, options), 10),
              Contains("No policy reaches a layer error of 0.05 at these capacities."));
}

TEST_F(FindingsTest, ClaimNothingThatIsNotSure) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0.2));
  add_result(a, "tova", 16, about(0.499, 0.2, 1.3));
  const auto sentences = findings(analysis_of({a}), 10);
  EXPECT_THAT(sentences,
              Contains(HasSubstr("No policy is surely better than snapkv; the nearest to it is tova at 16")));
  EXPECT_THAT(sentences, Each(Not(HasSubstr("gains most"))));
}

TEST_F(FindingsTest, TheMostOfWhatIsSureIsNotCalledTheMostOfAll) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "adakv", 16, about(0.49, 0.001));
  add_result(a, "restkv", 16, about(0.45, 0.5, 1.3));
  EXPECT_THAT(
      findings(analysis_of({a}), 10),
      AllOf(Contains(StartsWith("Of what is surely better than snapkv, adakv gains most at capacity 16: -0.01")),
            Contains(HasSubstr("Of 2 comparisons, 1 is surely better and 0 surely worse"))));
}

TEST_F(FindingsTest, TheNearestMaySurelyBeWorse) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "h2o", 16, about(0.51, 0.001));
  add_result(a, "tova", 16, about(0.53, 0.5, 1.3));
  EXPECT_THAT(findings(analysis_of({a}), 10),
              Contains(StartsWith("No policy is surely better than snapkv; the nearest to it, h2o at 16, is surely "
                                  "worse: +0.01")));
}

TEST_F(FindingsTest, OfASinglePolicyThereIsNothingToCompare) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "tova", 16, about(0.5, 0.2));
  const Analysis analysis = analysis_of({a});
  EXPECT_EQ(analysis.options.baseline, "");
  EXPECT_THAT(findings(analysis, 10), IsEmpty());
}

TEST_F(FindingsTest, TheStepThatMattersMostIsTold) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "restkv", 16, about(0.5, 0.01));
  add_result(a, "restkv(temporal=mean)", 16, about(0.6, 0.01, 1));
  add_result(a, "restkv(kernel=9)", 16, about(0.51, 0.01, 2));
  EXPECT_THAT(findings(analysis_of({a}), 10),
              Contains(AllOf(HasSubstr("temporal: ema → mean (temporal smoothing)"), HasSubstr("most: +19"))));
}

TEST_F(FindingsTest, ASingleChangeIsOne) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "restkv", 16, about(0.5, 0.2));
  add_result(a, "restkv(temporal=mean)", 16, about(0.501, 0.2, 1.3));
  EXPECT_THAT(findings(analysis_of({a}), 10),
              Contains("The single change to a method that there is makes no sure difference."));
}

TEST_F(FindingsTest, NumbersHaveTheDecimalsOfTables) {
  TraceReplay a = MadeReplay{.layers = 1, .queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.02, 0));
  add_result(a, "tova", 16, about(0.009114, 0.00001));
  EXPECT_THAT(findings(analysis_of({a}), 10),
              AllOf(Contains("tova has the smallest layer error: 0.0091 at 16."),
                    Contains(AllOf(HasSubstr("-0.0109 [-0.0109, -0.0109]"), HasSubstr(" or -54.4 %")))));
}

TEST_F(FindingsTest, WithoutSnapKVTheMiddleOneIsTheBaseline) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "full", 0, about(0, 0));
  add_result(a, "tova", 16, about(0.5, 0));
  add_result(a, "recent", 16, about(0.7, 0));
  add_result(a, "restkv", 16, about(0.4, 0));
  EXPECT_EQ(analysis_of({a}).options.baseline, "tova");
}

TEST_F(FindingsTest, OfAGridWithoutTheDefaultsTheNearestSettingIsTheBaseline) {
  TraceReplay a = MadeReplay{}.replay();
  // The one in the middle of the means is far from what anybody uses.
  for (const char* alpha : {"0.05", "0.5", "0.9"}) {
    for (const char* beta : {"10", "100", "1000"}) {
      const double error = 0.5 - 0.1 * std::atof(alpha) + 0.01 * std::log10(std::atof(beta));
      add_result(a, "restkv(alpha=" + std::string(alpha) + ",beta=" + beta + ")", 16, about(error, 0));
    }
  }
  Analysis analysis = analysis_of({a});
  EXPECT_EQ(analysis.options.baseline, "restkv(alpha=0.5,beta=1000)");
  EXPECT_THAT(analysis.notes, Contains(HasSubstr("of the settings of restkv the nearest to its defaults")));
  for (const char* window : {"128", "64", "8"}) {
    add_result(a, "snapkv(window=" + std::string(window) + ")", 16, about(0.9, 0));
  }
  analysis = analysis_of({a});
  EXPECT_EQ(analysis.options.baseline, "snapkv(window=64)") << "twice the default, and not a quarter of it";
  EXPECT_EQ(analysis.step_effects.front().reference, "restkv(alpha=0.5,beta=1000)");
}

TEST_F(FindingsTest, WhyTheUsualBaselineIsNotTakenIsTold) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "snapkv(window=16)", "h2o", "tova"}) add_result(a, policy, 16, about(0.5, 0));
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  for (const char* policy : {"snapkv(window=16)", "h2o", "tova"}) add_result(b, policy, 16, about(0.5, 0));
  const Analysis analysis = analysis_of({a, b});
  EXPECT_EQ(analysis.options.baseline, "snapkv(window=16)");
  EXPECT_THAT(
      analysis.notes,
      Contains("snapkv(window=16) is what others are compared with, being of the settings of snapkv the nearest "
               "to its defaults but one, since snapkv is not of the traces and eviction positions that most "
               "others are of; --baseline names another"));
  b.results.erase(b.results.begin());
  a.results.erase(a.results.begin() + 1);
  const Analysis without = analysis_of({a, b});
  EXPECT_NE(without.options.baseline, "snapkv");
  EXPECT_THAT(without.notes, Contains(AllOf(HasSubstr("in the middle by its mean at the first capacity, since snapkv "
                                                      "is not of the traces"))));
}

TEST_F(FindingsTest, TheFloorUnderAProtectionIsNamed) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "snapkv+protect(first=8)", 16, about(0.4, 0));
  EXPECT_THAT(analysis_of({a}).notes, Contains(HasSubstr("replay random+protect(first=8) beside")));
  add_result(a, "random+protect(first=8)", 16, about(0.6, 0));
  EXPECT_THAT(analysis_of({a}).notes,
              Contains(StartsWith("snapkv+protect(first=8) is to be held against random+protect(first=8)")));
  EXPECT_EQ(baseline_of("random+protect(first=8)"), Method::Baseline::floor);
  EXPECT_EQ(baseline_of("random+pyramid"), Method::Baseline::none);
  EXPECT_EQ(baseline_of("a method of a plug-in"), Method::Baseline::none);
}

TEST_F(FindingsTest, SettingsOfFewerPlacesAreTold) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "tova", 16, about(0.5, 0));
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add_result(b, "snapkv", 16, about(0.9, 0));
  EXPECT_THAT(analysis_of({a, b}).notes,
              Contains(StartsWith("tova at 16 is not of the traces and eviction positions that most others are of")));
}

TEST_F(FindingsTest, PoliciesOfOtherTracesAreNotRankedAmongTheRest) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "recent", 16, about(0.6, 0));
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add_result(b, "tova", 16, about(0.1, 0));
  const Analysis analysis = analysis_of({a, b});
  EXPECT_THAT(analysis.apart, ElementsAre(SettingKey{"tova", "16"}));
  EXPECT_THAT(analysis.notes, Contains(StartsWith("tova at 16 is not of the traces")));
  EXPECT_THAT(findings(analysis, 10), Contains(StartsWith("snapkv has the smallest layer error: 0.505 at 16")));
}

TEST_F(FindingsTest, MeansAreOfTheEvictionsThatAllSettingsHave) {
  TraceReplay last = MadeReplay{.queries = 30}.replay();
  add_result(last, "snapkv", 16, about(0.5, 0));
  add_result(last, "tova", 16, about(0.6, 0));
  add_result(last, "snapkv", 32, about(0.4, 0));
  TraceReplay earlier = MadeReplay{.eviction_position = 90, .queries = 30, .evaluate_from = 100}.replay();
  add_result(earlier, "snapkv", 16, about(0.1, 0));
  const Analysis analysis = analysis_of({last, earlier});
  EXPECT_NEAR(analysis.comparison.front().distribution.mean, 0.505, 1e-6) << "and not that of the earlier eviction";
  EXPECT_THAT(analysis.apart, IsEmpty());
  EXPECT_THAT(analysis.notes, Contains(HasSubstr("with evictions at 90: means are of those at 100")));
}

TEST_F(FindingsTest, WhatHadNothingToChooseIsNotRanked) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  for (const int capacity : {32, 64}) {
    add_result(a, "snapkv", capacity, about(0.5, 0.01));
    add_result(a, "restkv", capacity, about(0.45, 0.01, 1));
    // By chance the best of all: a window that is all of the capacity keeps what `recent` keeps.
    ReplayResult& degenerate = add_result(a, "snapkv(window=64)", capacity, about(0.1, 0.01, 2));
    degenerate.nothing_to_choose = capacity <= 64;
    add_result(a, "oracle-attention", capacity, about(0.05, 0.01, 2));
  }
  const Analysis analysis = analysis_of({a});
  EXPECT_THAT(analysis.notes,
              Contains(AllOf(HasSubstr("snapkv(window=64) at 32 and 1 more setting had nothing to choose"),
                             HasSubstr("left out of findings"))));
  EXPECT_EQ(std::ranges::count_if(analysis.comparison, &ComparisonRow::nothing_to_choose), 2) << "still shown";
  for (const StepEffect& effect : analysis.step_effects) EXPECT_THAT(effect.changed, Not(HasSubstr("window=64")));
  EXPECT_THAT(analysis.parameter_points, IsEmpty());
  for (const CapacityCurve& curve : analysis.curves) {
    const bool degenerate = curve.policy == "snapkv(window=64)";
    EXPECT_EQ(curve.points.size(), 2u);
    EXPECT_EQ(curve.area.has_value(), !degenerate) << curve.policy;
    if (degenerate) {
      EXPECT_FALSE(curve.kept_for_goal);
    }
  }
  const auto sentences = findings(analysis, 10);
  EXPECT_THAT(sentences, Contains(StartsWith("restkv has the smallest layer error at both capacities")));
  EXPECT_THAT(sentences, Contains(HasSubstr("restkv gains most")));
  EXPECT_THAT(sentences, Each(Not(HasSubstr("window=64"))));
}

TEST_F(FindingsTest, WhatStoresMoreIsNotCalledBest) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0.01));
  add_result(a, "restkv", 16, about(0.48, 0.01, 1));
  add_result(a, "h2o", 16, about(0.6, 0.01, 2));
  // A position more in every KV head; and a set for each of the two query heads that share one.
  ReplayResult& pyramid = add_result(a, "pyramidkv", 16, about(0.4, 0.01, 3));
  const auto with_one_more = [](const Residency& set) {
    std::vector<int> kept(set.kept().begin(), set.kept().end());
    kept.push_back(16);
    return kept;
  };
  for (Residency& set : pyramid.kept.sets) set = with_one_more(set);
  ReplayResult& per_query = add_result(a, "snapkv@rest-kv", 16, about(0.3, 0.01, 4));
  per_query.granularity = per_query.kept.granularity = Granularity::query;
  per_query.kept.sets_per_layer = 4;
  per_query.kept.sets.resize(8, per_query.kept.sets.front());
  // Less than one position more is what dividing leaves.
  ReplayResult& adaptive = add_result(a, "adakv", 16, about(0.45, 0.01, 5));
  adaptive.kept.sets.front() = with_one_more(adaptive.kept.sets.front());
  const auto sentences = findings(analysis_of({a}), 10);
  EXPECT_THAT(sentences,
              Contains(AllOf(StartsWith("adakv has the smallest layer error"),
                             HasSubstr("Not counted, since they store more: snapkv@rest-kv at 16 (32 positions in a KV "
                                       "head, where most store 16) and pyramidkv at 16 (17 positions"))));
  EXPECT_THAT(sentences, Contains(AllOf(HasSubstr("Against snapkv, adakv gains most"),
                                        HasSubstr("Not counted are 2 in which the better one also stores more"))));
}

TEST_F(FindingsTest, TellThePlainAndTheCorrectedP) {
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0.01));
  for (const char* policy : {"restkv", "h2o", "tova"}) add_result(a, policy, 16, about(0.495, 0.02, policy[0]));
  const Analysis analysis = analysis_of({a});
  EXPECT_THAT(findings(analysis, 10), Contains(testing::ContainsRegex("p (=|<) [0-9.]+, corrected (< )?[0-9.]+")));
}

class SpanFindings : public FindingsTest {
 protected:
  // Keeps a quarter of the positions; of each of eight spans the share that `recall` says, in all layers and heads.
  static void add(TraceReplay& replay, const std::string& policy, const std::vector<double>& recall) {
    ReplayResult& result = add_result(replay, policy, 25, about(0.5, 0.1));
    result.measures[Measure::span_recall].shape = {2, 4, static_cast<Index>(recall.size())};
    for (int i = 0; i < 8; ++i) {
      for (const double share : recall)
        result.measures[Measure::span_recall].numbers.push_back(static_cast<float>(share));
    }
  }
  static TraceReplay replay() {
    MadeReplay made{.queries = 30};
    for (int i = 0; i < 8; ++i) made.spans.push_back({10 * i, 10 * i + 5, "fact " + std::to_string(i)});
    return made.replay();
  }
};

TEST_F(SpanFindings, ChanceIsNotPraised) {
  TraceReplay a = replay();
  add(a, "random", {0.25, 0.2, 0.3, 0.24, 0.26, 0.22, 0.28, 0.25});
  // The most of all, but of one span alone, as whoever keeps the last positions does.
  add(a, "recent", {0, 0, 0, 0, 0, 0.6, 1, 1});
  const Analysis analysis = analysis_of({a});
  ASSERT_EQ(analysis.span_excesses.size(), 2u);
  EXPECT_NEAR(analysis.span_excesses[0].mean, 0, 1e-6);
  EXPECT_NEAR(analysis.span_excesses[1].mean, 0.075, 1e-6);
  EXPECT_NEAR(analysis.span_excesses[1].kept_share, 0.25, 1e-12);
  EXPECT_LT(analysis.span_excesses[1].interval.low, 0);
  EXPECT_THAT(
      findings(analysis, 10),
      Contains(StartsWith("No policy surely keeps more of the annotated spans than of the whole prompt at capacity 25; "
                          "the largest difference is that of recent: 32.5 % of their positions and 25 % of all")));
}

TEST_F(SpanFindings, WhatChanceDoesNotExplainIsTold) {
  TraceReplay a = replay();
  add(a, "random", {0.25, 0.2, 0.3, 0.24, 0.26, 0.22, 0.28, 0.25});
  add(a, "snapkv", {0.5, 0.6, 0.55, 0.45, 0.5, 0.65, 0.5, 0.55});
  const Analysis analysis = analysis_of({a});
  EXPECT_THAT(findings(analysis, 10),
              Contains(AllOf(StartsWith("snapkv surely keeps more of the annotated spans than of the whole prompt"),
                             HasSubstr("53.8 % of their positions and 25 % of all, +28.8 points ["))));
  // Student's t of eight spans: (0.5375 − 0.25) ± 2.365 · 0.0232.
  const SpanExcess& excess = analysis.span_excesses[1];
  EXPECT_NEAR(excess.mean, 0.2875, 1e-6);
  EXPECT_NEAR(excess.interval.high - excess.mean, 2.3646 * 0.0640870 / std::sqrt(8.0), 1e-4);
  EXPECT_EQ(excess.spans, 8);
}

TEST_F(SpanFindings, IntervalsOfFewSpansAreOfWhatAShareCanBe) {
  TraceReplay a = MadeReplay{.queries = 30, .spans = {{0, 5, "first"}, {20, 25, "second"}}}.replay();
  add(a, "snapkv", {0.2, 0.5});
  const SpanExcess excess = analysis_of({a}).span_excesses.front();
  // Student's t of two spans alone: 0.1 ± 12.7 · 0.15.
  EXPECT_NEAR(excess.mean, 0.1, 1e-6);
  EXPECT_NEAR(excess.interval.low, -0.25, 1e-9) << "as if no span were kept";
  EXPECT_NEAR(excess.interval.high, 0.75, 1e-9) << "as if all of them were";
}

TEST_F(FindingsTest, EqualPoliciesShareTheFirstPlace) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "tova", "recent"}) add_result(a, policy, 16, about(0.5, 0.1));
  add_result(a, "random", 16, about(0.9, 0.1));
  const Analysis analysis = analysis_of({a});
  EXPECT_THAT(findings(analysis, 10), Contains(StartsWith("snapkv, tova and recent have the smallest layer error")));
  for (const ComparisonRow& row : analysis.comparison) {
    if (!row.difference) continue;
    EXPECT_EQ(std::isnan(row.difference->p_value), row.key.policy != "random")
        << "equal in every pair: nothing to test";
    if (row.key.policy == "random") {
      EXPECT_EQ(row.difference->adjusted, row.difference->p_value) << "and nothing to correct for";
    }
  }
}

TEST_F(FindingsTest, WhereNothingIsEvictedThereIsNoWinner) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "tova"}) add_result(a, policy, 100, about(0, 0));
  const Analysis analysis = analysis_of({a});
  EXPECT_THAT(findings(analysis, 10),
              ElementsAre("Nothing is evicted: at these capacities every policy keeps the whole prompt."));
  EXPECT_FALSE(analysis.options.goal) << "an error of 0 is no goal";
}

TEST_F(FindingsTest, TheOracleIsAheadByWhatBothWereReplayedOn) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "oracle-attention", 16, about(0.2, 0));
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add_result(b, "snapkv", 16, about(0.1, 0));
  EXPECT_THAT(findings(analysis_of({a, b}), 10),
              Contains(AllOf(HasSubstr("of oracle-attention is 0.205"), HasSubstr("snapkv, 0.505"))));
}

TEST_F(FindingsTest, AnOracleThatIsNoBetterPromisesNothing) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, about(0.2, 0));
  add_result(a, "oracle-attention", 16, about(0.5, 0));
  EXPECT_THAT(findings(analysis_of({a}), 10), Each(Not(HasSubstr("still be gained"))));
}

TEST_F(FindingsTest, AllThatIsKnownOfTheTracesIsThere) {
  TraceReplay a = MadeReplay{.queries = 30, .spans = {{1, 4, "x"}}}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0.1), about(0.5, 0.1));
  add_result(a, "tova", 16, about(0.5, 0.2), about(0.5, 0.2));
  TraceReplay earlier = MadeReplay{.eviction_position = 90, .queries = 40, .spans = {{1, 4, "x"}}}.replay();
  add_result(earlier, "snapkv", 16, about(0.5, 0.1), about(0.5, 0.1));
  const Analysis analysis = analysis_of({a, earlier});
  ASSERT_EQ(analysis.traces.size(), 1u);
  EXPECT_THAT(analysis.traces[0].eviction_positions, ElementsAre(100));
  EXPECT_THAT(analysis.traces[0].other_eviction_positions, ElementsAre(90)) << "tova was not replayed there";
  EXPECT_EQ(analysis.traces[0].evaluation_queries, 30);
  EXPECT_EQ(analysis.traces[0].spans.size(), 1u);
  EXPECT_EQ(analysis.by_layer.size(), 4u);
  EXPECT_EQ(analysis.by_head.size(), 2u * 2 * 4);
  AnalysisOptions short_options;
  short_options.details = false;
  EXPECT_THAT(analysis_of({a}, short_options).by_layer, IsEmpty());
}

}  // namespace
}  // namespace kvreplay
