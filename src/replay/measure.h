// The measures of a result, as everything that calculates, writes or reads them goes through them.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "base/matrix.h"
#include "replay/rank_agreement.h"
#include "replay/residency.h"
#include "replay/table.h"

namespace kvreplay {

/// A measure: its place among measures(). Those that are asked for by name have a name here too.
enum class Measure : int {
  layer_error,
  head_error,
  attention_recall,
  cosine,
  span_recall,
  spearman,
  kendall,
  residual_error,
  residual_sum,
  cache_size,
  late_hits,
  recurrence,
  turnover,
  time_to_eviction,
  span_survival,
  kl,
  nll,
  nll_increase,
  agree
};

/// What an evaluation query of one query head gets from the full cache, and from what is left of it.
struct HeadOutcome {
  Eigen::Ref<const Eigen::RowVectorXd> full;        ///< [D] o
  Eigen::Ref<const Eigen::RowVectorXd> evicted;     ///< [D] ô
  Eigen::Ref<const Eigen::RowVectorXd> difference;  ///< [D] ô − o
  double full_mass;                                 ///< sum of the exponentials over the full cache
  double cached_mass;                               ///< the same, against the same maximum, over what is still cached
  int cached = 0;                                   ///< positions that the query sees of what is still cached
};

/// What an evaluation query gets from all heads of a layer, through the output projection (docs/measures.md).
struct LayerOutcome {
  double full;        ///< ‖Σ_h W_h o_h‖
  double difference;  ///< ‖Σ_h W_h (ô_h − o_h)‖
  double change;      ///< of what is added to the residual stream: the same, or of what a norm behind makes of the two
  double residual;    ///< ‖x‖ of the residual stream after that; NaN where the trace does not tell
};

/// What a query head keeps of a span, of which its layer held at least one position.
struct SpanOutcome {
  const Residency& residency;
  int first;                     ///< of the positions of the span that the layer held
  int end;                       ///< after the last of them
  std::span<const int> queries;  ///< [E] positions of the evaluation queries
};

/// A step under a schedule: what its query finds in the cache of a query head, and what is evicted after it and before
/// the next evaluation query.
struct StepOutcome {
  int cached = 0;           ///< positions that the query sees of what is still cached
  double full_mass = 0;     ///< as in HeadOutcome
  double cached_mass = 0;   ///< the same
  int top = 0;              ///< positions to which it pays, with the full cache, more than to the (cached + 1)-th most
  int cached_top = 0;       ///< those of them that are still cached
  int evicted = 0;          ///< positions that it, or a token until the next evaluation query, was the last to see
  double steps_stayed = 0;  ///< of them, from each one's arrival to the last query that saw it, summed
  int left = 0;             ///< positions that the evictions before theirs left, one after the other
  int replaced = 0;         ///< those of them that are evicted
};

/// What a query head's cache still holds of a span at a step under a schedule.
struct SpanStepOutcome {
  int held = 0;    ///< positions of the span that the layer held at the eviction: at least one
  int cached = 0;  ///< those of them that the step's query sees
};

/// What becomes of the residual stream if the changes of all layers add up.
struct StreamOutcome {
  double change;    ///< ‖Σ_l of what layer l adds, its change‖
  double residual;  ///< ‖x‖ of the residual stream after the last layer's attention
};

/// What the model says after an evaluation query, of the full cache and of what is left of it (live runs).
struct ModelOutcome {
  double divergence;      ///< KL(full ‖ evicted) of the next token's distribution, in nats
  double loss;            ///< −ln of the probability of the token that came next, with what is left; NaN: none came
  double full_loss;       ///< the same with the full cache
  bool same_most_likely;  ///< whether both find the same token most likely, of equal ones the lowest
};

/// Calculates a number of a measure.
template <class Outcome>
using MeasureFunction = double (*)(const Outcome&);

/// What there is to know about a measure. docs/measures.md defines them, docs/adding-a-measure.md adds one.
struct MeasureTraits {
  /// What its numbers are per, beside layer and trace.
  enum class Per { query, head_and_query, head_and_span, head, model_query, span_and_query };

