// Budgets that look at the heads, while tokens come.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "decode/plain_decoding.h"
#include "replay/engine.h"
#include "replay/replay.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

constexpr int kCapacity = 16;
constexpr int kPrompt = 40;
constexpr int kTokens = 80;

// AdaKV's rule over caches of unequal length, told again: their mean is held against the capacity, the best of all
// heads are counted, and no head is left more than it has.
TEST(AdaptiveBudget, DividesWhatUnequalCachesHold) {
  const RandomTrace shape{
      .num_attention_heads = 6, .num_key_value_heads = 3, .prompt_length = kPrompt, .num_tokens = kTokens};
  constexpr int kWindow = 4;
  constexpr double kFloor = 0.25;
  constexpr int kRanked = kCapacity - kWindow;
  bool unequal = false;
  expect_kept(
      shape, "snapkv(window=4,kernel=1)+adakv(floor=0.25,normalize=false,across=kv)+every(3)",
      std::to_string(kCapacity), [](const std::vector<PlainHead>&) {},
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        if ((t - (kPrompt - 1)) % 3 != 0) return;
        std::size_t sum = 0;
        for (const std::vector<int>& cache : caches) sum += cache.size();
        if (sum / caches.size() <= kCapacity) return;
        std::vector<std::vector<double>> scores;
        std::vector<std::pair<double, std::size_t>> all;
        for (std::size_t head = 0; head < heads.size(); ++head) {
          std::vector<double>& own = scores.emplace_back(caches[head].size() - kWindow, 0.0);
          for (int member = 0; member < heads[head].group_size(); ++member) {
            for (int query = t - kWindow + 1; query <= t; ++query) {
              std::vector<int> seen = caches[head];
              std::erase_if(seen, [query](int position) { return position > query; });
              const std::vector<double> paid = heads[head].attention(member, query, seen);
              for (std::size_t n = 0; n < own.size(); ++n) own[n] += paid[n];
            }
          }
          for (const double score : own) all.emplace_back(score, head);
        }
        std::ranges::sort(all, [](const auto& a, const auto& b) { return a.first > b.first; });
        const std::size_t places = std::min(all.size(), static_cast<std::size_t>(kRanked) * heads.size());
        std::vector<int> won(heads.size(), 0);
        for (std::size_t i = 0; i < places; ++i) ++won[all[i].second];
        for (std::size_t head = 0; head < heads.size(); ++head) {
          const double share = won[head] * (1 - kFloor) + std::floor(kRanked * kFloor);
          const int count = std::min(static_cast<int>(std::nearbyint(share)), static_cast<int>(scores[head].size()));
          std::vector<int> left;
          for (const int place : places_of_largest(scores[head], count)) {
            left.push_back(caches[head][static_cast<std::size_t>(place)]);
          }
          left.insert(left.end(), caches[head].end() - kWindow, caches[head].end());
          caches[head] = left;
          unequal = unequal || left.size() != caches[0].size();
        }
      });
  EXPECT_TRUE(unequal);
}

std::vector<ReplayResult> results_of(const RandomTrace& shape, const std::vector<std::string>& specs,
                                     const std::string& capacity, std::optional<Granularity> granularity = {}) {
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest request = make_request(specs, {capacity}, granularity);
  request.strict = true;
  return std::move(replay({&trace, 1}, request).front().results);
}

TEST(SurveyingBudget, StaysAsThePromptWasDivided) {
  for (const std::vector<int>& windows : {std::vector<int>{}, {0, 24, 24, 0}}) {
    const RandomTrace shape{.num_layers = 4, .prompt_length = kPrompt, .num_tokens = kTokens, .layer_windows = windows};
    for (const std::string spec : {"cake(window=4)", "snapkv(window=4)+cake(window=4)", "snapkv(window=4)+global"}) {
      const std::vector<ReplayResult> found = results_of(shape, {spec, spec + "+every(4)"}, "16");
      const ReplayResult& once = found[0];
      const ReplayResult& again = found[1];
      std::vector<std::size_t> counts;
      for (std::size_t i = 0; i < once.kept.sets.size(); ++i) {
        const std::span<const int> kept = once.kept.sets[i].kept();
        counts.push_back(kept.size());
        const bool sliding = !windows.empty() && windows[i / static_cast<std::size_t>(once.kept.sets_per_layer)] > 0;
        const Residency& set = again.kept.sets[i];
        EXPECT_TRUE(std::ranges::equal(set.kept(), kept)) << spec;
        if (sliding) continue;  // which leaves some behind
        for (int query = kPrompt; query < kTokens; ++query) {
          EXPECT_EQ(set.count_at(query, kPrompt), static_cast<int>(kept.size()) + (query - kPrompt) % 4 + 1)
              << spec << " at " << query;
        }
      }
      EXPECT_NE(std::ranges::min(counts), std::ranges::max(counts)) << spec;
    }
  }
}

TEST(SurveyingBudget, IsTheSameForAllWhereThePromptIsHeldWhole) {
  const RandomTrace shape{.num_layers = 3, .prompt_length = 30, .num_tokens = kTokens};
  const std::vector<ReplayResult> found =
      results_of(shape, {"snapkv(window=4)+cake(window=4)+every(2)", "snapkv(window=4)+every(2)"}, "50");
  EXPECT_EQ(found[0].kept.sets, found[1].kept.sets);
  EXPECT_FALSE(found[0].kept.sets.front().is_one_eviction());
}

}  // namespace
}  // namespace kvreplay::test
