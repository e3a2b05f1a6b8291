// Aggregates and paired comparisons, against what is worked out by hand.
#include "analysis/comparison.h"

#include <gmock/gmock.h>
#include <omp.h>

#include <cmath>

#include "analysis/made_results.h"
#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::add_result;
using test::MadeReplay;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::SizeIs;

constexpr double kExact = 1e-6;  // numbers are float32 in files

test::MadeNumbers constant(double value) {
  return [value](int, int, int) { return value; };
}

class Comparison : public testing::Test {
 protected:
  ResultSet set_of(const std::vector<TraceReplay>& replays, const ResultFilter& filter = {}) const {
    test::write_made(folder_ / "x.h5", replays);
    const std::vector<std::filesystem::path> files = {folder_ / "x.h5"};
    return ResultSet::open(files, filter);
  }
  static std::vector<std::string> policies_of(const std::vector<ComparisonRow>& rows) {
    std::vector<std::string> policies;
    for (const ComparisonRow& row : rows) policies.push_back(row.key.policy);
    return policies;
  }

  test::TemporaryFolder folder_;
};

TEST_F(Comparison, TracesWeighTheSameWhateverTheirNumberOfQueriesAndLayers) {
  TraceReplay a = MadeReplay{.queries = 3}.replay();
  add_result(a, "snapkv", 16, constant(0.2));
  TraceReplay b = MadeReplay{.trace = "b.h5", .layers = 5, .eviction_position = 200, .queries = 40}.replay();
  add_result(b, "snapkv", 16, constant(0.6));
  const std::vector<ComparisonRow> rows = compare(set_of({a, b}), {});
  ASSERT_THAT(rows, SizeIs(1));
  EXPECT_NEAR(rows[0].distribution.mean, 0.4, kExact);
  EXPECT_NEAR(rows[0].distribution.worst, 0.6, kExact);
  EXPECT_NEAR(rows[0].kept, 16, kExact);
  EXPECT_NEAR(rows[0].kept_share, (0.16 + 0.08) / 2, kExact);
  EXPECT_EQ(rows[0].traces, 2);
  EXPECT_FALSE(rows[0].difference);
}

TEST_F(Comparison, OfATraceEveryEvictionPositionWeighsTheSame) {
  // Three evictions of one trace against a single one of another; the last queries of the first are the same.
  std::vector<TraceReplay> replays;
  for (const auto& [position, value] : {std::pair{60, 0.1}, {80, 0.2}, {90, 0.6}}) {
    add_result(replays.emplace_back(MadeReplay{.eviction_position = position, .queries = 100 - position}.replay()),
               "snapkv", 16, constant(value));
  }
  add_result(replays.emplace_back(MadeReplay{.trace = "b.h5"}.replay()), "snapkv", 16, constant(0.5));
  const ResultSet set = set_of(replays);
  EXPECT_NEAR(compare(set, {})[0].distribution.mean, (0.3 + 0.5) / 2, kExact);
  const auto by_position = compare(set, {.grouping = Grouping::parse("policy,evict-at")});
  ASSERT_THAT(by_position, SizeIs(4));
  EXPECT_EQ(by_position[0].key.eviction_position, 60);
  EXPECT_NEAR(by_position[0].distribution.mean, 0.1, kExact);
  EXPECT_EQ(by_position[0].key.capacity_request, "");
}

TEST_F(Comparison, QueriesThatSeveralEvictionsShareAreDrawnTogether) {
  // Each eviction sees the same error at the same query, so that more evictions add nothing to what is known.
  const auto by_query = [](int position) {
    return [position](int, int, int query) { return std::sin(1.3 * (position + query)); };
  };
  TraceReplay once = MadeReplay{.eviction_position = 80, .queries = 20}.replay();
  add_result(once, "snapkv", 16, by_query(80));
  TraceReplay again = MadeReplay{.eviction_position = 79, .queries = 20}.replay();
  again.evaluation_positions = once.evaluation_positions;
  add_result(again, "snapkv", 16, by_query(80));
  const ComparisonRow one = compare(set_of({once}), {})[0];
  const ComparisonRow two = compare(set_of({again, once}), {})[0];
  EXPECT_NEAR(one.interval.low, two.interval.low, kExact);
  EXPECT_NEAR(one.interval.high, two.interval.high, kExact);
  EXPECT_LT(one.interval.low, one.interval.high);
}

