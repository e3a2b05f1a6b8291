#include "replay/decoding.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

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

Index look_ahead_memory(const HeadShape& shape, Index tokens, Index queries, Index heads) {
  constexpr Index kQueries = 64;  // whose attention stands at once
  const Index sums = (queries / kQueries + 1) * static_cast<Index>(sizeof(double));
  return heads * shape.group_size * tokens * (sums + kQueries * static_cast<Index>(sizeof(float))) +
         Head::evaluation_memory(shape, tokens);
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

namespace {

// A KV head of the trace.
struct Place {
  int layer;
  int kv_head;
};

// Heads of several layers as those of one. Theirs are all shapes but for the head's number and how many there are.
class LayersTogether : public LayerSource {
 public:
  LayersTogether(const CapturedRun& trace, const Eviction& eviction, const std::vector<Place>& places)
      : trace_(trace), eviction_(eviction), places_(places), shape_(shape_of(0)) {}

  const HeadShape& shape() const override { return shape_; }
  std::unique_ptr<HeadSource> head(int index) const override {
    const Place& place = places_[static_cast<std::size_t>(index)];
    return std::make_unique<OneOfSeveral>(trace_, place, eviction_, shape_of(index));
  }
  std::string name() const override { return trace_.name(); }

 private:
  class OneOfSeveral : public TraceHead {
   public:
    OneOfSeveral(const CapturedRun& trace, const Place& place, const Eviction& eviction, HeadShape shape)
        : TraceHead(trace, place.layer, place.kv_head, eviction), shape_(std::move(shape)) {}

    const HeadShape& shape() const override { return shape_; }

   private:
    HeadShape shape_;
  };

  HeadShape shape_of(int index) const {
    const Place& place = places_[static_cast<std::size_t>(index)];
    HeadShape shape = head_shape(trace_.info(), place.layer, place.kv_head, eviction_.position);
    shape.kv_head_offset = shape.kv_head - index;
    shape.kv_head = index;
    shape.num_kv_heads = static_cast<int>(places_.size());
    return shape;
  }

  const CapturedRun& trace_;
  Eviction eviction_;
  const std::vector<Place>& places_;
  HeadShape shape_;
};

// The heads `kv_heads` of `prompt`, whose heads stand at `places` in the trace.
std::vector<DecodedSetting> decode(const CapturedRun& trace, const LayerSource& prompt,
                                   const std::vector<Place>& places, const Eviction& eviction,
                                   std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                   Index combination_bytes, LayerDecoding::Outputs outputs) {
  const TraceInfo& info = trace.info();
  const HeadShape& shape = prompt.shape();
  const Index depth = shape.head_dim;
  const Index of_keys = shape.num_kv_heads * depth;
  const Index of_queries = of_keys * shape.group_size;
  LayerDecoding decoding(prompt, settings, kv_heads, combination_bytes, outputs);
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
    const auto spread = [&](int layer, HeadTensor tensor, int head, Index begin, Index some, Buffer& to, Index width,
                            Index column) {
      trace.read_rows(layer, tensor, head, begin, some, rows.data());
      for (Index i = 0; i < some; ++i) {
        std::copy_n(rows.data() + i * depth, depth, to.data() + i * width + column * depth);
      }
    };
    const Index known = std::clamp<Index>(eviction.position + at_hand - first, 0, count);
    for (const int index : kv_heads) {
      const auto& [layer, kv_head] = places[static_cast<std::size_t>(index)];
      spread(layer, HeadTensor::keys, kv_head, first, count, keys, of_keys, index);
      spread(layer, HeadTensor::values, kv_head, first, count, values, of_keys, index);
      for (int member = 0; member < shape.group_size && known > 0; ++member) {
        spread(layer, HeadTensor::queries, kv_head * shape.group_size + member, first_query + first - eviction.position,
               known, queries, of_queries, Index{index} * shape.group_size + member);
      }
    }
    for (Index i = 0; i < count; ++i) {
      decoding.step({.position = static_cast<int>(first + i),
                     .keys = keys.data() + i * of_keys,
                     .values = values.data() + i * of_keys,
                     .queries = i < known ? queries.data() + i * of_queries : nullptr,
                     .ends_turn = std::ranges::binary_search(info.turn_starts, static_cast<int>(first + i) + 1)});
    }
  }
  return decoding.take();
}

}  // namespace

std::vector<DecodedSetting> decode_layer(const CapturedRun& trace, const TraceLayer& prompt, const Eviction& eviction,
                                         std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                         Index combination_bytes, LayerDecoding::Outputs outputs) {
  std::vector<Place> places;
  for (int head = 0; head < prompt.shape().num_kv_heads; ++head) places.push_back({prompt.shape().layer, head});
  return decode(trace, prompt, places, eviction, settings, kv_heads, combination_bytes, outputs);
}

std::vector<CacheHistory> decode_across_layers(const CapturedRun& trace, const Eviction& eviction,
                                               std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                               Index combination_bytes) {
  std::vector<Place> places;
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    for (const int head : kv_heads) places.push_back({layer, head});
  }
  std::vector<int> all(places.size());
  std::iota(all.begin(), all.end(), 0);
  std::vector<Setting> together(settings.begin(), settings.end());
  for (Setting& setting : together) setting.granularity = Granularity::layer;
  const LayersTogether prompt(trace, eviction, places);
  std::vector<CacheHistory> histories;
  for (DecodedSetting& decoded :
       decode(trace, prompt, places, eviction, together, all, combination_bytes, LayerDecoding::Outputs::none)) {
    histories.push_back(std::move(decoded.sets.front()));
  }
  return histories;
}

}  // namespace kvreplay
