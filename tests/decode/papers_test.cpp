// Methods of which there is no code, against what their papers say told again.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <numeric>

#include "decode/plain_decoding.h"

namespace kvreplay::test {
namespace {

const RandomTrace kShape{.num_layers = 2, .prompt_length = 40, .num_tokens = 100};

// Rows of `cache` but for those at `places`, ascending.
std::vector<int> at(const std::vector<int>& cache, const std::vector<int>& places) {
  std::vector<int> positions;
  for (const int place : places) positions.push_back(cache[static_cast<std::size_t>(place)]);
  return positions;
}

// Tells `observe` of every query of the prompt in every head, with what it sees.
template <class Observe>
void observe_prompt(const std::vector<PlainHead>& heads, const Observe& observe) {
  for (const PlainHead& head : heads) {
    for (int query = 0; query < kShape.prompt_length; ++query) {
      std::vector<int> seen(static_cast<std::size_t>(query + 1));
      std::iota(seen.begin(), seen.end(), 0);
      observe(head, query, seen);
    }
  }
}

TEST(Scissorhands, DropsWhatWasUnimportantMostOften) {
  constexpr int kHistory = 12;
  constexpr int kRecent = 3;
  constexpr int kLeft = 16;
  constexpr int kBudget = 24;
  // Of each head and query head, what the last queries found unimportant.
  std::map<std::pair<const PlainHead*, int>, std::deque<std::map<int, bool>>> records;
  const auto observe = [&](const PlainHead& head, int query, const std::vector<int>& cache) {
    for (int member = 0; member < head.group_size(); ++member) {
      const std::vector<double> weights = head.attention(member, query, cache);
      std::map<int, bool> record;
      for (std::size_t n = 0; n < cache.size(); ++n) {
        record[cache[n]] = weights[n] < 1.0 / static_cast<double>(cache.size());
      }
      auto& queries = records[{&head, member}];
      queries.push_back(record);
      if (static_cast<int>(queries.size()) > kHistory) queries.pop_front();
    }
  };
  expect_kept(
      kShape, "scissorhands(history=12,recent=3,burst=1.5)", std::to_string(kLeft),
      [&](const std::vector<PlainHead>& heads) {
        records.clear();
        observe_prompt(heads, observe);
      },
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        for (std::size_t h = 0; h < heads.size(); ++h) {
          std::vector<int>& cache = caches[h];
          if (t >= kShape.prompt_length) observe(heads[h], t, cache);
          if (static_cast<int>(cache.size()) < kBudget) continue;
          std::vector<double> scores;
          for (std::size_t n = 0; n + kRecent < cache.size(); ++n) {
            double unimportant = 0;
            for (int member = 0; member < heads[h].group_size(); ++member) {
              for (auto& record : records[{&heads[h], member}]) unimportant += record[cache[n]] ? 1 : 0;
            }
            scores.push_back(-unimportant);
          }
          std::vector<int> left = at(cache, places_of_largest(scores, kLeft - kRecent));
          left.insert(left.end(), cache.end() - kRecent, cache.end());
          cache = left;
        }
      });
}

TEST(RaaS, DropsWhatWasUsedLeastRecently) {
  constexpr int kCapacity = 52;
  std::map<std::pair<const PlainHead*, int>, int> used;  // at which step, by position
  expect_kept(
      kShape, "raas(share=0.4)", std::to_string(kCapacity), [&](const std::vector<PlainHead>&) { used.clear(); },
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        if (t < kShape.prompt_length) return;
        for (std::size_t h = 0; h < heads.size(); ++h) {
          const PlainHead& head = heads[h];
          std::vector<int>& cache = caches[h];
          std::vector<double> mean(cache.size(), 0.0);
          for (int member = 0; member < head.group_size(); ++member) {
            const std::vector<double> weights = head.attention(member, t, cache);
            for (std::size_t n = 0; n < cache.size(); ++n) mean[n] += weights[n] / head.group_size();
          }
          used[{&head, t}] = t;
          const auto generated = static_cast<std::ptrdiff_t>(cache.size()) - kShape.prompt_length;
          const std::vector<double> of_generated(mean.end() - generated, mean.end());
          const int count = static_cast<int>(std::ceil(0.4 * static_cast<double>(generated)));
          for (const int place : places_of_largest(of_generated, count)) {
            used[{&head, cache[static_cast<std::size_t>(kShape.prompt_length + place)]}] = t;
          }
          // Room for the next token.
          while (static_cast<int>(cache.size()) >= kCapacity) {
            cache.erase(std::min_element(cache.begin() + kShape.prompt_length, cache.end(), [&](int a, int b) {
              return used[{&head, a}] < used[{&head, b}];
            }));
          }
        }
      });
}

TEST(LazyEviction, DropsWhatIsOverdueByItsOwnInterval) {
  constexpr int kCapacity = 20;
  constexpr int kWindow = 6;
  constexpr double kThreshold = 0.02;
  struct Use {
    int last;
    int longest = 0;
  };
  std::map<std::pair<const PlainHead*, int>, Use> uses;
  const auto observe = [&](const PlainHead& head, int query, const std::vector<int>& cache) {
    std::vector<double> largest(cache.size(), 0.0);
    for (int member = 0; member < head.group_size(); ++member) {
      const std::vector<double> weights = head.attention(member, query, cache);
      for (std::size_t n = 0; n < cache.size(); ++n) largest[n] = std::max(largest[n], weights[n]);
    }
    for (std::size_t n = 0; n < cache.size(); ++n) {
      Use& use = uses.try_emplace({&head, cache[n]}, Use{cache[n]}).first->second;
      if (largest[n] < kThreshold) continue;
      use.longest = std::max(use.longest, query - use.last);
      use.last = query;
    }
  };
  expect_kept(
      kShape, "lazyeviction(window=6,threshold=0.02)", std::to_string(kCapacity),
      [&](const std::vector<PlainHead>& heads) {
        uses.clear();
        observe_prompt(heads, observe);
      },
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        for (std::size_t h = 0; h < heads.size(); ++h) {
          std::vector<int>& cache = caches[h];
          if (t >= kShape.prompt_length) observe(heads[h], t, cache);
          if ((t - kShape.prompt_length + 1) % kWindow != 0 || static_cast<int>(cache.size()) <= kCapacity) continue;
          std::vector<double> scores;
          for (std::size_t n = 0; n + kWindow < cache.size(); ++n) {
            const Use& use = uses.at({&heads[h], cache[n]});
            scores.push_back(-static_cast<double>(t - use.last) / std::max(use.longest, 1));
          }
          std::vector<int> left = at(cache, places_of_largest(scores, kCapacity - kWindow));
          left.insert(left.end(), cache.end() - kWindow, cache.end());
          cache = left;
        }
      });
}

}  // namespace
}  // namespace kvreplay::test
