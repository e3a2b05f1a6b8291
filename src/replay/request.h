// What a replay is asked for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "policy/capacity.h"
#include "policy/policy.h"

namespace kvreplay {

/// The end of a trace's prompt, where a position can be given.
constexpr int kPromptEnd = 0;

/// What to replay. Every policy is replayed at every capacity and eviction position.
struct ReplayRequest {
  std::vector<Policy> policies;
  std::vector<CapacityRequest> capacities;
  std::vector<int> eviction_positions;  ///< empty: the end of the prompt
  /// The first position that may be evaluated, or kPromptEnd; an eviction after it is evaluated from there on. None:
  /// the last of the evictions, so that all of them are evaluated on the same queries.
  std::optional<int> evaluate_from = {};
  std::optional<Granularity> granularity;  ///< none: the policy's own, or kv
  std::optional<Share> share;              ///< none: the policy's own, or mean
  bool rank_agreement = false;             ///< compare scores with the oracle's importance
  /// Add up what all layers change in the residual stream, where traces tell its length: takes memory for a vector of
  /// the hidden size per setting and evaluation query.
  bool residual_sum = false;
  /// For a running model, whose layers come one after the other: leave out what decides over all of them at a step. It
  /// evicts under schedules itself, so that decide() leaves the sets of settings with one empty.
  bool layer_by_layer = false;
  bool strict = false;  ///< refuse what cannot be replayed, instead of leaving it out with a note
};

/// The request of these specs at these capacities, written as on the command line. Throws UsageError.
ReplayRequest make_request(const std::vector<std::string>& specs, const std::vector<std::string>& capacities,
                           std::optional<Granularity> granularity = {});

}  // namespace kvreplay
