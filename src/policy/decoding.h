// Deciding while tokens come: the caches of one layer under the schedules of its settings, step by step.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "policy/decision.h"
#include "policy/head.h"
#include "policy/setting.h"

namespace kvreplay {

/// How long queries saw the positions of one cache: all that was evicted, and all that stood there in the end.
struct CacheHistory {
  /// The last query of what is never evicted.
  static constexpr int kNever = std::numeric_limits<int>::max();

  std::vector<int> positions;  ///< ascending; more than once where they were hidden and came back
  std::vector<int> until;      ///< of each, the last query that saw it
  /// Of each, where rows may be hidden, the first query that saw it, no later than its own where it never was;
  /// otherwise empty.
  std::vector<int> from;
};

/// What one setting did in one layer.
struct DecodedSetting {
  std::vector<CacheHistory> sets;  ///< [H] at granularity query, otherwise [K]
  /// Outputs of the queries since the prompt, where they were asked for and what queries attend to is not told by
  /// positions alone: [steps, heads that were decoded · group · D]; otherwise empty.
  Matrix outputs;
};

/// A token of the decode phase as a layer computes it.
struct TokenRows {
  int position = 0;
  const float* keys = nullptr;     ///< [K, D]
  const float* values = nullptr;   ///< [K, D]
  const float* queries = nullptr;  ///< [H, D]; null where they were not captured
  bool ends_turn = false;          ///< the next token begins another turn of the conversation
};

/// The caches of some KV heads of a layer, of every setting that has a schedule. Settings share what they hold alike:
/// keys and values are there once, and products of queries and keys are taken once. It knows no trace: in replay one
/// stands behind the prompt and the tokens, in a live run the model.
///
/// A step's token joins every cache, then its queries attend to what is there, and then policies evict, where their
/// schedules say so. Attention is softmax in float32 over the rows of a cache, in its order.
class LayerDecoding {
 public:
  /// Which outputs of the queries will be asked for.
  enum class Outputs {
    none,
    untold,  ///< those that kept positions do not tell: of every step, by take()
    newest,  ///< of all settings, step by step, by output(); every step has to have queries then
  };

  /// `prompt` delivers the layer's heads at the prompt's end, and must outlive it; so must the settings, all of which
  /// have a schedule. `kv_heads` are those that are decoded: all of them where a setting's heads depend on each other.
  /// `combination_bytes`: see LayerDecision. Evicts the prompt where it is due. Throws Error as LayerDecision does.
  LayerDecoding(const LayerSource& prompt, std::span<const Setting> settings, std::vector<int> kv_heads,
                Index combination_bytes, Outputs outputs);
  ~LayerDecoding();
  LayerDecoding(const LayerDecoding&) = delete;
  LayerDecoding& operator=(const LayerDecoding&) = delete;

  /// The next token. Throws Error as LayerDecision does.
  void step(const TokenRows& token);

  /// What the newest query gets from the cache of a setting: [H · D], of the heads that are decoded.
  std::span<const float> output(std::size_t setting) const;

  /// What every setting did up to now: sets of the heads that were decoded are filled, all others empty.
  std::vector<DecodedSetting> take();

  /// How many queries before a step have to be at hand, for the settings of a layer.
  static int window_of(std::span<const Setting> settings);

  /// Whether a setting looks at queries at all once the prompt is over.
  static bool looks_at_queries(const Setting& setting);

 private:
  class Rows;
  class LiveHead;
  class LiveLayer;
  struct Lane;
  struct Caches;

  void divide(Caches& caches, std::size_t setting) const;
  void begin(Caches& caches);
  void evict(Caches& caches, const LayerSource& layer, int last_query, bool observes = false);
  void attend(Caches& caches);
  void multiply_reindexed(Lane& lane);
  void sum_values(Caches& caches) const;
  void observe(Caches& caches) const;
  void leave_behind(Caches& caches) const;
  void keep_rows(Lane& lane, const std::vector<int>& left, int last_query) const;
  static void hide_rows(Lane& lane, const std::vector<int>& seen, int last_query);
  int rows_of(const Caches& caches) const;
  bool is_full(const Caches& caches) const;
  int capacity_of(const Caches& caches) const;

  const LayerSource& prompt_;
  std::vector<int> kv_heads_;
  Index combination_bytes_;
  HeadShape shape_;  // of the prompt's first head
  int position_;     // of the last token that came
  int window_;       // queries that stay at hand
  Outputs outputs_;
  bool cuts_apart_ = false;  // while a prompt is evicted: as by one eviction, without what is remembered of it
  std::map<int, std::unique_ptr<Rows>> rows_;         // [KV head]
  std::map<int, std::unique_ptr<HeadSource>> heads_;  // [KV head]: the prompt's
  std::vector<std::unique_ptr<Caches>> caches_;       // [setting]
  std::unique_ptr<RotaryAngles> angles_;              // of places in caches, where they are reindexed
};

}  // namespace kvreplay
