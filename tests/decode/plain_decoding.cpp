#include "decode/plain_decoding.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "replay/engine.h"
#include "replay/replay.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {

PlainHead::PlainHead(const TraceReader& trace, int layer, int kv_head)
    : prompt_length_(trace.info().prompt_length),
      keys_(trace.read(layer, HeadTensor::keys, kv_head, 0, trace.info().num_tokens()).cast<double>()) {
  const int group = trace.info().model.group_size();
  for (int member = 0; member < group; ++member) {
    queries_.push_back(
        trace.read(layer, HeadTensor::queries, kv_head * group + member, 0, trace.info().num_tokens()).cast<double>());
  }
}

std::vector<double> PlainHead::logits(int member, int query, const std::vector<int>& positions) const {
  std::vector<double> logits;
  for (const int position : positions) {
    logits.push_back(queries_[static_cast<std::size_t>(member)].row(query).dot(keys_.row(position)) /
                     std::sqrt(static_cast<double>(keys_.cols())));
  }
  return logits;
}

std::vector<double> PlainHead::attention(int member, int query, const std::vector<int>& positions) const {
  return softmax_of(logits(member, query, positions));
}

std::vector<double> softmax_of(std::vector<double> logits) {
  const double largest = *std::ranges::max_element(logits);
  double sum = 0;
  for (double& logit : logits) {
    logit = std::exp(logit - largest);
    sum += logit;
  }
  for (double& weight : logits) weight /= sum;
  return logits;
}

std::vector<int> places_of_largest(const std::vector<double>& scores, int count) {
  std::vector<int> places(scores.size());
  std::iota(places.begin(), places.end(), 0);
  std::ranges::stable_sort(places, [&scores](int a, int b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  places.resize(static_cast<std::size_t>(count));
  std::ranges::sort(places);
  return places;
}

void expect_kept(const RandomTrace& shape, const std::string& spec, const std::string& capacity,
                 const std::function<void(const std::vector<PlainHead>& heads)>& begin,
                 const std::function<void(const std::vector<PlainHead>& heads, int t, PlainCaches& caches)>& decide) {
  SCOPED_TRACE(spec);
  const TemporaryFolder folder;
  shape.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest request = make_request({spec}, {capacity});
  request.strict = true;
  const ReplayResult result = std::move(replay({&trace, 1}, request).front().results.front());
  const int kv_heads = shape.num_key_value_heads;
  ASSERT_EQ(result.kept.sets_per_layer, kv_heads);
  bool has_evicted = false;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    std::vector<PlainHead> heads;
    for (int head = 0; head < kv_heads; ++head) heads.emplace_back(trace, layer, head);
    begin(heads);
    std::vector<int> prompt(static_cast<std::size_t>(shape.prompt_length));
    std::iota(prompt.begin(), prompt.end(), 0);
    PlainCaches caches(static_cast<std::size_t>(kv_heads), prompt);
    for (int t = shape.prompt_length - 1; t < shape.num_tokens - 1; ++t) {
      if (t >= shape.prompt_length) {
        for (std::vector<int>& cache : caches) cache.push_back(t);
      }
      decide(heads, t, caches);
      for (int head = 0; head < kv_heads; ++head) {
        const auto set = static_cast<std::size_t>(layer * kv_heads + head);
        std::vector<int> cached = result.kept.sets[set].cached_at(t + 1, shape.prompt_length);
        cached.pop_back();
        const std::vector<int>& expected = caches[static_cast<std::size_t>(head)];
        ASSERT_EQ(cached, expected) << "layer " << layer << ", KV head " << head << ", after token " << t;
        has_evicted = has_evicted || static_cast<int>(expected.size()) <= t;
      }
    }
  }
  EXPECT_TRUE(has_evicted);
}

}  // namespace kvreplay::test
