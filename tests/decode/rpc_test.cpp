// RPC against the rule of rpc/rpc_utils.py and qwen2_custom.py told again.
#include <gtest/gtest.h>

#include <algorithm>

#include "decode/plain_decoding.h"

namespace kvreplay::test {
namespace {

TEST(RPC, KeepsWhatItsCodeKeeps) {
  for (const int kernel : {1, 7}) {
    constexpr int kRecent = 4;
    constexpr int kStays = 5;  // of every kStretch tokens
    constexpr int kStretch = 15;
    const RandomTrace shape{.num_layers = 2, .prompt_length = 20, .num_tokens = 90};
    int compressions = 0;
    expect_kept(
        shape, "rpc(recent=4,compression=3,kernel=" + std::to_string(kernel) + ")", std::to_string(kStays + kRecent),
        [&](const std::vector<PlainHead>&) { compressions = 0; },
        [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
          const int generated = static_cast<int>(caches[0].size()) - shape.prompt_length;
          if (generated - compressions * kStays - kRecent != kStretch) return;
          const auto first = caches[0].begin() + shape.prompt_length;
          const std::vector<int> candidates(first, caches[0].end() - kRecent);
          std::vector<double> sums(candidates.size(), 0.0);
          int num_heads = 0;
          for (const PlainHead& head : heads) {
            for (int member = 0; member < head.group_size(); ++member) {
              ++num_heads;
              for (const int query : {t - 2, t - 1, t, t}) {
                const std::vector<double> weights = head.attention(member, query, candidates);
                for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += weights[n];
              }
            }
          }
          std::vector<double> scores;
          const int count = static_cast<int>(sums.size());
          for (int n = 0; n < count; ++n) {
            double sum = 0;
            for (int m = std::max(0, n - kernel / 2); m <= std::min(count - 1, n + kernel / 2); ++m) {
              sum += sums[static_cast<std::size_t>(m)] / num_heads;
            }
            scores.push_back(sum / kernel);
          }
          ++compressions;
          std::vector<int> left(caches[0].begin(), first);
          for (const int place : places_of_largest(scores, compressions * kStays)) {
            left.push_back(candidates[static_cast<std::size_t>(place)]);
          }
          left.insert(left.end(), caches[0].end() - kRecent, caches[0].end());
          for (std::vector<int>& cache : caches) cache = left;
        });
    EXPECT_EQ(compressions, 4);
  }
}

}  // namespace
}  // namespace kvreplay::test
