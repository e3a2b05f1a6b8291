// A policy in five steps: score, smooth, share, budget, select; of oracles a sixth refines. A published method is a
// named combination of them.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "policy/capacity.h"
#include "policy/head.h"
#include "policy/need.h"
#include "policy/parameter.h"
#include "policy/run_identity.h"
#include "policy/schedule.h"

namespace kvreplay {

/// Positions that are kept whatever their score. They count towards the capacity: one below them cannot be replayed,
/// and one that is no more leaves nothing to choose.
struct Protection {
  int sinks = 0;        ///< the first positions of all
  int window = 0;       ///< the last positions before the eviction: the observation window
  bool prompt = false;  ///< all of the prompt as well

  int count() const { return sinks + window; }

  /// The same in the rows of a head: positions that it no longer holds protect nothing. Together at most R.
  Protection held_by(const HeadShape& shape) const;
};

/// A query head's scores on their way to what ranks: for figures of what each step does.
struct ScoreStage {
  enum class Step {
    alone,     ///< by the attention of one query of the observation window
    in_time,   ///< by the window's queries up to that one, smoothed in time as if the window ended there
    in_space,  ///< smoothed over positions: what ranks
  };

  Step step = Step::alone;
  int query = -1;  ///< place in the window, oldest first; −1: of the whole window
  int width = 1;   ///< of the window over positions, where there is one
  int shift = 0;
};

/// Takes the scores of the rows before the window after one stage.
using StageReceiver = std::function<void(const ScoreStage&, std::span<const float>)>;

/// Steps 1 and 2: gives every position a score; the higher, the rather it is kept.
class Ranking {
 public:
  virtual ~Ranking() = default;

  /// Protected positions are not ranked.
  virtual Protection protection() const { return {}; }

  /// How many rows of a head of this shape stand ahead of all that scores decide on: the protected ones, and more where
  /// a method puts others in a fixed order before those that it can judge. A capacity of no more leaves nothing to
  /// choose.
  virtual int unscored(const HeadShape& shape) const { return protection().held_by(shape).count(); }

  virtual Requirements requirements() const { return {}; }

  /// Throws Error where it cannot rank the rows of a head of this shape, or of this run, as where it goes by what was
  /// found out about another model. Both are asked before any work.
  virtual void check(const HeadShape& /*shape*/) const {}
  virtual void check_run(const RunIdentity& /*run*/) const {}

  /// A new memory of a head that is about to be filled token by token, for rankings that go by more than the cache
  /// still shows. score() finds it as Head::memory() then; null, as for most, where the cache is all that counts.
  virtual std::unique_ptr<RankingMemory> memory(const HeadShape& /*shape*/) const { return nullptr; }

  /// Scores of the head's rows for query head `member` of its group: [R]. Those of protected positions are not looked
  /// at. Throws Error where the head lacks what it needs.
  virtual void score(const Head& head, int member, std::span<float> scores) const = 0;

  /// Whether smooth() and refine() look at the capacity. If not, they are called once for all capacities.
  virtual bool depends_on_capacity() const { return false; }

  /// Smooths a query head's scores [R] over positions, in place. `capacity` is the capacity asked for, before any
  /// budget shifts it between layers or heads; at least what is protected of the rows, at most R.
  virtual void smooth(const Head& head, int member, int capacity, std::span<float> scores) const;

  /// Whether there is something to see between the attention of single queries and the scores, and all of it: every
  /// query alone, then every query in time, then the scores smoothed in space, which are those of score() and smooth().
  virtual bool has_stages() const { return false; }
  virtual void stages(const Head& head, int member, int capacity, const StageReceiver& take) const;

  /// A second look at scores that the query heads `members` of the head's group already share: [R], in place. For
  /// methods whose later stage works on shared scores; most have none. Where a whole layer shares, each KV head's part
  /// is refined before the parts are combined.
  virtual void refine(const Head& head, std::span<const int> members, int capacity, std::span<float> scores) const;
};

/// Whose kept sets are the same.
enum class Granularity {
  query,  ///< every query head has its own set
  kv,     ///< the query heads of a group share one: what saves memory in grouped-query attention
  layer,  ///< all heads of a layer share one
};

/// A method that keeps positions by a rule alone, without looking at keys, values or queries.
class Pattern {
 public:
  virtual ~Pattern() = default;

  /// Positions that every capacity keeps.
  virtual Protection protection() const { return {}; }

  /// The smallest capacity that the pattern can be drawn with in a head of this shape: at least what it protects.
  virtual int minimum_capacity(const HeadShape& shape) const;