TEST_F(Comparison, QuantilesAreWeightedLikeMeans) {
  // 2 layers of 1 query and 2 layers of 3: the numbers 1, 1 weigh 1/4 each, the six others 1/12.
  TraceReplay a = MadeReplay{.queries = 1}.replay();
  add_result(a, "snapkv", 16, constant(1));
  TraceReplay b = MadeReplay{.trace = "b.h5", .queries = 3}.replay();
  add_result(b, "snapkv", 16, [](int layer, int, int query) { return 2 + layer * 3 + query; });
  const Distribution found = compare(set_of({a, b}), {})[0].distribution;
  // Middles of the weights in twelfths: 1.5, 4.5, 6.5, …, 11.5. The median is at 1.5 + 0.5 · 10 = 6.5, p90 at 10.5.
  EXPECT_NEAR(found.mean, (1 + 4.5) / 2, kExact);
  EXPECT_NEAR(found.median, 2, kExact);
  EXPECT_NEAR(found.p90, 6, kExact);
  EXPECT_NEAR(found.worst, 7, kExact);
}

TEST(WeightedDistribution, WithEqualWeightsIsThePlainOne) {
  const std::vector<float> numbers = {5, 1, 4, 8, 2, 9, 3};
  std::vector<WeightedNumber> weighted;
  for (const float number : numbers) weighted.push_back({number, 0.2});
  for (const bool lower_is_better : {true, false}) {
    const Distribution plain = distribution_of(numbers, lower_is_better);
    const Distribution with_weights = weighted_distribution(weighted, lower_is_better);
    EXPECT_NEAR(plain.mean, with_weights.mean, kExact);
    EXPECT_NEAR(plain.median, with_weights.median, kExact);
    EXPECT_NEAR(plain.p90, with_weights.p90, kExact);
    EXPECT_EQ(plain.worst, with_weights.worst);
  }
  EXPECT_EQ(weighted_distribution({{3, 0.5}}, true).median, 3);
  // By hand: middles at 0.5, 2 and 3.5, so that p90 is at 0.5 + 0.9 · 3 = 3.2.
  EXPECT_NEAR(weighted_distribution({{4, 1}, {1, 1}, {2, 2}}, true).p90, 2 + 2 * 1.2 / 1.5, kExact);
  EXPECT_NEAR(weighted_distribution({{4, 1}, {1, 1}, {2, 2}}, true).median, 2, kExact);
}

TEST_F(Comparison, PairsAreOfTheSameLayerHeadAndQuery) {
  const auto noise = [](int layer, int head, int query) { return 0.5 + 0.3 * std::sin(layer * 31 + head * 7 + query); };
  TraceReplay a = MadeReplay{.queries = 16}.replay();
  add_result(a, "snapkv", 16, noise, noise);
  add_result(a, "better", 16, constant(0), [&](int l, int h, int q) { return noise(l, h, q) - 0.125; });
  // The same numbers, but those of the next query: only their mean is the same.
  add_result(a, "shifted", 16, constant(0), [&](int l, int h, int q) { return noise(l, h, (q + 1) % 16); });
  const auto rows = compare(set_of({a}), {.measure = Measure::head_error, .baseline = "snapkv"});
  ASSERT_THAT(policies_of(rows), testing::UnorderedElementsAre("better", "snapkv", "shifted"));
  for (const ComparisonRow& row : rows) {
    EXPECT_EQ(row.difference.has_value(), row.key.policy != "snapkv") << "not with itself";
    if (row.key.policy == "better") {
      EXPECT_NEAR(row.difference->mean, -0.125, kExact);
      EXPECT_NEAR(row.difference->interval.low, -0.125, kExact) << "no query differs from another";
      EXPECT_NEAR(row.difference->interval.high, -0.125, kExact);
      EXPECT_EQ(row.difference->wins, 1);
      EXPECT_EQ(row.difference->pairs, 2 * 4 * 16);
      EXPECT_LT(row.difference->p_value, 1e-6);
      const double baseline = rows[0].key.policy == "snapkv" ? rows[0].distribution.mean : rows[1].distribution.mean;
      EXPECT_NEAR(row.difference->relative, -0.125 / baseline, 1e-3);
    }
    if (row.key.policy == "shifted") {
      EXPECT_NEAR(row.difference->mean, 0, kExact);
      EXPECT_LT(row.difference->interval.low, -1e-4);
      EXPECT_GT(row.difference->p_value, 0.5);
    }
  }
}

