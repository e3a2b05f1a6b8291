// Replays policies over a trace: trace → head → policy → kept sets → measures.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "policy/capacity.h"
#include "policy/policy.h"
#include "replay/eviction.h"
#include "trace/reader.h"

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
  bool strict = false;                     ///< refuse what cannot be replayed, instead of leaving it out with a note
};

/// The request of these specs at these capacities, written as on the command line. Throws UsageError.
ReplayRequest make_request(const std::vector<std::string>& specs, const std::vector<std::string>& capacities,
                           std::optional<Granularity> granularity = {});

/// Numbers of a layer-major table, the last index running fastest.
struct Table {
  std::vector<Index> shape;
  std::vector<float> numbers;

  static Table of_shape(std::vector<Index> shape);
};

/// The positions that the heads of all layers keep.
struct KeptSets {
  Granularity granularity = Granularity::kv;  ///< query or kv: what one set is for
  int sets_per_layer = 0;                     ///< H or K
  std::vector<std::vector<int>> sets;         ///< layer-major, each ascending

  const std::vector<int>& of_query_head(int layer, int query_head, int group_size) const;

  /// Mean number of positions in a set: over all layers, and in one.
  double mean_size() const;
  double mean_size(int layer) const;
};

/// One policy at one capacity and eviction position of one trace.
struct ReplayResult {
  std::string trace;             ///< file name as given
  std::string policy;            ///< canonical spec
  std::string capacity_request;  ///< as asked for: "128", "25%"; kAllPositions for full
  int capacity = 0;   ///< granted per kept set, on average over the layers that hold most; `kept` has what was used
  int most_kept = 0;  ///< the most positions that a kept set can hold: a budget may give some more than the mean
  int eviction_position = 0;
  Granularity granularity = Granularity::kv;
  Share share = Share::mean;
  bool oracle = false;          ///< looked at the evaluation queries
  bool rank_agreement = false;  ///< whether scores are compared with the oracle's importance
  /// Whether the capacity is no more than what the policy keeps whatever the scores, so that its choice is not seen.
  bool nothing_to_choose = false;
  KeptSets kept;
  Table head_error;        ///< [L, H, E]
  Table layer_error;       ///< [L, E]
  Table attention_recall;  ///< [L, H, E]
  Table cosine;            ///< [L, H, E]
  Table span_recall;       ///< [L, H, S] share of each span's held positions that is kept; NaN where none was held
  /// [L, H] rank agreement with the oracle's importance; empty without `rank_agreement`, NaN in layers without ranks.
  Table spearman;
  Table kendall;  ///< [L, H] the same, Kendall's τ_b
};

/// All results of one trace at one eviction position: comparable with each other, number by number.
struct TraceReplay {
  std::string trace;
  std::string trace_digest;  ///< what tells captures apart whatever their files are called
  ModelInfo model;
  int prompt_length = 0;
  int eviction_position = 0;
  int evaluate_from = 0;                  ///< what stands between the eviction and this position stays cached
  std::vector<int> held;                  ///< [L] the last positions before the eviction that a layer holds
  std::vector<int> evaluation_positions;  ///< [E] captured queries from evaluate_from on
  std::vector<Span> spans;                ///< [S] those that begin before the eviction
  std::vector<ReplayResult> results;      ///< policies in the order given, capacities within
  std::vector<std::string> notes;         ///< what a reader of the numbers has to know

  Eviction eviction() const { return {eviction_position, evaluate_from}; }
};

/// Bytes per token of the prompt that a result's kept sets cost: those of keys and values, 2 for each number, of every
/// set that has to be stored (one per query head or KV head; where a layer shares one, each KV head stores it), over
/// the positions before the eviction. The full cache of L layers and K KV heads of width D costs L · K · 2D · 2.
double bytes_per_token(const TraceReplay& replay, const ReplayResult& result);

/// The same of a cache that keeps in every KV head what was granted there: result.capacity, or less where less is held.
double bytes_per_token_of_capacity(const TraceReplay& replay, const ReplayResult& result);

/// Replays every policy at every capacity over every trace, once per eviction position: traces in the order given,
/// eviction positions within. `progress` is told the share of the work that is done, in [0, 1]. For results that do not
/// fit into memory there is ReplayEngine, which hands them out layer by layer; what throws there throws here.
std::vector<TraceReplay> replay(std::span<const TraceReader> traces, const ReplayRequest& request,
                                const std::function<void(double)>& progress = {});

/// The same for one trace.
std::vector<TraceReplay> replay(const TraceReader& trace, const ReplayRequest& request);

}  // namespace kvreplay
