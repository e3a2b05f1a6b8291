#include "replay/measure.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>

#include "base/error.h"
#include "policy/parameter.h"

namespace kvreplay {
namespace {

constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();

// NaN where the reference is not known.
double relative_error(double difference, double reference) {
  if (std::isnan(reference)) return reference;
  if (reference > 0) return difference / reference;
  return difference > 0 ? 1.0 : 0.0;
}

double layer_error(const LayerOutcome& outcome) { return relative_error(outcome.difference, outcome.full); }

double residual_error(const LayerOutcome& outcome) { return relative_error(outcome.change, outcome.residual); }

double residual_sum(const StreamOutcome& outcome) { return relative_error(outcome.change, outcome.residual); }

double head_error(const HeadOutcome& outcome) { return relative_error(outcome.difference.norm(), outcome.full.norm()); }

// In parts of what all positions have: a sink's attention is in neither, and beside one everything may vanish.
double attention_recall(const HeadOutcome& outcome) {
  return outcome.full_mass > 0 ? outcome.cached_mass / outcome.full_mass : 1.0;
}

double cosine(const HeadOutcome& outcome) {
  const double norms = outcome.evicted.norm() * outcome.full.norm();
  if (norms > 0) return outcome.evicted.dot(outcome.full) / norms;
  return outcome.evicted.norm() > 0 || outcome.full.norm() > 0 ? 0.0 : 1.0;
}

double span_recall(const SpanOutcome& outcome) {
  return outcome.residency.mean_kept(outcome.first, outcome.end, outcome.queries) / (outcome.end - outcome.first);
}

double spearman(const RankCorrelation& agreement) { return agreement.spearman; }

double kendall(const RankCorrelation& agreement) { return agreement.kendall; }

double cache_size(const HeadOutcome& outcome) { return outcome.cached; }

double late_hits(const StepOutcome& outcome) {
  return outcome.full_mass > 0 ? std::max(0.0, 1 - outcome.cached_mass / outcome.full_mass) : 0.0;
}

double recurrence(const StepOutcome& outcome) {
  return static_cast<double>(outcome.top - outcome.cached_top) / outcome.cached;
}

// What came and went between two evictions replaces nothing.
double turnover(const StepOutcome& outcome) {
  return outcome.evicted > 0 && outcome.left > 0 ? static_cast<double>(outcome.replaced) / outcome.left : kNothing;
}

double time_to_eviction(const StepOutcome& outcome) {
  return outcome.evicted > 0 ? outcome.steps_stayed / outcome.evicted : kNothing;
}

double span_survival(const SpanStepOutcome& outcome) { return static_cast<double>(outcome.cached) / outcome.held; }

double kl(const ModelOutcome& outcome) { return outcome.divergence; }

double nll(const ModelOutcome& outcome) { return outcome.loss; }

double nll_increase(const ModelOutcome& outcome) { return outcome.loss - outcome.full_loss; }

double agree(const ModelOutcome& outcome) { return outcome.same_most_likely ? 1.0 : 0.0; }

// In the order of the names in Measure; what has none there comes after them.
auto list_of_measures() {
  auto list = std::to_array<MeasureTraits>({
      {.name = "layer_error",
       .noun = "layer error",
       .unit = "relative to the full output",
       .definition = layer_error,
       .lower_is_better = true},
      {.name = "head_error",
       .noun = "head error",
       .unit = "relative to the full output",
       .definition = head_error,
       .lower_is_better = true},
      {.name = "attention_recall",
       .noun = "attention recall",
       .unit = "share of the mass",
       .definition = attention_recall,
       .lower_is_better = false},
      {.name = "cosine", .noun = "cosine", .definition = cosine, .lower_is_better = false},
      {.name = "span_recall",
       .noun = "span recall",
       .unit = "share of positions",
       .definition = span_recall,
       .lower_is_better = false,
       .may_be_missing = true},
      {.name = "spearman",
       .noun = "rank agreement (Spearman)",
       .definition = spearman,
       .lower_is_better = false,
       .may_be_missing = true},
      {.name = "kendall",
       .noun = "rank agreement (Kendall)",
       .definition = kendall,
       .lower_is_better = false,
       .may_be_missing = true},
      {.name = "residual_error",
       .noun = "residual error",
       .unit = "relative to the residual stream",
       .definition = residual_error,
       .lower_is_better = true,
       .may_be_missing = true,
       .root_mean_square = true},
      {.name = "residual_sum",
       .noun = "sum of the layers' changes",
       .unit = "relative to the residual stream",
       .definition = residual_sum,
       .lower_is_better = true},
      {.name = "cache_size",
       .noun = "cached positions",
       .unit = "positions",
       .definition = cache_size,
       .lower_is_better = true,
       .over_time = true},
      {.name = "late_hits",
       .noun = "late hits",
       .unit = "share of the mass",
       .definition = late_hits,
       .lower_is_better = true,
       .over_time = true},
      {.name = "recurrence",
       .noun = "importance recurrence",
       .unit = "share of the most attended",
       .definition = recurrence,
       .lower_is_better = true,
       .over_time = true},
      {.name = "turnover",
       .noun = "turnover",
       .unit = "share of what the last eviction left",
       .definition = turnover,
       .lower_is_better = true,
       .may_be_missing = true,
       .over_time = true},
      {.name = "time_to_eviction",
       .noun = "time to eviction",
       .unit = "steps",
       .definition = time_to_eviction,
       .lower_is_better = false,
       .may_be_missing = true,
       .over_time = true},
      {.name = "span_survival",
       .noun = "span survival",
       .unit = "share of positions",
       .definition = span_survival,
       .lower_is_better = false,
       .may_be_missing = true,
       .over_time = true},
      {.name = "kl", .noun = "KL divergence", .unit = "nats", .definition = kl, .lower_is_better = true},
      {.name = "nll",
       .noun = "loss",
       .unit = "nats",
       .definition = nll,
       .lower_is_better = true,
       .may_be_missing = true},
      {.name = "nll_increase",
       .noun = "increase of the loss",
       .unit = "nats",
       .definition = nll_increase,
       .lower_is_better = true,
       .may_be_missing = true},
      {.name = "agree",
       .noun = "agreement of the most likely token",
       .unit = "share of tokens",
       .definition = agree,
       .lower_is_better = false},
  });
  int place = 0;
  for (MeasureTraits& traits : list) traits.measure = Measure{place++};
  return list;
}

}  // namespace

std::span<const MeasureTraits> measures() {
  static const auto list = list_of_measures();
  return list;
}

const MeasureTraits& traits_of(Measure measure) { return measures()[static_cast<std::size_t>(measure)]; }

Measure measure_named(std::string_view name) {
  const auto found = std::ranges::find(measures(), name, &MeasureTraits::name);
  if (found != measures().end()) return found->measure;
  std::vector<std::string> names;
  for (const MeasureTraits& traits : measures()) names.emplace_back(traits.name);
  throw UsageError(
      fmt::format("unknown measure '{}'.{} Measures: {}", name, suggestion(name, names), fmt::join(names, ", ")));
}

std::vector<Index> layer_shape(const MeasureTraits& measure, const MeasureExtent& extent) {
  switch (measure.per) {
    case MeasureTraits::Per::query:
      return {extent.queries};
    case MeasureTraits::Per::head_and_query:
      return {extent.query_heads, extent.queries};
    case MeasureTraits::Per::head_and_span:
      return {extent.query_heads, extent.spans};
    case MeasureTraits::Per::head:
      return {extent.query_heads};
    case MeasureTraits::Per::model_query:
      return {extent.queries};
    case MeasureTraits::Per::span_and_query:
      return {extent.spans, extent.queries};
  }
  return {};
}

std::vector<Index> table_shape(const MeasureTraits& measure, Index layers, const MeasureExtent& extent) {
  std::vector<Index> shape = layer_shape(measure, extent);
  if (measure.is_of_layers()) shape.insert(shape.begin(), layers);
  return shape;
}

std::size_t number_count(const MeasureTraits& measure, const MeasureExtent& extent) {
  const std::vector<Index> shape = layer_shape(measure, extent);
  return static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>()));
}

Index numbers_per_layer(const MeasureExtent& extent, bool with_ranks) {
  std::size_t numbers = 0;
  for (const MeasureTraits& measure : measures()) {
    if (!measure.is_of_layers()) continue;
    if (with_ranks || measure.per != MeasureTraits::Per::head) numbers += number_count(measure, extent);
  }
  return static_cast<Index>(numbers);
}

}  // namespace kvreplay