  /// Throws Error where it cannot be drawn in a head of this shape at any capacity. Asked for every layer before any
  /// work.
  virtual void check(const HeadShape& /*shape*/) const {}

  /// What a reader of the numbers has to know of the sets of a layer whose heads have this shape; mostly nothing. What
  /// is the same for several layers is told once.
  virtual std::string note(const HeadShape& /*shape*/) const { return ""; }

  /// The same of the run as a whole, for patterns that were made for one: throws Error where this is another, ...
  virtual void check_run(const RunIdentity& /*run*/) const {}
  /// ... and what a reader of the numbers has to know of it.
  virtual std::string note_on_run(const RunIdentity& /*run*/) const { return ""; }

  /// What the capacity asked for means to the pattern.
  enum class CapacityRule {
    asked,       ///< it is kept to
    everything,  ///< all positions are kept whatever it is
    own,         ///< the pattern brings its own
  };
  virtual CapacityRule capacity_rule() const { return CapacityRule::asked; }

  /// The coarsest granularity that can show the pattern: query where the query heads of a group keep different
  /// positions, kv where KV heads do.
  virtual Granularity coarsest_granularity() const { return Granularity::layer; }

  /// The kept rows, ascending, of a head of this shape. `member` is the query head of the group whose set is asked for
  /// at granularity query, and 0 where the group shares one.
  virtual std::vector<int> keep(const HeadShape& shape, int member, int capacity) const = 0;

  /// A new memory of a head that is about to be filled token by token, for patterns that go by what they drew before.
  /// Null, as for most, where the head's shape is all that counts.
  virtual std::unique_ptr<PatternMemory> memory(const HeadShape& /*shape*/) const { return nullptr; }

  /// The same as keep() where there is a memory, which remembers it then. `memory` is one of this pattern's.
  virtual std::vector<int> keep_again(const HeadShape& shape, int member, int capacity, PatternMemory& memory) const;
};

/// Step 3: how the scores of heads that share a kept set become one.
enum class Share { mean, max, sum };

std::string_view name_of(Granularity granularity);
std::string_view name_of(Share share);

/// The other way round; nothing for any other text.
std::optional<Granularity> granularity_named(std::string_view name);
std::optional<Share> share_named(std::string_view name);

/// What a budget found out about a layer: some numbers for each KV head.
using LayerSurvey = std::vector<std::vector<float>>;

/// What a budget may look at when it divides a layer's positions among the layer's kept sets.
struct BudgetRequest {
  int layer = 0;
  int num_layers = 1;
  int layer_among_alike = 0;  ///< the layer's place among those that hold as many positions; see HeadShape
  int layers_alike = 1;
  int rows = 0;                   ///< R, what each head of the layer holds, or once it was evicted the longest
  int capacity = 0;               ///< asked for, per kept set, on average over the layers alike; at most R
  double unrounded_capacity = 0;  ///< the same before a share became whole positions
  Protection protection;          ///< of the rows, counted in the capacity; of a Pattern, its smallest capacity
  Granularity granularity = Granularity::kv;  ///< whose capacities are asked for
  int num_query_heads = 1;
  int num_kv_heads = 1;
  /// Scores [R] of every query head of the layer, and of every KV head as its group shares them. Only there for
  /// budgets that need scores. Heads of an evicted cache hold different numbers of rows, and have as many scores.
  std::vector<std::span<const float>> query_head_scores;
  std::vector<std::span<const float>> kv_head_scores;
  /// What was found out about every layer alike, for budgets that survey: [layers_alike]. Otherwise empty.
  std::span<const LayerSurvey> surveys;
};

/// Step 4: how many positions each kept set of a layer gets. Without one, each gets the capacity asked for.
class Budget {
 public:
  virtual ~Budget() = default;

  /// Whether allocate() looks at the scores (an adaptive budget cannot be put on a pattern).
  virtual bool needs_scores() const { return false; }

  /// Whether allocate() looks at surveys of all layers that hold as much, and at nothing else of what is in the heads.
  /// Under a schedule they are of the prompt, and what they divide stays divided.
  virtual bool surveys() const { return false; }

  /// One cheap pass over a KV head, before any layer is divided: what allocate() will have to know of it, as few
  /// numbers as it takes. `scores` [R] are those that the head's group shares, only there for budgets that need scores.
  /// `protection` is of the rows. Throws Error as Head does.
  virtual std::vector<float> survey(const Head& head, std::span<const float> scores, Protection protection) const;

  /// What survey() asks of a head: for budgets that survey.
  virtual Requirements requirements() const { return {}; }

