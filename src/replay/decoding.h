// Caches under schedules, over the tokens of a trace.
#pragma once

#include <span>
#include <vector>

#include "policy/decoding.h"
#include "replay/eviction.h"
#include "replay/trace_source.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// What settings with a schedule do in some KV heads of a layer, from the eviction position to the trace's last token:
/// all heads where Setting::is_local() is not true of every setting. Reads keys, values and queries block by
/// block. `prompt` is the layer at the eviction. Throws Error as LayerDecoding does.
std::vector<DecodedSetting> decode_layer(const CapturedRun& trace, const TraceLayer& prompt, const Eviction& eviction,
                                         std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                         Index combination_bytes, LayerDecoding::Outputs outputs);

/// The most bytes that this takes for `heads` KV heads of a trace of `tokens` tokens, beside combinations and heads.
Index decoding_memory(const HeadShape& shape, Index tokens, Index heads);

/// What comes to that where a policy looks ahead over `queries` evaluation queries: it goes by sums behind some of
/// them, and by the attention of those between.
Index look_ahead_memory(const HeadShape& shape, Index tokens, Index queries, Index heads);

/// The same of settings that keep the same positions in all layers: the KV heads `kv_heads` of all layers, layer by
/// layer, decide as those of one layer that share a set. Of every setting, the set that they keep.
std::vector<CacheHistory> decode_across_layers(const CapturedRun& trace, const Eviction& eviction,
                                               std::span<const Setting> settings, const std::vector<int>& kv_heads,
                                               Index combination_bytes);

/// How many queries in a row are at hand, counted from `position` on.
int queries_from(std::span<const int> query_positions, int position);

}  // namespace kvreplay