TEST_F(Comparison, TiesWinHalf) {
  TraceReplay a = MadeReplay{.layers = 1, .queries = 4}.replay();
  add_result(a, "snapkv", 16, constant(0.5));
  add_result(a, "other", 16, [](int, int, int query) { return query == 0 ? 0.25 : query == 1 ? 0.75 : 0.5; });
  const auto rows = compare(set_of({a}), {.baseline = "snapkv"});
  const ComparisonRow& other = rows[rows[0].key.policy == "other" ? 0 : 1];
  EXPECT_DOUBLE_EQ(other.difference->wins, (1 + 0 + 0.5 + 0.5) / 4);
}

TEST_F(Comparison, WinsOfAMeasureOfWhichMoreIsBetter) {
  TraceReplay a = MadeReplay{.layers = 1, .query_heads = 1, .kv_heads = 1, .queries = 4}.replay();
  for (const auto& [policy, value] : {std::pair{"snapkv", 0.5f}, {"other", 0.75f}}) {
    add_result(a, policy, 16, constant(0)).measures[Measure::cosine] = {{1, 1, 4}, {value, value, value, value}};
  }
  const auto rows = compare(set_of({a}), {.measure = Measure::cosine, .baseline = "snapkv"});
  EXPECT_THAT(policies_of(rows), ElementsAre("other", "snapkv")) << "best first";
  EXPECT_EQ(rows[0].difference->wins, 1);
  EXPECT_NEAR(rows[0].difference->mean, 0.25, kExact);
}

TEST_F(Comparison, OnlyTracesWithBothArePaired) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, constant(0.5));
  add_result(a, "other", 16, constant(0.25));
  TraceReplay b = MadeReplay{.trace = "b.h5"}.replay();
  add_result(b, "other", 16, constant(0.75));
  const auto rows = compare(set_of({a, b}), {.baseline = "snapkv"});
  const ComparisonRow& other = rows[rows[0].key.policy == "other" ? 0 : 1];
  EXPECT_EQ(other.traces, 2);
  EXPECT_NEAR(other.distribution.mean, 0.5, kExact);
  EXPECT_EQ(other.difference->traces, 1);
  EXPECT_NEAR(other.difference->mean, -0.25, kExact);
  EXPECT_NEAR(other.difference->relative, -0.5, kExact);
}

TEST_F(Comparison, RowsStandByPlaceAndThenBestFirst) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "full", 0, constant(0));
  add_result(a, "snapkv", 32, [](int layer, int, int) { return layer == 0 ? 0.1 : 0.4; });
  add_result(a, "snapkv", 16, constant(0.3));
  add_result(a, "tova", 32, constant(0.2));
  const auto rows = compare(set_of({a}), {.grouping = Grouping::parse("policy,capacity,layer"), .baseline = "snapkv"});
  std::vector<std::string> order;
  for (const ComparisonRow& row : rows) {
    order.push_back(row.key.policy + " " + row.key.capacity_request + " " + std::to_string(row.key.layer));
  }
  EXPECT_THAT(order, ElementsAre("full all 0", "full all 1", "snapkv 32 0", "tova 32 0", "tova 32 1", "snapkv 32 1",
                                 "snapkv 16 0", "snapkv 16 1"));
  EXPECT_NEAR(rows[3].difference->mean, 0.1, kExact);
  EXPECT_NEAR(rows[4].difference->mean, -0.2, kExact);
  EXPECT_FALSE(rows[0].difference) << "the baseline is not there at that capacity";
}

