// What parameters change, against numbers worked out by hand.
#include "analysis/parameter_effects.h"

#include <gmock/gmock.h>

namespace kvreplay {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

PolicyRow row(const std::string& policy, const std::string& capacity, double layer_error) {
  PolicyRow result;
  result.policy = policy;
  result.capacity_request = capacity;
  result.layer_error = layer_error;
  return result;
}

std::vector<std::string> values_of(const ParameterEffect& effect) {
  std::vector<std::string> values;
  for (const ParameterValue& value : effect.values) values.push_back(value.value);
  return values;
}

constexpr double kExact = 1e-12;

TEST(ParameterEffects, AFullGridIsAveragedOverEverythingElse) {
  // snapkv's defaults are window=32 and kernel=5.
  const auto effects = parameter_effects({
      row("snapkv(window=16)", "64", 0.40),
      row("snapkv", "64", 0.30),
      row("snapkv(window=16,kernel=3)", "64", 0.50),
      row("snapkv(kernel=3)", "64", 0.20),
      row("snapkv(window=16)", "128", 0.20),
      row("snapkv", "128", 0.10),
      row("snapkv(window=16,kernel=3)", "128", 0.30),
      row("snapkv(kernel=3)", "128", 0.20),
      row("tova", "64", 9),
  });
  ASSERT_THAT(effects, SizeIs(2));
  EXPECT_EQ(effects[0].method, "snapkv");
  EXPECT_EQ(effects[0].parameter, "window");
  EXPECT_EQ(effects[0].groups, 4) << "two kernels at two capacities";
  EXPECT_THAT(values_of(effects[0]), ElementsAre("16", "32"));
  EXPECT_THAT(effects[0].values[0].layer_error, DoubleNear(0.35, kExact));
  EXPECT_THAT(effects[0].values[1].layer_error, DoubleNear(0.20, kExact));
  EXPECT_THAT(effects[0].values[0].difference, DoubleNear(0.15, kExact));
  EXPECT_EQ(effects[0].values[1].difference, 0);
  EXPECT_THAT(effects[0].range, DoubleNear(0.15, kExact));
  EXPECT_EQ(effects[1].parameter, "kernel");
  EXPECT_THAT(values_of(effects[1]), ElementsAre("3", "5"));
  EXPECT_THAT(effects[1].values[0].layer_error, DoubleNear(0.30, kExact));
  EXPECT_THAT(effects[1].values[1].layer_error, DoubleNear(0.25, kExact));
}

TEST(ParameterEffects, OnlyGroupsWithEveryValueCount) {
  const auto effects = parameter_effects({
      row("snapkv(window=8)", "64", 0.6), row("snapkv(window=16)", "64", 0.4), row("snapkv", "64", 0.2),
      row("snapkv(kernel=7)", "64", 0.1),            // no other windows with this kernel
      row("snapkv(window=16,kernel=7)", "64", 0.8),  // nor does this one complete them
  });
  ASSERT_THAT(effects, SizeIs(2));
  EXPECT_EQ(effects[0].groups, 1);
  EXPECT_THAT(values_of(effects[0]), ElementsAre("8", "16", "32")) << "as numbers, not as text";
  EXPECT_THAT(effects[0].values[2].layer_error, DoubleNear(0.2, kExact));
  EXPECT_EQ(effects[1].groups, 2) << "kernels are compared at the windows 16 and 32";
  EXPECT_THAT(effects[1].values[0].layer_error, DoubleNear(0.3, kExact));
  EXPECT_THAT(effects[1].values[1].layer_error, DoubleNear(0.45, kExact));
}

TEST(ParameterEffects, WhereNothingIsBalancedNothingIsClaimed) {
  const auto effects = parameter_effects({row("snapkv(window=8,kernel=3)", "64", 0.6), row("snapkv", "64", 0.2)});
  ASSERT_THAT(effects, SizeIs(2));
  for (const ParameterEffect& effect : effects) {
    EXPECT_EQ(effect.groups, 0);
    EXPECT_EQ(effect.range, 0);
  }
}

TEST(ParameterEffects, WhatLeavesNothingToChooseOrIsOfOtherPlacesDoesNotCount) {
  std::vector<PolicyRow> rows = {row("snapkv", "64", 0.2),  row("snapkv(window=64)", "64", 0.9),
                                 row("snapkv", "128", 0.3), row("snapkv(window=64)", "128", 0.4),
                                 row("snapkv", "256", 0.1), row("snapkv(window=64)", "256", 0.7)};
  rows[1].nothing_to_choose = true;
  rows[5].same_places = 1;  // some trace lacks it
  const auto effects = parameter_effects(rows);
  ASSERT_THAT(effects, SizeIs(1));
  EXPECT_EQ(effects[0].groups, 1);
  EXPECT_THAT(effects[0].range, DoubleNear(0.1, kExact));
}

TEST(ParameterEffects, LaterPartsAndNestedSpecsHaveTheirOwn) {
  const auto parts = parameter_effects({
      row("snapkv+adakv", "64", 0.3), row("snapkv+adakv(floor=0.5)", "64", 0.4),
      row("snapkv", "64", 0.5),  // another method: no part of it
  });
  ASSERT_THAT(parts, SizeIs(1));
  EXPECT_EQ(parts[0].method, "snapkv+adakv");
  EXPECT_EQ(parts[0].parameter, "adakv.floor");
  EXPECT_EQ(parts[0].groups, 1);

  const auto nested = parameter_effects({
      row("criticalkv(base=snapkv(window=16))", "64", 0.3),
      row("criticalkv(base=snapkv(window=8))", "64", 0.2),
  });
  ASSERT_THAT(nested, SizeIs(1));
  EXPECT_EQ(nested[0].parameter, "base.window");
  EXPECT_EQ(nested[0].groups, 1);
  EXPECT_EQ(nested[0].values[0].difference, 0);

  const auto methods = parameter_effects({
      row("criticalkv(base=snapkv(window=16))", "64", 0.3),
      row("criticalkv(base=tova)", "64", 0.2),
  });
  ASSERT_THAT(methods, SizeIs(1));
  EXPECT_EQ(methods[0].parameter, "base");
  EXPECT_THAT(values_of(methods[0]), ElementsAre("snapkv(window=16)", "tova"));
}

TEST(ParameterEffects, NothingVariesNothingIsSaid) {
  EXPECT_THAT(parameter_effects({}), IsEmpty());
  EXPECT_THAT(parameter_effects({row("full", "all", 0), row("snapkv", "64", 1), row("snapkv", "128", 1)}), IsEmpty());
}

TEST(RankingExcerptTest, ShowsTheBestAndWhatTheyAreComparedWith) {
  std::vector<PolicyRow> rows = {row("full", "all", 0)};
  for (int window = 1; window <= 50; ++window) {
    rows.push_back(row("snapkv(window=" + std::to_string(window) + ")", "64", 0.01 * window));
  }
  rows.push_back(row("random", "64", 0.9));
  rows.push_back(row("snapkv(window=1)", "128", 0.1));
  const RankingExcerpt few = excerpt(rows, 60, 10);
  EXPECT_EQ(few.left_out, 0u);
  EXPECT_THAT(few.rows, SizeIs(rows.size()));
  const RankingExcerpt many = excerpt(rows, 40, 10);
  EXPECT_EQ(many.left_out, 40u);
  ASSERT_THAT(many.rows, SizeIs(13));
  EXPECT_EQ(many.rows[0].policy, "full");
  EXPECT_EQ(many.rows[10].policy, "snapkv(window=10)");
  EXPECT_EQ(many.rows[11].policy, "random");
  EXPECT_EQ(many.rows[12].capacity_request, "128");
}

}  // namespace
}  // namespace kvreplay
