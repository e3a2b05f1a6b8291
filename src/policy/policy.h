// A policy in five steps: score, smooth, share, budget, select. A published method is a named combination of them.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/head.h"
#include "policy/parameter.h"

namespace kvreplay {

/// Positions that are kept whatever their score.
struct Protection {
  int sinks = 0;   ///< the first positions of the prompt
  int window = 0;  ///< the last positions of the prompt: the observation window

  int count() const { return sinks + window; }
};

/// What a ranking must find in a trace; checked before any work begins.
struct Requirements {
  int window_queries = 0;              ///< prompt queries at hand before the eviction, without a gap
  bool output_projection = false;      ///< used where the trace has one; the method says what it does without
  bool accumulated_attention = false;  ///< recorded attention mass, or all prompt queries
  bool all_queries = false;            ///< all prompt queries
};

/// Steps 1 and 2: gives every position a score; the higher, the rather it is kept.
class Ranking {
 public:
  virtual ~Ranking() = default;

  /// Protected positions count towards the capacity and are not ranked.
  virtual Protection protection() const { return {}; }

  virtual Requirements requirements() const { return {}; }

  /// Whether score() looks at the capacity. If not, it is called once for all capacities.
  virtual bool depends_on_capacity() const { return false; }

  /// Scores of the prompt's positions for query head `member` of the head's group: [P]. Those of protected positions
  /// are not looked at. `capacity` is the capacity asked for, before any budget shifts it between layers or heads; at
  /// least protection().count(), at most P. Throws Error where the head lacks what it needs.
  virtual void score(const Head& head, int member, int capacity, std::span<float> scores) const = 0;
};

/// A method that keeps positions by a rule alone, without looking at keys, values or queries.
class Pattern {
 public:
  virtual ~Pattern() = default;

  /// The smallest capacity that the pattern can be drawn with.
  virtual int minimum_capacity() const { return 1; }

  /// True for methods that keep everything.
  virtual bool ignores_capacity() const { return false; }

  /// The kept positions, ascending, for a head of this shape. `member` is the query head of the group whose set is
  /// asked for at granularity query, and 0 where the group shares one.
  virtual std::vector<int> keep(const HeadShape& shape, int member, int capacity) const = 0;
};

/// Whose kept sets are the same.
enum class Granularity {
  query,  ///< every query head has its own set
  kv,     ///< the query heads of a group share one: what saves memory in grouped-query attention
  layer,  ///< all heads of a layer share one
};

/// Step 3: how the scores of heads that share a kept set become one.
enum class Share { mean, max, sum };

std::string_view name_of(Granularity granularity);
std::string_view name_of(Share share);

/// What a budget may look at when it divides a layer's positions among the layer's kept sets.
struct BudgetRequest {
  int layer = 0;
  int num_layers = 1;
  int prompt_length = 0;
  int capacity = 0;                             ///< asked for, per kept set, on average over layers
  Protection protection;                        ///< counted in the capacity
  std::vector<std::span<const float>> scores;   ///< a kept set each: [P]; empty for a Pattern
};

/// Step 4: how many positions each kept set of a layer gets. Without one, each gets the capacity asked for.
class Budget {
 public:
  virtual ~Budget() = default;

  /// Whether allocate() looks at the scores (an adaptive budget cannot be put on a pattern).
  virtual bool needs_scores() const { return false; }

  /// A capacity for each kept set, protected positions included. `sets` is how many there are.
  virtual std::vector<int> allocate(const BudgetRequest& request, int sets) const = 0;
};

/// Step 5: which positions a kept set holds. Without one, the positions with the highest scores.
class Selection {
 public:
  virtual ~Selection() = default;

  /// Exactly `capacity` ascending positions, the protected ones among them. `scores` is [P].
  virtual std::vector<int> select(std::span<const float> scores, Protection protection, int capacity) const = 0;
};

/// Protected positions and those with the highest scores: exactly min(capacity, P), ascending. Among equal scores the
/// earlier position wins. Throws Error, naming the position, if a ranked score is NaN.
std::vector<int> select_top(std::span<const float> scores, Protection protection, int capacity);

/// A complete policy: what a spec stands for. Immutable, and safe to use from several threads.
struct Policy {
  std::string canonical = {};                ///< the spec with every parameter that differs from its default
  std::shared_ptr<const Ranking> ranking = {};  ///< this or
  std::shared_ptr<const Pattern> pattern = {};  ///< this
  std::shared_ptr<const Budget> budget = {};  ///< or none: the same capacity for all
  std::shared_ptr<const Selection> selection = {};  ///< or none: select_top
  std::optional<Granularity> granularity = {};  ///< the method's own, where it has one
  std::optional<Share> share = {};

  /// The smallest legal capacity: the protected positions, and at least one.
  int minimum_capacity() const;
};

/// What a method contributes to a policy; each sets the members that it defines.
using Composition = Policy;

/// A method as the registry knows it.
struct Method {
  enum class Step { policy, budget, selection };

  std::string name;
  Step step = Step::policy;
  std::string summary;  ///< the idea, in a sentence or two
  std::string source;   ///< paper and equation
  std::vector<Parameter> parameters;
  std::function<Composition(const Arguments&)> compose;
};

/// Adds a method when the program (or a plug-in) is loaded: one per method, in the method's own file, so that adding
/// one touches no other. Throws std::logic_error for a name that is taken.
class MethodRegistration {
 public:
  explicit MethodRegistration(Method method);
};

/// All methods, by name.
std::vector<const Method*> registered_methods();

/// The method of that name and step, or null.
const Method* find_method(std::string_view name);

/// The policy that a spec stands for. Throws UsageError for malformed specs, unknown methods and parameters
/// (suggesting the nearest), illegal values, and steps that do not go together.
Policy make_policy(std::string_view spec);

}  // namespace kvreplay