TEST_F(Comparison, WhatKeepsEverythingIsABaselineOfEveryCapacity) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "full", 0, constant(0));
  add_result(a, "snapkv", 32, constant(0.1));
  add_result(a, "snapkv", 16, constant(0.3));
  const auto rows = compare(set_of({a}), {.baseline = "full"});
  EXPECT_NEAR(rows[1].difference->mean, 0.1, kExact);
  EXPECT_NEAR(rows[2].difference->mean, 0.3, kExact);
  EXPECT_TRUE(std::isnan(rows[2].difference->relative)) << "of an error of 0 nothing is a share";
}

TEST_F(Comparison, OfHeadsAndLayersChosen) {
  TraceReplay a = MadeReplay{.layers = 3}.replay();
  add_result(a, "snapkv", 16, constant(0), [](int layer, int head, int) { return layer + 0.1 * head; });
  const auto rows = compare(set_of({a}, {.layers = {2}}),
                            {.measure = Measure::head_error, .grouping = Grouping::parse("policy,layer,head")});
  ASSERT_THAT(rows, SizeIs(4));
  EXPECT_EQ(rows[3].key.layer, 2);
  EXPECT_EQ(rows[3].key.head, 3);
  EXPECT_NEAR(rows[3].distribution.mean, 2.3, kExact);
}

TEST_F(Comparison, SpansAreNoSeries) {
  const std::vector<Span> spans = {{1, 5, "x"}, {7, 9, "y"}};
  std::vector<TraceReplay> replays;
  for (const char* trace : {"a.h5", "b.h5", "c.h5"}) {
    TraceReplay& replay = replays.emplace_back(
        MadeReplay{.trace = trace, .layers = 1, .query_heads = 1, .kv_heads = 1, .spans = spans}.replay());
    const float first = trace[0] == 'a' ? 0 : 1;
    add_result(replay, "snapkv", 16, constant(0)).measures[Measure::span_recall] = {{1, 1, 2}, {first, 0.5f}};
  }
  const ResultSet set = set_of(replays);
  const ComparisonRow row = compare(set, {.measure = Measure::span_recall})[0];
  EXPECT_NEAR(row.distribution.mean, (0.25 + 0.75 + 0.75) / 3, kExact);
  EXPECT_EQ(row.distribution.worst, 0);
  EXPECT_TRUE(std::isnan(row.interval.low)) << "nothing is known of other spans of these traces";
  const ComparisonRow drawn =
      compare(set, {.measure = Measure::span_recall, .bootstrap = {.resampling = Resampling::traces}})[0];
  EXPECT_LT(drawn.interval.low, row.distribution.mean);
}

TEST_F(Comparison, WhatIsAskedAtOneCapacityDoesNotDependOnWhatWasSweptAtAnother) {
  const auto about = [](double error, double phase) {
    return [=](int, int, int query) { return error + 0.2 * std::sin(2.4 * query + phase); };
  };
  TraceReplay a = MadeReplay{.queries = 30}.replay();
  add_result(a, "snapkv", 16, about(0.5, 0));
  add_result(a, "tova", 16, about(0.52, 1));
  add_result(a, "recent", 16, about(0.6, 2));
  const auto at_16 = [&](const TraceReplay& replay) {
    std::vector<double> adjusted;
    for (const ComparisonRow& row : compare(set_of({replay}), {.baseline = "snapkv"})) {
      if (row.key.capacity_request == "16" && row.difference) adjusted.push_back(row.difference->adjusted);
    }
    return adjusted;
  };
  const std::vector<double> alone = at_16(a);
  add_result(a, "snapkv", 32, about(0.4, 0));
  for (int sinks = 5; sinks < 40; ++sinks) {
    add_result(a, "streamingllm(sinks=" + std::to_string(sinks) + ")", 32, about(0.4, sinks));
  }
  EXPECT_EQ(at_16(a), alone);
}

