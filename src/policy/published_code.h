// What variants that follow the same published code have in common: which state of it they describe, and how it counts.
#pragma once

#include <string>

#include "policy/parameter.h"
#include "policy/schedule.h"

namespace kvreplay {

/// github.com/NVIDIA/kvpress, as released on PyPI.
namespace kvpress {

inline constexpr const char* kRevision = "release 0.5.5";

/// Positions that a share, in (0, 1], of `length` positions is before its code cuts fractions off: users write the
/// share that goes, and what stays is length · (1 − ratio) in floating point, 99.99999999999997 for 10 % of 1,000. A
/// Policy::share_rule.
double positions_of_share(double share, int length);

/// A summary's last sentence where scores come from attention.
std::string with_attention_path(const std::string& summary);

/// DecodingPress: evicts every `interval` tokens after the prompt, which stays whole for the first interval. Where the
/// target is not exceeded then, another interval begins.
Schedule decoding_schedule(int interval);
Parameter interval_parameter();

/// A summary's first words where a press evicts while decoding, and what all of them have in common.
std::string decoding(const std::string& summary);

}  // namespace kvpress

/// github.com/Zefan-Cai/KVCache-Factory.
namespace kvcache_factory {

inline constexpr const char* kRevision = "commit c97f9d7 (2026-07-02)";

/// Its options --kv_cache_granularity and --gqa_score_agg, with the values that Policy::granularity and share take.
Parameter heads_parameter();
Parameter share_parameter();

}  // namespace kvcache_factory

/// github.com/an-yongqi/rest-kv, the ReST-KV authors' release.
namespace rest_kv {

inline constexpr const char* kRevision = "commit a8bb112 (2026-04-26)";

}  // namespace rest_kv

}  // namespace kvreplay
