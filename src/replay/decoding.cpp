#include "replay/decoding.h"

#include <algorithm>

#include "base/buffer.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

constexpr Index kTokens = 128;  // read together

}  // namespace

Index decoding_memory(const HeadShape& shape, Index tokens, Index heads) {
  // Keys by rows and as panels, values, and products with the queries of a group; blocks that are read.
  const Index cached = heads * (tokens + kTokens) * (3 * Index{shape.head_dim} + shape.group_size);
  const Index read =
      kTokens * shape.head_dim * (2 + shape.group_size) * shape.num_kv_heads + 4 * kTokens * shape.head_dim;
  return (cached + read) * static_cast<Index>(sizeof(float));
}

int queries_from(std::span<const int> query_positions, int position) {
  const auto first = std::ranges::lower_bound(query_positions, position) - query_positions.begin();
  int count = 0;
  while (first + count < std::ssize(query_positions) &&
         query_positions[static_cast<std::size_t>(first + count)] == position + count) {
    ++count;
  }
  return count;
}

std::vector<DecodedSetting> decode_layer(const CapturedRun& trace, int layer, const Eviction& eviction,
                                         std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                         const LayerProjection* projection, Index combination_bytes) {
  const TraceInfo& info = trace.info();
  const TraceLayer prompt(trace, layer, eviction, projection);
  const HeadShape& shape = prompt.shape();
  const Index depth = shape.head_dim;
  const Index of_keys = shape.num_kv_heads * depth;
  const Index of_queries = of_keys * shape.group_size;
  LayerDecoding decoding(prompt, settings, kv_heads, combination_bytes);
  const bool looks = std::ranges::any_of(settings, &LayerDecoding::looks_at_queries);
  const Index first_query =
      std::ranges::lower_bound(info.query_positions, eviction.position) - info.query_positions.begin();
  Buffer keys(kTokens * of_keys);
  Buffer values(kTokens * of_keys);
  Buffer queries(looks ? kTokens * of_queries : 0);
  Buffer rows(kTokens * depth);
  const int at_hand = looks ? queries_from(info.query_positions, eviction.position) : 0;
  for (Index first = eviction.position; first < info.num_tokens(); first += kTokens) {
    const Index count = std::min<Index>(kTokens, info.num_tokens() - first);
    const auto spread = [&](HeadTensor tensor, Index begin, Index some, Index head, Buffer& to, Index width) {
      trace.read_rows(layer, tensor, static_cast<int>(head), begin, some, rows.data());
      for (Index i = 0; i < some; ++i)
        std::copy_n(rows.data() + i * depth, depth, to.data() + i * width + head * depth);
    };
    const Index known = std::clamp<Index>(eviction.position + at_hand - first, 0, count);
    for (const int kv_head : kv_heads) {
      spread(HeadTensor::keys, first, count, kv_head, keys, of_keys);
      spread(HeadTensor::values, first, count, kv_head, values, of_keys);
      for (int member = 0; member < shape.group_size && known > 0; ++member) {
        spread(HeadTensor::queries, first_query + first - eviction.position, known,
               Index{kv_head} * shape.group_size + member, queries, of_queries);
      }
    }
    for (Index i = 0; i < count; ++i) {
      decoding.step({.position = static_cast<int>(first + i),
                     .keys = keys.data() + i * of_keys,
                     .values = values.data() + i * of_keys,
                     .queries = i < known ? queries.data() + i * of_queries : nullptr});
    }
  }
  return decoding.take();
}

}  // namespace kvreplay