TEST_F(Comparison, RowsAreMeansOverTheSameOthers) {
  TraceReplay a = MadeReplay{}.replay();
  for (const char* policy : {"snapkv", "tova", "recent"}) {
    add_result(a, policy, 16, constant(0.6));
    add_result(a, policy, 32, constant(0.4));
  }
  // A grid at one capacity alone would make it look the better one.
  for (const char* policy : {"restkv", "restkv(alpha=0.5)"}) add_result(a, policy, 16, constant(0.1));
  const ResultSet set = set_of({a});
  std::vector<std::string> notes;
  const Grouping by_capacity = Grouping::parse("capacity");
  const auto rows = compare(over_the_same_others(set, by_capacity, notes), {.grouping = by_capacity});
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_NEAR(rows[0].distribution.mean, 0.6, kExact) << "and nothing of restkv";
  EXPECT_NEAR(rows[1].distribution.mean, 0.4, kExact);
  EXPECT_THAT(notes, testing::ElementsAre(HasSubstr("left out are 2 results that not all rows have")));

  notes.clear();
  const Grouping by_policy = Grouping::parse("policy");
  const auto policies = compare(over_the_same_others(set, by_policy, notes), {.grouping = by_policy});
  EXPECT_EQ(policies.size(), 3u);
  for (const ComparisonRow& row : policies) EXPECT_NEAR(row.distribution.mean, 0.5, kExact);
  EXPECT_THAT(notes, testing::ElementsAre(HasSubstr("left out are restkv and 1 more row, which lack some")));

  notes.clear();
  EXPECT_EQ(over_the_same_others(set, {}, notes).results().size(), 8u) << "settings are told apart";
  EXPECT_TRUE(notes.empty());
}

TEST_F(Comparison, SameBitsForAnyNumberOfThreads) {
  std::vector<TraceReplay> replays;
  for (const char* trace : {"a.h5", "b.h5"}) {
    TraceReplay& replay = replays.emplace_back(MadeReplay{.trace = trace, .queries = 30}.replay());
    for (const char* policy : {"snapkv", "tova", "recent", "random", "h2o"}) {
      const double phase = policy[0];
      add_result(replay, policy, 16, [phase](int l, int, int q) { return 1 + std::sin(phase + l + q * phase); });
    }
  }
  const ResultSet set = set_of(replays);
  const int threads = omp_get_max_threads();
  std::vector<std::vector<ComparisonRow>> found;
  for (const int count : {1, 2, 7}) {
    omp_set_num_threads(count);
    found.push_back(compare(set, {.grouping = Grouping::parse("policy,capacity,layer"), .baseline = "snapkv"}));
  }
  omp_set_num_threads(threads);
  for (const auto& rows : found) {
    ASSERT_EQ(rows.size(), found[0].size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(rows[i].key, found[0][i].key);
      EXPECT_EQ(rows[i].interval.low, found[0][i].interval.low);
      if (!rows[i].difference) continue;
      EXPECT_EQ(rows[i].difference->interval.high, found[0][i].difference->interval.high);
      EXPECT_EQ(rows[i].difference->adjusted, found[0][i].difference->adjusted);
      EXPECT_GE(rows[i].difference->adjusted, rows[i].difference->p_value);
    }
  }
}

TEST_F(Comparison, WhatCannotBeAskedForIsRefused) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, constant(0.5));
  const ResultSet set = set_of({a});
  const auto usage = [&](const ComparisonOptions& options) {
    return test::message_of<UsageError>([&]() { compare(set, options); });
  };
  EXPECT_THAT(usage({.baseline = "tova"}), HasSubstr("no result is of policy tova"));
  EXPECT_THAT(usage({.grouping = Grouping::parse("policy,head")}), HasSubstr("layer error has no heads"));
  EXPECT_THAT(test::message_of<Error>([&]() { compare(set, {.measure = Measure::span_recall}); }),
              HasSubstr("no result has a span recall: their traces have no spans"));
  EXPECT_THAT(test::message_of<UsageError>([]() { Grouping::parse("policy,layers"); }),
              HasSubstr("Did you mean 'layer'?"));
  EXPECT_THAT(test::message_of<UsageError>([]() { Grouping::parse(""); }), HasSubstr("evict-at"));
}

