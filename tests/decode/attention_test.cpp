// What policies see of a query's attention: over the rows that are left, or as in the run without eviction.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "decode/plain_decoding.h"
#include "policy/policy.h"

namespace kvreplay::test {
namespace {

constexpr int kCapacity = 20;

std::vector<int> all_up_to(int position) {
  std::vector<int> all(static_cast<std::size_t>(position) + 1);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// The best of `cache` by `scores`, and its last `window` ones, if it holds more than the capacity.
void cut(std::vector<int>& cache, std::vector<double> scores, int window) {
  if (static_cast<int>(cache.size()) <= kCapacity) return;
  scores.resize(cache.size() - static_cast<std::size_t>(window));
  std::vector<int> left;
  for (const int place : places_of_largest(scores, kCapacity - window)) {
    left.push_back(cache[static_cast<std::size_t>(place)]);
  }
  left.insert(left.end(), cache.end() - window, cache.end());
  cache = std::move(left);
}

TEST(FullAttention, IsThatOfTheRunWithoutEviction) {
  const RandomTrace shape{.num_attention_heads = 6, .num_key_value_heads = 2, .prompt_length = 30, .num_tokens = 70};
  expect_kept(
      shape, "tova+every(attention=full)", std::to_string(kCapacity), [](const std::vector<PlainHead>&) {},
      [](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        std::vector<double> scores(caches[0].size(), 0.0);
        for (const PlainHead& head : heads) {
          for (int member = 0; member < head.group_size(); ++member) {
            const std::vector<double> paid = head.attention(member, t, all_up_to(t));
            for (std::size_t n = 0; n < scores.size(); ++n) {
              scores[n] += paid[static_cast<std::size_t>(caches[0][n])];
            }
          }
        }
        cut(caches[0], scores, 0);
        caches[1] = caches[0];
      });
}

TEST(FullAttention, IsShownForAWindowOfQueries) {
  const RandomTrace shape{.prompt_length = 30, .num_tokens = 70};
  constexpr int kWindow = 5;
  expect_kept(
      shape, "snapkv(window=5,kernel=1)+every(3,attention=full)", std::to_string(kCapacity),
      [](const std::vector<PlainHead>&) {},
      [&shape](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        if ((t - (shape.prompt_length - 1)) % 3 != 0) return;
        for (std::size_t head = 0; head < heads.size(); ++head) {
          std::vector<double> scores(caches[head].size(), 0.0);
          for (int member = 0; member < heads[head].group_size(); ++member) {
            for (int query = t - kWindow + 1; query <= t; ++query) {
              const std::vector<double> paid = heads[head].attention(member, query, all_up_to(query));
              for (std::size_t n = 0; n < scores.size(); ++n) {
                if (caches[head][n] <= query) scores[n] += paid[static_cast<std::size_t>(caches[head][n])];
              }
            }
          }
          cut(caches[head], scores, kWindow);
        }
      });
}

TEST(FullAttention, AddsUpInWhatARankingRemembers) {
  const RandomTrace shape{.prompt_length = 30, .num_tokens = 70, .attention_mass = false};
  constexpr int kWindow = 4;
  std::vector<std::vector<double>> sums;  // [KV head][position]
  expect_kept(
      shape, "h2o(window=4)+every(attention=full)", std::to_string(kCapacity),
      [&](const std::vector<PlainHead>& heads) {
        sums.assign(heads.size(), std::vector<double>(static_cast<std::size_t>(shape.num_tokens), 0.0));
      },
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        for (std::size_t head = 0; head < heads.size(); ++head) {
          const int first = t == shape.prompt_length - 1 ? 0 : t;
          for (int member = 0; member < heads[head].group_size(); ++member) {
            for (int query = first; query <= t; ++query) {
              const std::vector<double> paid = heads[head].attention(member, query, all_up_to(query));
              for (std::size_t n = 0; n < paid.size(); ++n) sums[head][n] += paid[n];
            }
          }
          std::vector<double> scores;
          for (const int position : caches[head]) scores.push_back(sums[head][static_cast<std::size_t>(position)]);
          cut(caches[head], scores, kWindow);
        }
      });
}

TEST(FullAttention, DoesNotGoWithPlacesInTheCache) {
  EXPECT_THROW(make_policy("tova+every(attention=full)+positions(reindexed)"), UsageError);
}

}  // namespace
}  // namespace kvreplay::test
