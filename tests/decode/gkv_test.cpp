// G-KV and what its code makes of R-KV, against the rule of gkv/model/compression/score_based.py told again.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "decode/plain_decoding.h"

namespace kvreplay::test {
namespace {

struct Options {
  int window;
  int kernel;
  int interval;
  double lambda;
  double alpha;
  bool remembers;
  bool mean = false;
};

std::vector<double> pooled(const std::vector<double>& scores, int kernel) {
  std::vector<double> largest;
  const int count = static_cast<int>(scores.size());
  for (int n = 0; n < count; ++n) {
    double most = -1e300;
    for (int m = std::max(0, n - kernel / 2); m <= std::min(count - 1, n + kernel / 2); ++m) {
      most = std::max(most, scores[static_cast<std::size_t>(m)]);
    }
    largest.push_back(most);
  }
  return largest;
}

void divide_by_largest(std::vector<double>& scores) {
  const double largest = *std::ranges::max_element(scores);
  for (double& score : scores) score /= largest;
}

std::vector<double> attention(const PlainHead& head, const std::vector<int>& cache, int t, int window) {
  const std::size_t past = cache.size() - static_cast<std::size_t>(window);
  std::vector<double> mean(past, 0.0);
  for (int i = 0; i < window; ++i) {
    const int query = t - window + 1 + i;
    const std::vector<int> seen(cache.begin(), cache.begin() + static_cast<std::ptrdiff_t>(past) + i + 1);
    std::vector<double> largest(past, 0.0);
    for (int member = 0; member < head.group_size(); ++member) {
      const std::vector<double> weights = head.attention(member, query, seen);
      for (std::size_t n = 0; n < past; ++n) largest[n] = std::max(largest[n], weights[n]);
    }
    for (std::size_t n = 0; n < past; ++n) mean[n] += largest[n] / window;
  }
  return mean;
}

std::vector<double> redundancy(const PlainHead& head, const std::vector<int>& cache, int window) {
  const std::size_t rows = cache.size();
  std::vector<double> sums(rows, 0.0);
  for (std::size_t column = 0; column < rows; ++column) {
    const auto cosine = [&](std::size_t row) {
      const auto a = head.key(cache[row]);
      const auto b = head.key(cache[column]);
      return row == column ? 0.0 : a.dot(b) / (a.norm() + 1e-6) / (b.norm() + 1e-6);
    };
    bool is_spared = false;
    for (std::size_t row = rows; row-- > 0;) {
      if (!is_spared && cosine(row) > 0.5) {
        is_spared = true;
        continue;
      }
      sums[row] += cosine(row) / static_cast<double>(rows);
    }
  }
  std::vector<double> weights = softmax_of(sums);
  weights.resize(rows - static_cast<std::size_t>(window));
  return weights;
}

void expect_rule(const RandomTrace& shape, const std::string& spec, int capacity, const Options& o) {
  std::map<const PlainHead*, std::vector<double>> remembered;
  expect_kept(
      shape, spec, std::to_string(capacity), [&](const std::vector<PlainHead>&) { remembered.clear(); },
      [&](const std::vector<PlainHead>& heads, int t, PlainCaches& caches) {
        if ((t - shape.prompt_length + 1) % o.interval != 0) return;
        for (std::size_t h = 0; h < heads.size(); ++h) {
          std::vector<int>& cache = caches[h];
          if (static_cast<int>(cache.size()) <= capacity) continue;
          std::vector<double> scores = attention(heads[h], cache, t, o.window);
          if (o.remembers) {
            divide_by_largest(scores);
            const std::vector<double>& old = remembered[&heads[h]];
            for (std::size_t n = 0; n < old.size(); ++n) {
              scores[n] = o.mean ? o.alpha * old[n] + (1 - o.alpha) * scores[n] : std::max(o.alpha * old[n], scores[n]);
            }
          }
          std::vector<double> ranked = pooled(scores, o.kernel);
          std::vector<double> alike = redundancy(heads[h], cache, o.window);
          if (o.remembers) divide_by_largest(alike);
          for (std::size_t n = 0; n < ranked.size(); ++n) ranked[n] = o.lambda * ranked[n] - (1 - o.lambda) * alike[n];
          std::vector<int> left;
          std::vector<double> kept_scores;
          for (const int place : places_of_largest(ranked, capacity - o.window)) {
            left.push_back(cache[static_cast<std::size_t>(place)]);
            kept_scores.push_back(scores[static_cast<std::size_t>(place)]);
          }
          left.insert(left.end(), cache.end() - o.window, cache.end());
          cache = left;
          remembered[&heads[h]] = kept_scores;
        }
      });
}

TEST(GKV, KeepsWhatItsCodeKeeps) {
  const RandomTrace shape{.num_layers = 2, .prompt_length = 60, .num_tokens = 110};
  expect_rule(shape, "gkv(window=4,interval=8)", 24, {4, 1, 8, 0.5, 0.8, true});
  expect_rule(shape, "gkv(window=4,interval=8,kernel=5,lambda=0.9,alpha=0.95,smooth=mean)", 24,
              {4, 5, 8, 0.9, 0.95, true, true});
  expect_rule(shape, "gkv(window=4,interval=8)", 80, {4, 1, 8, 0.5, 0.8, true});  // the cache fills first
}

TEST(GKV, RewritesRKV) {
  const RandomTrace shape{.num_layers = 2, .prompt_length = 60, .num_tokens = 110, .seed = 3};
  expect_rule(shape, "rkv@g-kv(window=4,interval=8)", 24, {4, 5, 8, 0.1, 0, false});
}

}  // namespace
}  // namespace kvreplay::test
