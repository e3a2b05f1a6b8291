// What a replay finds: trace → head → policy → kept sets → measures.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/capacity.h"
#include "policy/policy.h"
#include "replay/eviction.h"
#include "replay/measure.h"
#include "replay/residency.h"
#include "replay/table.h"
#include "trace/trace.h"

namespace kvreplay {

/// What the heads of all layers keep, and how long.
struct KeptSets {
  Granularity granularity = Granularity::kv;  ///< query or kv: what one set is for
  int sets_per_layer = 0;                     ///< H or K
  std::vector<Residency> sets;                ///< layer-major

  const Residency& of_query_head(int layer, int query_head, int group_size) const;

  /// Mean number of positions that the eviction leaves in a set: over all layers, and in one.
  double mean_size() const;
  double mean_size(int layer) const;
};

/// What a model writes freely over what is kept.
struct Generation {
  std::vector<std::int32_t> ids;
  std::string text;                          ///< empty where no tokenizer is at hand
  bool ended = false;                        ///< the last token ends the sequence
  std::optional<int> first_difference = {};  ///< place of the first token that is another one than with the full cache
  double repeated_4grams = 0;                ///< share of its four-token sequences that stood in it before
  std::optional<bool> answered = {};         ///< whether an answer is in it; none where no answer is known
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
  bool residual_norms = false;  ///< whether the trace tells of a layer what its error has to be held against
  bool residual_sum = false;    ///< whether the changes of all layers are added up
  bool scheduled = false;       ///< whether it evicts while tokens come, and not once
  bool live = false;            ///< whether the model itself ran on with what is kept
  bool replayed = true;         ///< whether what the kept sets do to each layer's output was measured
  /// Whether the capacity is no more than what the policy keeps whatever the scores, so that its choice is not seen.
  bool nothing_to_choose = false;
  KeptSets kept;
  std::optional<Generation> generation = {};  ///< of live runs that were asked for it
  MeasureTables measures;  ///< rank agreement empty without `rank_agreement`, NaN in layers without ranks
};

/// All results of one trace at one eviction position: comparable with each other, number by number.
struct TraceReplay {
  std::string trace;
  std::string trace_digest;   ///< what tells captures apart whatever their files are called
  std::string tokens_digest;  ///< of the tokens before the eviction
  ModelInfo model;
  int prompt_length = 0;
  int eviction_position = 0;
  int evaluate_from = 0;                      ///< what stands between the eviction and this position stays cached
  std::vector<int> held;                      ///< [L] the last positions before the eviction that a layer holds
  std::vector<int> evaluation_positions;      ///< [E] captured queries from evaluate_from on
  std::vector<Span> spans;                    ///< [S] those that begin before the eviction
  std::vector<ReplayResult> results;          ///< policies in the order given, capacities within
  std::vector<std::string> notes;             ///< what a reader of the numbers has to know
  std::optional<Generation> generation = {};  ///< with the full cache, of live runs that were asked for it

  Eviction eviction() const { return {eviction_position, evaluate_from}; }

  MeasureExtent extent() const {
    return {.query_heads = model.num_attention_heads,
            .queries = static_cast<Index>(evaluation_positions.size()),
            .spans = static_cast<Index>(spans.size())};
  }
};

/// Positions that a kept set holds, mean over sets: after one eviction those that are left of what stood before it;
/// under a schedule all that evaluation queries see, mean over them as well.
double mean_kept(const ReplayResult& result);

/// The same of one layer.
double mean_kept(const ReplayResult& result, int layer);

/// The most positions that an evaluation query of any head sees. NaN where caches were not measured over time.
double peak_cache_size(const ReplayResult& result);

/// What a head's cache holds over time, in positions × steps: the positions that each evaluation query sees, summed
/// over these queries, mean over layers and query heads. Without eviction Σ_t (t + 1). NaN as above.
double cache_footprint(const ReplayResult& result);

/// Whether a result has numbers of a measure: rank agreement has to be asked for, and only live runs have those of the
/// whole model.
bool is_measured(const MeasureTraits& measure, const ReplayResult& result);

/// Bytes per token of the prompt that a result's kept sets cost: those of keys and values, 2 for each number, of every
/// set that has to be stored (one per query head or KV head; where a layer shares one, each KV head stores it), over
/// the positions before the eviction. The full cache of L layers and K KV heads of width D costs L · K · 2D · 2.
double bytes_per_token(const TraceReplay& replay, const ReplayResult& result);

/// The same of a cache that keeps in every KV head what was granted there: result.capacity, or less where less is held.
double bytes_per_token_of_capacity(const TraceReplay& replay, const ReplayResult& result);

/// What one setting does in one layer.
struct LayerResult {
  std::vector<Residency> kept;  ///< of the layer's heads, as in KeptSets
  LayerNumbers measures;        ///< as in ReplayResult
  /// ‖stored − exact‖ / ‖exact‖ of the layer's full outputs, mean over query heads and evaluation queries: how far the
  /// trace's outputs are from what its queries, keys and values give. The same for all settings.
  float output_error = 0;
  /// [E, C] what the layer adds to the residual stream changes by; none unless it was asked for.
  std::vector<float> change = {};
  /// [steps, H · D] the evicted outputs from the eviction position on, where `kept` does not tell them: of caches whose
  /// rows take other positions. Not stored.
  Matrix outputs = {};
};

/// Gives the results of an outline their tables, filled with zeros.
void allocate_tables(TraceReplay& replay);

/// Fills one layer's part of all results of `replay`, whose tables are allocated; layers in ascending order.
void store_layer(TraceReplay& replay, int layer, std::vector<LayerResult> results);

/// Tells of outputs that are not the capture's own in the notes of `replay`; `errors` is a layer's output_error each.
void note_outputs(TraceReplay& replay, std::span<const double> errors);

/// Once all layers are stored: tells what patterns with a capacity of their own used.
void settle_capacities(TraceReplay& replay);

/// Whether a head's cache froze on the prompt: it is evicted again and again, and no position of the prompt that
/// outlived its end ever goes, though some did then. Its turnover is 0. `held`: positions that its layer held.
bool is_frozen_on_prompt(const Residency& cache, int held);

/// Tells, in the notes of `replay`, of the policies with a schedule that froze in all heads; `frozen` says it of each
/// result, or where it is empty, the kept sets do.
void note_frozen_caches(TraceReplay& replay, std::vector<bool> frozen = {});

}  // namespace kvreplay
