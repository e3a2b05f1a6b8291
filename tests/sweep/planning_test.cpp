// What planning a sweep costs: every policy is asked once, however many units there are.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "replay/engine.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"
#include "sweep/sweep.h"

namespace kvreplay {
namespace {

using test::RandomTrace;

// A ranking by position that counts how often it is asked what it needs.
class Asked : public Ranking {
 public:
  Requirements requirements() const override {
    ++times;
    return {.needs = {Need::window(4)}, .combinations = {{.weights = std::vector<float>(4, 0.25f)}}};
  }
  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.combined_attention(member, {.weights = std::vector<float>(4, 0.25f)}).attention,
                      scores.begin());
  }

  mutable int times = 0;
};

TEST(SweepPlanning, AsksAPolicyAsOftenForManyUnitsAsForFew) {
  const test::TemporaryFolder folder;
  std::vector<int> asked;
  for (const int layers : {1, 24}) {
    const auto path = folder / fmt::format("{}.h5", layers);
    RandomTrace{.num_layers = layers}.write(path);
    const TraceReader trace(path);
    const auto ranking = std::make_shared<Asked>();
    ReplayRequest request;
    for (int policy = 0; policy < 10; ++policy) {
      request.policies.push_back({.canonical = fmt::format("asked-{}", policy), .rule = ranking});
    }
    for (const char* capacity : {"8", "9", "10", "11"}) {
      request.capacities.push_back(CapacityRequest::parse(capacity));
    }
    ReplayEngine engine(std::span(&trace, 1), request);
    engine.limit_memory(Index{1} << 28);
    const std::vector<ReplayUnit> units = engine.units();
    EXPECT_GT(cost_of(engine, units).operations, 0);
    EXPECT_EQ(divide_units(engine, units, 3).size(), 3u);
    EXPECT_GT(engine.memory(), 0);
    engine.run(units,
               [](const ReplayUnit&, const std::vector<LayerResult>& results) { EXPECT_EQ(results.size(), 40u); });
    asked.push_back(ranking->times);
  }
  Buffer::keep_at_most(Index{256} << 20);
  EXPECT_EQ(asked[0], asked[1]);
  EXPECT_LE(asked[0], 2 * 10) << "what a trace lacks, and what a head is asked for";
}

// Evictions of one trace share what is calculated of a layer's output projection.
TEST(SweepPlanning, LeavesTogetherWhatSharesWork) {
  const test::TemporaryFolder folder;
  RandomTrace{.num_layers = 3}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest request;
  request.policies.push_back(make_policy("restkv(window=4)"));
  request.capacities.push_back(CapacityRequest::parse("9"));
  request.eviction_positions = {40, 60};
  const ReplayEngine engine(std::span(&trace, 1), request);
  ASSERT_GT(engine.cost({1, 0}).operations, engine.cost({0, 0}).operations);
  EXPECT_EQ(divide_units(engine, engine.units(), 1), (std::vector<std::vector<ReplayUnit>>{engine.units()}));
}

}  // namespace
}  // namespace kvreplay