// One number per query, however many layers and heads the model has.
class LossComparison : public Comparison {
 protected:
  ResultSet made(const ResultFilter& filter = {}) const {
    TraceReplay a = MadeReplay{.layers = 5, .queries = 8}.replay();
    test::add_loss(add_result(a, "snapkv", 16, constant(0.5)), [](int query) { return query; });
    test::add_loss(add_result(a, "tova", 16, constant(0.4)), [](int query) { return query < 4 ? 2 : 10; });
    TraceReplay b = MadeReplay{.trace = "b.h5", .layers = 2, .eviction_position = 200, .queries = 40}.replay();
    test::add_loss(add_result(b, "snapkv", 16, constant(0.5)), [](int) { return 1.5; });
    test::add_loss(add_result(b, "tova", 16, constant(0.4)), [](int) { return 1.0; });
    return set_of({a, b}, filter);
  }
};

TEST_F(LossComparison, CountsEveryQueryOnce) {
  const std::vector<ComparisonRow> rows = compare(made(), {.measure = Measure::kl, .baseline = "snapkv"});
  ASSERT_THAT(policies_of(rows), ElementsAre("snapkv", "tova"));
  EXPECT_NEAR(rows[0].distribution.mean, (3.5 + 1.5) / 2, kExact);
  EXPECT_NEAR(rows[0].distribution.worst, 7, kExact);
  EXPECT_NEAR(rows[1].distribution.mean, (6.0 + 1.0) / 2, kExact);
  ASSERT_TRUE(rows[1].difference);
  EXPECT_NEAR(rows[1].difference->mean, 1, kExact);
  EXPECT_EQ(rows[1].difference->pairs, 8 + 40);
  // Better at query 3 of the first trace, equal at 2, and better at all of the second.
  EXPECT_NEAR(rows[1].difference->wins, (1.5 / 8 + 1) / 2, kExact);
  EXPECT_NEAR(rows[1].kept, 16, kExact) << "as of any measure";
}

TEST_F(LossComparison, ItsIntervalIsThatOfTheSameNumbersInASingleLayer) {
  TraceReplay a = MadeReplay{.layers = 1, .queries = 30}.replay();
  const auto wave = [](int query) { return 1 + std::sin(0.7 * query); };
  test::add_loss(add_result(a, "snapkv", 16, [&](int, int, int query) { return wave(query); }), wave);
  const ResultSet set = set_of({a});
  const std::vector<ComparisonRow> loss = compare(set, {.measure = Measure::kl});
  const std::vector<ComparisonRow> errors = compare(set, {});
  EXPECT_EQ(loss[0].interval.low, errors[0].interval.low);
  EXPECT_EQ(loss[0].interval.high, errors[0].interval.high);
}

TEST_F(LossComparison, ChosenLayersDoNotChangeIt) {
  const ResultSet set = made({.layers = {1}});
  EXPECT_THAT(set.read(0, Measure::layer_error).numbers, SizeIs(8));
  EXPECT_NEAR(compare(set, {.measure = Measure::kl})[0].distribution.mean, 2.5, kExact);
}

TEST_F(LossComparison, HasNoLayersToTellApart) {
  const ResultSet set = made();
  const auto usage = [&](const char* by) {
    return test::message_of<UsageError>(
        [&]() { compare(set, {.measure = Measure::kl, .grouping = Grouping::parse(by)}); });
  };
  EXPECT_EQ(usage("policy,layer"),
            "KL divergence is of the whole model, and has no layers: choose another measure, such as layer_error");
  EXPECT_EQ(usage("policy,head"),
            "KL divergence is of the whole model, and has no heads: choose another measure, such as head_error");
  const std::vector<ResultPair> pairs = {{1, 0}};
  const auto differences = paired_differences(set, pairs, Measure::kl, {});
  ASSERT_THAT(differences, SizeIs(1)) << "over all layers, and of none";
  EXPECT_EQ(differences[0].first, -1);
  EXPECT_NEAR(differences[0].second.mean, 2.5, kExact);
}