  /// Whether allocate() looks at more than the request's numbers.
  bool looks_at_heads() const { return needs_scores() || surveys(); }

  /// Throws Error where a layer cannot be divided, whatever is in its heads. Asked for every layer before any work;
  /// budgets that do not look at heads are asked to allocate() as well.
  virtual void check(const BudgetRequest& /*request*/) const {}

  /// The mean capacity of a budget that brings its own numbers, whatever capacity is asked for.
  virtual std::optional<int> own_capacity() const { return std::nullopt; }

  /// The capacity of every query head (granularity query) or KV head (kv), or one for the layer, protected positions
  /// included. Throws Error where it cannot be divided.
  virtual std::vector<int> allocate(const BudgetRequest& request) const = 0;
};

/// How many capacities a budget gives out for a layer.
int sets_per_layer(const BudgetRequest& request);

/// Step 5: which rows a kept set holds. Without one, those with the highest scores.
class Selection {
 public:
  virtual ~Selection() = default;

  /// Exactly `capacity` ascending rows, the protected ones among them. `scores` is [R].
  virtual std::vector<int> select(std::span<const float> scores, Protection protection, int capacity) const = 0;
};

/// Protected rows and those with the highest scores: exactly min(capacity, R), ascending. Among equal scores the
/// earlier row wins. Throws Error, naming the row, if a ranked score is NaN. `protection` is of the rows.
std::vector<int> select_top(std::span<const float> scores, Protection protection, int capacity);

/// The positions that each head of a layer keeps: a set per query head at granularity query, otherwise one per KV head.
using LayerSets = std::vector<std::vector<int>>;

class LayerSource;

/// What refining a layer's kept sets takes depends on these.
struct RefinementShape {
  Granularity granularity = Granularity::kv;
  int num_kv_heads = 1;
  int group_size = 1;
  Index head_dim = 0;
  Index hidden_size = 0;  ///< C, what the output projection gives; 0 where the layer has none
  int positions = 0;      ///< that the layer holds
  Index tokens = 0;       ///< positions up to the last evaluation query
  Index queries = 0;      ///< evaluation queries

  int num_query_heads() const { return num_kv_heads * group_size; }
};

/// A layer whose kept sets are refined.
class LayerRefinement {
 public:
  virtual ~LayerRefinement() = default;

  /// Sets of the same sizes in place of `sets`, of which those of heads that share one are equal. One call at a time.
  virtual LayerSets refine(Granularity granularity, LayerSets sets) = 0;
};

/// Step 6, for oracles: other kept sets with less layer error, once those of all settings of a run are drawn. Of the
/// sets with the setting's granularity and exactly its capacity those are refined that have the least mean squared
/// layer error over the evaluation queries, its own or another setting's, and where that of the refined ones is
/// measured to be no less, they stay: no setting that is comparable is better.
class Refinement {
 public:
  virtual ~Refinement() = default;

  /// Reads what it takes of the layer, whose positions follow each other. Throws Error as HeadSource does.
  virtual std::unique_ptr<LayerRefinement> begin(const LayerSource& layer) const = 0;

  /// About how many operations the refinement of a layer's sets takes, and the most bytes while it works.
  virtual double operations(const RefinementShape& shape) const = 0;
  virtual Index memory(const RefinementShape& shape) const = 0;
};

/// A complete policy: what a spec stands for. Immutable, and safe to use from several threads.
struct Policy {
  std::string canonical = {};  ///< the spec with every parameter that differs from its default
  /// What decides: scores, or a rule without them.
  std::variant<std::shared_ptr<const Ranking>, std::shared_ptr<const Pattern>> rule = {};
  Protection protect = {};                          ///< beside what the rule protects
  std::shared_ptr<const Budget> budget = {};        ///< or none: the same capacity for all
  std::shared_ptr<const Selection> selection = {};  ///< or none: select_top
  std::optional<Granularity> granularity = {};      ///< the method's own, where it has one
  std::optional<Share> share = {};
  std::optional<Schedule> schedule = {};           ///< or none: evicts once, at the eviction position
  Pin pin = {};                                    ///< this and the next two go with a schedule
  std::optional<RowOrder> order = {};              ///< or none: by position
  std::optional<RowPositions> row_positions = {};  ///< or none: original
  /// Rows that are not chosen stay and are hidden from the queries that come, and at the next eviction all rows are
  /// there to be chosen: no memory is saved. Goes with a schedule.
  bool masks = false;
  /// All layers keep the same positions, of each KV head or at granularity layer of all: their scores are put together
  /// as those of heads that share a set are. Goes with a schedule.
  bool across_layers = false;
  bool oracle = false;  ///< looks at evaluation queries, which no policy can know; marked wherever it is shown
  std::shared_ptr<const Refinement> refinement = {};  ///< or none: what is selected stays
  ShareRule share_rule = nullptr;       ///< of published code that counts in its own way; or none: share · length
  std::vector<std::string> notes = {};  ///< what a reader of its numbers has to know, a line each

