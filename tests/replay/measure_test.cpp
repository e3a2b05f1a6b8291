#include "replay/measure.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <string_view>
#include <variant>

#include "base/error.h"

namespace kvreplay {
namespace {

using Per = MeasureTraits::Per;
using testing::ElementsAre;
using testing::Not;
using testing::SizeIs;

double of_head(Measure measure, const Eigen::RowVectorXd& full, const Eigen::RowVectorXd& evicted) {
  const Eigen::RowVectorXd difference = evicted - full;
  const HeadOutcome outcome{
      .full = full, .evicted = evicted, .difference = difference, .full_mass = 4, .cached_mass = 3};
  return std::get<MeasureFunction<HeadOutcome>>(traits_of(measure).definition)(outcome);
}

double of_layer(double full, double difference) {
  return std::get<MeasureFunction<LayerOutcome>>(traits_of(Measure::layer_error).definition)(
      {.full = full, .difference = difference, .change = 0, .residual = 1});
}

double of_residual(double change, double residual) {
  return std::get<MeasureFunction<LayerOutcome>>(traits_of(Measure::residual_error).definition)(
      {.full = 1, .difference = 1, .change = change, .residual = residual});
}

double of_step(Measure measure, const StepOutcome& outcome) {
  return std::get<MeasureFunction<StepOutcome>>(traits_of(measure).definition)(outcome);
}

double of_model(Measure measure, const ModelOutcome& outcome) {
  return std::get<MeasureFunction<ModelOutcome>>(traits_of(measure).definition)(outcome);
}

// As docs/measures.md has them, zeros included.
TEST(Measure, FollowsItsDefinition) {
  const Eigen::RowVectorXd zero = Eigen::RowVectorXd::Zero(2);
  const Eigen::RowVectorXd a{{3, 4}};
  const Eigen::RowVectorXd b{{4, -3}};
  EXPECT_DOUBLE_EQ(of_head(Measure::head_error, a, zero), 1);
  EXPECT_DOUBLE_EQ(of_head(Measure::head_error, a, b), std::sqrt(50) / 5);
  EXPECT_EQ(of_head(Measure::head_error, zero, zero), 0);
  EXPECT_EQ(of_head(Measure::head_error, zero, a), 1);
  EXPECT_DOUBLE_EQ(of_head(Measure::cosine, a, 2 * a), 1);
  EXPECT_DOUBLE_EQ(of_head(Measure::cosine, a, b), 0);
  EXPECT_EQ(of_head(Measure::cosine, zero, zero), 1);
  EXPECT_EQ(of_head(Measure::cosine, zero, a), 0);
  EXPECT_EQ(of_head(Measure::cosine, a, zero), 0);
  EXPECT_DOUBLE_EQ(of_head(Measure::attention_recall, a, b), 0.75);
  EXPECT_DOUBLE_EQ(of_layer(4, 1), 0.25);
  EXPECT_EQ(of_layer(0, 0), 0);
  EXPECT_EQ(of_layer(0, 2), 1);
  EXPECT_DOUBLE_EQ(of_residual(1, 8), 0.125);
  EXPECT_EQ(of_residual(0, 0), 0);
  EXPECT_EQ(of_residual(1, 0), 1);
  EXPECT_TRUE(std::isnan(of_residual(1, std::nan(""))));
  const StepOutcome step{.cached = 8,
                         .full_mass = 4,
                         .cached_mass = 3,
                         .top = 6,
                         .cached_top = 4,
                         .evicted = 3,
                         .steps_stayed = 30,
                         .left = 10,
                         .replaced = 2};
  EXPECT_EQ(of_step(Measure::late_hits, step), 0.25);
  EXPECT_EQ(of_step(Measure::late_hits, {.cached = 1, .full_mass = 0, .cached_mass = 0}), 0);
  EXPECT_EQ(of_step(Measure::late_hits, {.cached = 1, .full_mass = 1, .cached_mass = 1 + 1e-9}), 0);
  EXPECT_EQ(of_step(Measure::recurrence, step), 0.25);
  EXPECT_DOUBLE_EQ(of_step(Measure::turnover, step), 0.2);
  EXPECT_EQ(of_step(Measure::turnover, {.cached = 1, .evicted = 1, .left = 4}), 0) << "only what came since went";
  EXPECT_TRUE(std::isnan(of_step(Measure::turnover, {.cached = 1}))) << "nothing went";
  EXPECT_EQ(of_step(Measure::time_to_eviction, step), 10);
  EXPECT_TRUE(std::isnan(of_step(Measure::time_to_eviction, {.cached = 1})));
  EXPECT_EQ(std::get<MeasureFunction<SpanStepOutcome>>(traits_of(Measure::span_survival).definition)(
                {.held = 8, .cached = 2}),
            0.25);
  const ModelOutcome outcome{.divergence = 0.5, .loss = 3, .full_loss = 1, .same_most_likely = true};
  EXPECT_EQ(of_model(Measure::kl, outcome), 0.5);
  EXPECT_EQ(of_model(Measure::nll, outcome), 3);
  EXPECT_EQ(of_model(Measure::nll_increase, outcome), 2);
  EXPECT_EQ(of_model(Measure::agree, outcome), 1);
}

TEST(Measure, HasTheShapeOfWhatItIsCalculatedFrom) {
  const MeasureExtent extent{.query_heads = 4, .queries = 9, .spans = 2};
  EXPECT_THAT(layer_shape(traits_of(Measure::layer_error), extent), ElementsAre(9));
  EXPECT_THAT(layer_shape(traits_of(Measure::cosine), extent), ElementsAre(4, 9));
  EXPECT_THAT(layer_shape(traits_of(Measure::span_recall), extent), ElementsAre(4, 2));
  EXPECT_THAT(layer_shape(traits_of(Measure::kendall), extent), ElementsAre(4));
  EXPECT_THAT(layer_shape(traits_of(Measure::kl), extent), ElementsAre(9));
  EXPECT_THAT(layer_shape(traits_of(Measure::turnover), extent), ElementsAre(9));
  EXPECT_THAT(layer_shape(traits_of(Measure::span_survival), extent), ElementsAre(2, 9));
  EXPECT_THAT(table_shape(traits_of(Measure::kl), 3, extent), ElementsAre(9));
  EXPECT_THAT(table_shape(traits_of(Measure::layer_error), 3, extent), ElementsAre(3, 9));
  const Index without_ranks = numbers_per_layer(extent, false);
  std::size_t sum = 0;
  std::size_t ranks = 0;
  for (const MeasureTraits& measure : measures()) {
    if (!measure.is_of_layers()) continue;
    (measure.per == Per::head ? ranks : sum) += number_count(measure, extent);
  }
  EXPECT_EQ(without_ranks, static_cast<Index>(sum));
  EXPECT_EQ(numbers_per_layer(extent, true), static_cast<Index>(sum + ranks));
}

TEST(Measure, IsFoundByItsName) {
  std::set<std::string_view> names;
  for (const MeasureTraits& measure : measures()) {
    EXPECT_EQ(measure_named(measure.name), measure.measure);
    EXPECT_EQ(&traits_of(measure.measure), &measure);
    EXPECT_TRUE(names.insert(measure.name).second) << measure.name;
  }
  // The names in the enumeration are places in the list.
  const std::map<std::string, Measure> named = {{"layer_error", Measure::layer_error},
                                                {"head_error", Measure::head_error},
                                                {"attention_recall", Measure::attention_recall},
                                                {"cosine", Measure::cosine},
                                                {"span_recall", Measure::span_recall},
                                                {"spearman", Measure::spearman},
                                                {"kendall", Measure::kendall},
                                                {"residual_error", Measure::residual_error},
                                                {"residual_sum", Measure::residual_sum},
                                                {"cache_size", Measure::cache_size},
                                                {"late_hits", Measure::late_hits},
                                                {"recurrence", Measure::recurrence},
                                                {"turnover", Measure::turnover},
                                                {"time_to_eviction", Measure::time_to_eviction},
                                                {"span_survival", Measure::span_survival},
                                                {"kl", Measure::kl},
                                                {"nll", Measure::nll},
                                                {"nll_increase", Measure::nll_increase},
                                                {"agree", Measure::agree}};
  for (const auto& [name, measure] : named) EXPECT_EQ(measure_named(name), measure) << name;
  EXPECT_THAT(formulas<LayerOutcome>(), Not(SizeIs(0)));
  EXPECT_EQ(formulas<LayerOutcome>().size() + formulas<HeadOutcome>().size() + formulas<SpanOutcome>().size() +
                formulas<RankCorrelation>().size() + formulas<ModelOutcome>().size() +
                formulas<StreamOutcome>().size() + formulas<StepOutcome>().size() + formulas<SpanStepOutcome>().size(),
            measures().size())
      << "every measure is calculated from something";
  EXPECT_THROW(measure_named("layer_eror"), UsageError);
}

}  // namespace
}  // namespace kvreplay
