// What eviction does to the model itself: the prompt is computed once, and the model runs on over what is kept of it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "policy/setting.h"
#include "replay/layer_projection.h"
#include "replay/result.h"
#include "tracer/live/decoding_caches.h"
#include "tracer/live/held_run.h"
#include "tracer/sampling.h"
#include "tracer/tokenizer/tokenizer.h"
#include "tracer/transformer.h"

namespace kvreplay::tracer {

/// How the model writes: which token comes next, and after which ones, ascending, its text is over.
struct Writing {
  SamplingOptions sampling = {};
  std::vector<std::int32_t> stop_ids = {};
};

/// How far a live run is.
struct LiveProgress {
  enum class Stage { prompt, continuation, evicted, decoding, generation };
  Stage stage = Stage::prompt;
  double fraction = 0;  ///< of the stage
};

/// Runs a model on a prompt once, and then on over any number of evicted views of its cache.
class LiveRun {
 public:
  using OnProgress = std::function<void(const LiveProgress&)>;

  /// All must outlive it. `run` holds nothing yet. `on_progress` may be empty.
  LiveRun(const Model& model, Transformer& transformer, HeldRun& run, OnProgress on_progress = {});

  /// The tokens before the eviction, through the whole model. Throws Error as Transformer does.
  void read_prompt();

  const HeldRun& run() const { return run_; }

  /// [vocabulary] after the last token before the eviction, once it was read.
  std::span<const float> prompt_logits() const { return prompt_logits_; }

  /// What the model would write after them, up to `count` tokens, without the one that ends its text.
  std::vector<std::int32_t> write(Index count, const Writing& how = {});

  /// Runs over `ids` [E] and their texts, or none, with everything still cached: what the others are compared with.
  void follow(std::span<const std::int32_t> ids, const std::vector<std::string>& pieces);

  /// The same tokens once more over each of `settings`: after the eviction the queries see what it keeps and everything
  /// since, at the positions of the full run. Equal ones are run once. [settings][E]. The last token's loss is NaN, as
  /// nothing came after it. The same bits for any number of threads and whatever else is run. Throws Error where a set
  /// tells of several evictions.
  std::vector<std::vector<ModelOutcome>> evict(const std::vector<const KeptSets*>& settings);

  /// The same tokens one after the other over the caches of each of `settings`, all of which have a schedule: every
  /// layer decides over what the model computes on what it kept before. Evaluated as evict() does. The same bits for
  /// any number of threads and whatever else is run. Throws Error as LayerDecoding does.
  struct Decoded {
    std::vector<ModelOutcome> outcomes;  ///< [E]
    std::vector<Residency> sets;         ///< layer-major
  };
  std::vector<Decoded> decode(std::span<const Setting> settings);

  /// What the model writes over each of `kept`, then each of `scheduled`, after the prompt, up to `count` tokens each:
  /// without text, answer and comparison. Where tokens are drawn, each text's are by the same numbers. Equal sets are
  /// run once. Null: everything is kept.
  std::vector<Generation> generate(const std::vector<const KeptSets*>& kept, std::span<const Setting> scheduled,
                                   Index count, const Writing& how = {});

 private:
  void report(LiveProgress::Stage stage, double fraction) const;
  KvCache view_of(const KeptSets* setting, Index capacity) const;
  std::vector<std::unique_ptr<DecodingCaches>> begin_decoding(std::span<const Setting> settings);
  void compare(std::span<const std::size_t> batch, const Buffer& states,
               std::vector<std::vector<ModelOutcome>>& outcomes) const;

  const Model& model_;
  Transformer& transformer_;
  HeldRun& run_;
  OnProgress on_progress_;
  std::vector<float> prompt_logits_;                           // after the last token before the eviction
  Buffer full_states_;                                         // [E, C] of the run with everything
  std::vector<std::unique_ptr<LayerProjection>> projections_;  // [layer], once a schedule asks for them
};

/// Adds the measures of the whole model to the results of `replay`, which are of `settings` and whose kept sets are of
/// `run`. Those of settings with a schedule become what the model's caches kept.
void measure_live(LiveRun& run, std::span<const Setting> settings, TraceReplay& replay);

/// Adds what the model writes freely, up to `count` tokens, to `replay` and its results, which are of `settings`. Texts
/// are by `tokenizer`, which may be null; one that has one of `answers` in it, whatever the case of its letters,
/// answered.
void generate_live(LiveRun& run, std::span<const Setting> settings, TraceReplay& replay, Index count,
                   const Writing& how, const Tokenizer* tokenizer, const std::vector<std::string>& answers);

/// The share of a text's four-token sequences that stood in it before; 0 for fewer than five tokens.
double repeated_4grams(std::span<const std::int32_t> ids);

}  // namespace kvreplay::tracer