  /// The one of the two that it is; of the other, null.
  const std::shared_ptr<const Ranking>& ranking() const;
  const std::shared_ptr<const Pattern>& pattern() const;

  /// Positions that are kept whatever is scored: what the rule, the spec and the pin protect.
  Protection protection() const;

  /// What the ranking and the budget need.
  Requirements requirements() const;

  /// The smallest legal capacity where everything is held: the protected positions, and at least one. A pattern may
  /// need more, by the head's shape.
  int minimum_capacity() const { return std::max(1, protection().count()); }
  int minimum_capacity(const HeadShape& shape) const;

  /// The rows that a pattern keeps of a head of this shape: what is protected beside it takes its places in the
  /// capacity first. For patterns alone.
  /// `memory` is what the pattern remembers of it, or null.
  std::vector<int> draw(const HeadShape& shape, int member, int capacity, PatternMemory* memory = nullptr) const;
};

/// What a method contributes to a policy; each sets the members that it defines.
using Composition = Policy;

/// A method as the registry knows it.
struct Method {
  enum class Step { policy, budget, selection, protection, schedule };

  /// What others are measured by, whether anybody asks for it or not.
  enum class Baseline {
    none,
    floor,  ///< keeps without looking: a policy that does not beat it has learned nothing
    usual,  ///< what papers of the field compare with first
  };

  /// Another method that this one is with a step replaced, where all parameters that both have are the same.
  struct Ablation {
    std::string of = {};
    Parameter::Step step = Parameter::Step::none;
  };

  std::string name;
  Step step = Step::policy;
  std::string summary;  ///< the idea, in a sentence or two
  std::string source;   ///< paper and equation
  std::vector<Parameter> parameters;
  std::function<Composition(const Arguments&)> compose;
  std::string variant_of = {};  ///< the method that this is one implementation of, as in snapkv@kvpress; or empty
  std::string revision = {};    ///< of variants: the commit, or the release, of that code which this describes
  Baseline baseline = Baseline::none;
  Ablation ablation = {};  ///< of none: not one
};

/// Adds a method, built in or a plug-in's (policy/plugin.h): one per method, in the method's own file, so that adding
/// one touches no other. Methods are described when they are first looked up, those of a plug-in once its version was
/// checked: until then nothing of it runs but this constructor, which is all its own. Each library and plug-in has a
/// list to itself; a program's own methods go to register_methods().
class [[gnu::visibility("hidden")]] MethodRegistration {
 public:
  explicit MethodRegistration(Method(*describe)()) : describe_(describe), next_(newest_) { newest_ = this; }
  MethodRegistration(const MethodRegistration&) = delete;
  MethodRegistration& operator=(const MethodRegistration&) = delete;

  /// The methods of the library or plug-in that this is compiled into.
  static std::vector<Method> methods() {
    std::vector<Method> methods;
    for (const MethodRegistration* one = newest_; one != nullptr; one = one->next_) methods.push_back(one->describe_());
    return methods;
  }

 private:
  static inline const MethodRegistration* newest_ = nullptr;

  Method (*describe_)();
  const MethodRegistration* next_;
};

/// Adds all methods, or none and throws Error: for a name that is taken or that no spec can hold, or without compose.
/// Not while other threads look methods up.
void register_methods(std::vector<Method> methods);

/// All methods: policies, then budgets, then selections, each by name.
std::vector<const Method*> registered_methods();

/// How a method is written in a spec: "snapkv", "+pyramid". A policy and a budget may share a name.
std::string written_name(const Method& method);

/// A method with all its parameters at their defaults: "snapkv(window=32, kernel=5, pooling=avg)".
std::string signature(const Method& method);

/// The method that is written like that ("snapkv", "+pyramid"), or null.
const Method* find_method(std::string_view written_name);

/// The policy that a spec stands for. Throws UsageError for malformed specs, unknown methods and parameters
/// (suggesting the nearest), illegal values, and steps that do not go together.
Policy make_policy(std::string_view spec);

/// The same of a preset's spec, in which {name} stands for the value of a parameter.
Policy make_policy(std::string_view spec, const Arguments& values);

}  // namespace kvreplay