TEST_F(LossComparison, WhatWasNotMeasuredIsNamed) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, constant(0.5));
  const ResultSet offline = set_of({a});
  EXPECT_THAT(test::message_of<Error>([&]() { compare(offline, {.measure = Measure::kl}); }),
              HasSubstr("no result has a KL divergence: run the model on over what is kept, with kvreplay live"));
  EXPECT_THAT(test::message_of<Error>([&]() { compare(offline, {.measure = Measure::nll_increase}); }),
              HasSubstr("no result has an increase of the loss: run the model"));
  EXPECT_THAT(test::message_of<Error>([&]() { compare(offline, {.measure = Measure::residual_error}); }),
              HasSubstr("no result has a residual error: their traces have no residual_norm"));
  test::add_loss(a.results.back(), [](int) { return 1; });
  test::remove_layers(a.results.back());
  const ResultSet live = set_of({a});
  EXPECT_NEAR(compare(live, {.measure = Measure::kl})[0].distribution.mean, 1, kExact);
  EXPECT_THAT(test::message_of<Error>([&]() { compare(live, {}); }),
              HasSubstr("no result has a layer error: only the model's own loss was measured, which --measure kl"));
}

TEST_F(Comparison, ResidualErrorsAreRootsOfMeanSquares) {
  TraceReplay a = MadeReplay{.queries = 4}.replay();
  const auto add = [&](const char* policy, const std::vector<float>& numbers) {
    Table& table = add_result(a, policy, 16, constant(0.5)).measures[Measure::residual_error];
    table.shape = {2, 4};
    table.numbers = numbers;
  };
  add("snapkv", {4, 3, 3, 4, 0, 0, 0, 0});
  add("tova", {1, 1, 7, 7, 0, 0, 0, 0});
  const ResultSet set = set_of({a});
  const std::vector<ComparisonRow> rows = compare(set, {.measure = Measure::residual_error, .baseline = "snapkv"});
  ASSERT_THAT(policies_of(rows), ElementsAre("snapkv", "tova"));
  EXPECT_NEAR(rows[0].distribution.mean, 2.5, kExact);
  EXPECT_NEAR(rows[1].distribution.mean, std::sqrt(12.5), kExact);
  EXPECT_NEAR(rows[1].distribution.worst, 7, kExact);
  EXPECT_NEAR(rows[1].difference->mean, std::sqrt(12.5) - 2.5, kExact);
  EXPECT_NEAR(rows[1].difference->reference, 2.5, kExact);
  EXPECT_NEAR(rows[1].difference->relative, std::sqrt(12.5) / 2.5 - 1, kExact);
  EXPECT_EQ(rows[1].difference->wins, (4 * 0.5 + 2) / 8) << "query by query";
  EXPECT_LT(rows[1].interval.low, rows[1].distribution.mean);
  EXPECT_GT(rows[1].interval.high, rows[1].distribution.mean);
  const auto by_layer = compare(set, {.measure = Measure::residual_error, .grouping = Grouping::parse("policy,layer")});
  EXPECT_NEAR(by_layer[0].distribution.mean, std::sqrt(12.5), kExact);
  const std::vector<std::size_t> first = {0};
  EXPECT_NEAR(aggregate(set, first, Measure::residual_error, {})->estimate.mean, 2.5, kExact);
}

TEST_F(Comparison, PairedDifferencesAreOverAllLayersAndPerLayer) {
  TraceReplay a = MadeReplay{}.replay();
  add_result(a, "snapkv", 16, constant(0.5));
  add_result(a, "tova", 16, [](int layer, int, int) { return layer == 0 ? 0.25 : 0.625; });
  const ResultSet set = set_of({a});
  const std::vector<ResultPair> pairs = {{1, 0}};
  const auto differences = paired_differences(set, pairs, Measure::layer_error, {});
  ASSERT_THAT(differences, SizeIs(3));
  EXPECT_EQ(differences[0].first, -1);
  EXPECT_NEAR(differences[0].second.mean, (-0.25 + 0.125) / 2, kExact);
  EXPECT_NEAR(differences[1].second.mean, -0.25, kExact);
  EXPECT_NEAR(differences[2].second.mean, 0.125, kExact);
  EXPECT_EQ(differences[0].second.wins, 0.5);
  EXPECT_THAT(paired_differences(set, pairs, Measure::cosine, {}), SizeIs(0));
}

}  // namespace
}  // namespace kvreplay