  /// Per query, per head and query, per head and span, or, of policies that rank and where rank agreement is asked for,
  /// per head. Of the whole residual stream, and of the whole model in live runs, per query and of no layer. Of steps
  /// per query, and of spans at steps per span and query: the mean over the query heads.
  using Definition =
      std::variant<MeasureFunction<LayerOutcome>, MeasureFunction<HeadOutcome>, MeasureFunction<SpanOutcome>,
                   MeasureFunction<RankCorrelation>, MeasureFunction<ModelOutcome>, MeasureFunction<StreamOutcome>,
                   MeasureFunction<StepOutcome>, MeasureFunction<SpanStepOutcome>>;
  static constexpr std::array kPerOfDefinition = {Per::query, Per::head_and_query, Per::head_and_span,
                                                  Per::head,  Per::model_query,    Per::model_query,
                                                  Per::query, Per::span_and_query};

  std::string_view name;       ///< in files and options: "layer_error"
  std::string_view noun;       ///< in sentences and on axes: "layer error"
  std::string_view unit = {};  ///< on axes, what it is a share of: "relative to the full output"; or empty
  Definition definition;
  bool lower_is_better;
  /// Whether a number may be NaN, since there was nothing to measure: it counts in no mean.
  bool may_be_missing = false;
  /// Whether a mean over layers and queries is the root of the mean of the squares.
  bool root_mean_square = false;
  /// Whether it is measured under a schedule alone, while a cache changes.
  bool over_time = false;
  Per per = kPerOfDefinition[definition.index()];
  Measure measure = {};  ///< set by measures()

  bool is_of_layers() const { return per != Per::model_query; }
};

/// All of them, layer_error first.
std::span<const MeasureTraits> measures();

const MeasureTraits& traits_of(Measure measure);

/// The measure called `name`. Throws UsageError, naming those that there are.
Measure measure_named(std::string_view name);

/// The measures that are calculated from an Outcome, in their order.
template <class Outcome>
struct Formula {
  Measure measure;
  MeasureFunction<Outcome> calculate;
};
template <class Outcome>
const std::vector<Formula<Outcome>>& formulas() {
  static const std::vector<Formula<Outcome>> found = [] {
    std::vector<Formula<Outcome>> list;
    for (const MeasureTraits& traits : measures()) {
      if (const auto* calculate = std::get_if<MeasureFunction<Outcome>>(&traits.definition)) {
        list.push_back({traits.measure, *calculate});
      }
    }
    return list;
  }();
  return found;
}

/// What there is of every measure.
template <class T>
class PerMeasure {
 public:
  PerMeasure() : of_measures_(measures().size()) {}

  T& operator[](Measure measure) { return of_measures_[static_cast<std::size_t>(measure)]; }
  const T& operator[](Measure measure) const { return of_measures_[static_cast<std::size_t>(measure)]; }

 private:
  std::vector<T> of_measures_;
};

/// The tables of a result: [L, E], [L, H, E], [L, H, S], [L, H] or [L, S, E], of the whole model [E]; empty where it
/// was not measured.
using MeasureTables = PerMeasure<Table>;

/// The same of one layer: [E], [H, E], [H, S], [H] or [S, E]; of the whole model none.
using LayerNumbers = PerMeasure<std::vector<float>>;

/// How many heads, evaluation queries and spans a result's numbers are of.
struct MeasureExtent {
  Index query_heads = 0;  ///< H
  Index queries = 0;      ///< E
  Index spans = 0;        ///< S
};

/// The shape of a measure's numbers in one layer, or in the whole model.
std::vector<Index> layer_shape(const MeasureTraits& measure, const MeasureExtent& extent);

/// How many numbers that is.
std::size_t number_count(const MeasureTraits& measure, const MeasureExtent& extent);

/// The shape of its table in results of `layers` layers.
std::vector<Index> table_shape(const MeasureTraits& measure, Index layers, const MeasureExtent& extent);

/// How many numbers all measures of one layer are, `with_ranks` those of rank agreement included.
Index numbers_per_layer(const MeasureExtent& extent, bool with_ranks);

}  // namespace kvreplay
