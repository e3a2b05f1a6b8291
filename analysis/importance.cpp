#include "analysis/importance.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>

#include "analysis/retention.h"
#include "base/error.h"
#include "policy/policy.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

// Throws where there is no such head, or nothing to show of it.
void check(const TraceReader& trace, int layer, int head, const Policy& policy, int capacity, int eviction_position) {
  const int window = policy.requirements().count(Need::Kind::window_queries);
  const TraceInfo& info = trace.info();
  const std::string file = trace.path().string();
  if (layer < 0 || layer >= info.model.num_layers || head < 0 || head >= info.model.num_attention_heads) {
    throw UsageError(fmt::format("{}: there is no query head {} of layer {}; layers are 0 to {}, query heads 0 to {}",
                                 file, head, layer, info.model.num_layers - 1, info.model.num_attention_heads - 1));
  }
  if (eviction_position < 1 || eviction_position > info.num_tokens()) {
    throw Error(fmt::format("{}: eviction position {} is outside the trace's {} tokens", file, eviction_position,
                            info.num_tokens()));
  }
  if (head_shape(info, layer, 0, eviction_position).rows() <= window) {
    throw Error(
        fmt::format("{}: no position is left before the observation window of {} queries that ends at {} in layer {}; "
                    "choose a smaller window",
                    file, window, eviction_position, layer));
  }
  if (capacity < window) {
    throw UsageError(fmt::format("capacity {} is below the {} positions that {} always keeps; ask for a larger one",
                                 capacity, window, policy.canonical));
  }
  const TraceHead source(trace, layer, head / info.model.group_size(), eviction_position);
  const int at_hand = contiguous_window(source.query_positions(), eviction_position);
  if (at_hand < window) {
    throw Error(
        fmt::format("{}: {} needs the last {} queries before position {}, and the trace holds {} of them; capture with "
                    "--queries window:{} or all",
                    file, policy.canonical, window, eviction_position, at_hand == 0 ? "none" : fmt::to_string(at_hand),
                    window + std::max(0, info.prompt_length - eviction_position)));
  }
}

std::vector<float> binned(std::span<const float> numbers, const RasterBins& bins) {
  std::vector<float> means;
  for (int bin = 0; bin < bins.count(); ++bin) {
    const std::span<const float> part =
        numbers.subspan(static_cast<std::size_t>(bin) * static_cast<std::size_t>(bins.width),
                        static_cast<std::size_t>(std::min(bins.width, bins.positions - bin * bins.width)));
    double sum = 0;
    for (const float number : part) sum += static_cast<double>(number);
    means.push_back(static_cast<float>(sum / static_cast<double>(part.size())));
  }
  return means;
}

}  // namespace

ImportanceMap importance_map(const TraceReader& trace, int layer, int head, const std::string& spec, int capacity,
                             int eviction_position, int most_bins) {
  const Policy policy = make_policy(spec);
  if (!policy.ranking() || !policy.ranking()->has_stages()) {
    throw UsageError(
        fmt::format("importance is of methods that tell what each query of a window makes of their scores; "
                    "'{}' does not",
                    policy.canonical));
  }
  check(trace, layer, head, policy, capacity, eviction_position);
  const int group = trace.info().model.group_size();
  const int window = policy.requirements().count(Need::Kind::window_queries);
  const auto size = static_cast<std::size_t>(window);
  const TraceHead source(trace, layer, head / group, eviction_position);
  const HeadShape& shape = source.shape();
  const RasterBins bins = RasterBins::of(shape.rows() - window, most_bins);
  ImportanceMap map{.layer = layer,
                    .head = head,
                    .policy = policy.canonical,
                    .capacity = std::min(capacity, shape.rows()),
                    .query_positions = {},
                    .bin_width = bins.width,
                    .first_position = shape.positions[0],
                    .positions = bins.positions,
                    .raw = std::vector<std::vector<float>>(size),
                    .temporal = std::vector<std::vector<float>>(size),
                    .spatial = {}};
  for (int i = 0; i < window; ++i) map.query_positions.push_back(eviction_position - window + i);
  const Head seen(source, 0);
  policy.ranking()->stages(seen, head % group, map.capacity,
                           [&map, &bins](const ScoreStage& stage, std::span<const float> scores) {
                             const auto query = static_cast<std::size_t>(stage.query);
                             switch (stage.step) {
                               case ScoreStage::Step::alone:
                                 map.raw[query] = binned(scores, bins);
                                 break;
                               case ScoreStage::Step::in_time:
                                 map.temporal[query] = binned(scores, bins);
                                 break;
                               case ScoreStage::Step::in_space:
                                 map.spatial = binned(scores, bins);
                                 map.width = stage.width;
                                 map.shift = stage.shift;
                                 break;
                             }
                           });
  return map;
}

}  // namespace kvreplay
