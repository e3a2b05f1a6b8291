#include "replay/measurement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <span>
#include <utility>

#include "base/buffer.h"
#include "base/error.h"
#include "base/parallel.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "replay/layer_projection.h"
#include "replay/trace_source.h"

namespace kvreplay {

LayerMeasurement::LayerMeasurement(const CapturedRun& trace, int layer, const Eviction& eviction,
                                   std::span<const Span> spans, const std::vector<const LayerResidencies*>& settings,
                                   bool keeps_changes, const std::vector<const Matrix*>& outputs,
                                   const std::vector<bool>& over_time)
    : trace_(trace), layer_(layer), eviction_(eviction) {
  const auto less = [](const LayerResidencies* a, const LayerResidencies* b) { return *a < *b; };
  std::map<const LayerResidencies*, std::size_t, decltype(less)> kinds(less);
  std::vector<bool> is_over_time;  // [kind]
  for (std::size_t s = 0; s < settings.size(); ++s) {
    const Matrix* const given = outputs.empty() ? nullptr : outputs[s];
    if (given != nullptr) {
      kind_.push_back(distinct_.size());
    } else {
      kind_.push_back(kinds.try_emplace(settings[s], distinct_.size()).first->second);
    }
    if (kind_.back() == distinct_.size()) {
      distinct_.push_back(settings[s]);
      evicted_.push_back(given);
      is_over_time.push_back(false);
    }
    if (!over_time.empty() && over_time[s]) is_over_time[kind_.back()] = true;
  }
  const ModelInfo& model = trace.info().model;
  const auto queries = static_cast<Index>(evaluation_queries(trace.info(), eviction).count());
  outputs_.resize((static_cast<Index>(distinct_.size()) + 1) * queries,
                  Index{model.num_attention_heads} * model.head_dim);
  if (trace.has_output_projection(layer)) {
    panels_ = Buffer(kernels::rounded_up(outputs_.rows(), kernels::kPanel) * outputs_.cols());
    keeps_changes_ = keeps_changes;
    if (keeps_changes_) projected_.resize(outputs_.rows(), model.hidden_size);
  }
  const MeasureExtent extent{
      .query_heads = model.num_attention_heads, .queries = queries, .spans = static_cast<Index>(spans.size())};
  numbers_.resize(distinct_.size());
  for (const MeasureTraits& measure : measures()) {
    if (measure.per == MeasureTraits::Per::head || !measure.is_of_layers()) continue;
    const std::size_t count = number_count(measure, extent);
    for (std::size_t kind = 0; kind < numbers_.size(); ++kind) {
      if (measure.per == MeasureTraits::Per::head_and_query || !measure.over_time || is_over_time[kind]) {
        numbers_[kind][measure.measure].resize(count);
      }
    }
  }
  steps_.resize(distinct_.size());
  for (std::size_t kind = 0; kind < steps_.size(); ++kind) {
    if (is_over_time[kind]) steps_[kind].resize(static_cast<std::size_t>(model.num_attention_heads * queries));
  }
  measure_spans(spans);
  output_errors_.resize(static_cast<std::size_t>(model.num_key_value_heads));
  sums_.resize(static_cast<std::size_t>(slices()));
}

const Residency& LayerMeasurement::residency_of(std::size_t kind, int query_head) const {
  const LayerResidencies& sets = *distinct_[kind];
  const ModelInfo& model = trace_.info().model;
  const bool per_query_head = static_cast<int>(sets.size()) == model.num_attention_heads;
  return sets[static_cast<std::size_t>(per_query_head ? query_head : query_head / model.group_size())];
}

// Of the positions that the layer holds. NaN where these are none of the span.
void LayerMeasurement::measure_spans(std::span<const Span> spans) {
  const std::span<const int> queries = evaluation_queries(trace_.info(), eviction_).positions;
  const int first_held = eviction_.position - head_shape(trace_.info(), layer_, 0, eviction_.position).rows();
  for (std::size_t kind = 0; kind < distinct_.size(); ++kind) {
    for (std::size_t s = 0; s < spans.size(); ++s) {
      const int start = std::max(spans[s].start, first_held);
      const int end = std::min(spans[s].end, eviction_.position);
      for (int head = 0; head < trace_.info().model.num_attention_heads; ++head) {
        const Residency& residency = residency_of(kind, head);
        for (const auto& [measure, calculate] : formulas<SpanOutcome>()) {
          numbers_[kind][measure][static_cast<std::size_t>(head) * spans.size() + s] =
              start < end ? static_cast<float>(
                                calculate({.residency = residency, .first = start, .end = end, .queries = queries}))
                          : std::numeric_limits<float>::quiet_NaN();
        }
      }
      if (!steps_[kind].empty()) measure_survival(kind, s, start, end);
    }
  }
}

// Of a span at every query, the mean over the query heads.
void LayerMeasurement::measure_survival(std::size_t kind, std::size_t span, int first, int end) {
  const std::span<const int> queries = evaluation_queries(trace_.info(), eviction_).positions;
  const int heads = trace_.info().model.num_attention_heads;
  for (const auto& [measure, calculate] : formulas<SpanStepOutcome>()) {
    std::vector<double> sums(queries.size(), first < end ? 0 : std::numeric_limits<double>::quiet_NaN());
    for (int head = 0; head < heads && first < end; ++head) {
      const std::vector<int> cached = residency_of(kind, head).kept_at_each(first, end, queries);
      for (std::size_t q = 0; q < sums.size(); ++q) sums[q] += calculate({.held = end - first, .cached = cached[q]});
    }
    for (std::size_t q = 0; q < sums.size(); ++q) {
      numbers_[kind][measure][span * sums.size() + q] = static_cast<float>(sums[q] / heads);
    }
  }
}

// What is evicted after each evaluation query and before the next, of one query head.
void LayerMeasurement::note_evictions(const Residency& residency, std::span<StepOutcome> steps) const {
  const std::span<const int> queries = evaluation_queries(trace_.info(), eviction_).positions;
  const AttentionRule& rule = head_shape(trace_.info(), layer_, 0, eviction_.position).rule;
  const std::vector<Residency::Stay> evicted = residency.evicted_later(eviction_.position);
  int before = eviction_.position - 1;  // the last query that saw what the eviction before this one took
  for (auto first = evicted.begin(); first != evicted.end();) {
    const int last_query = first->until;
    if (last_query >= queries.back()) break;  // no query is there to miss it
    const auto end =
        std::ranges::find_if(first, evicted.end(), [&](const auto& stay) { return stay.until > last_query; });
    // What the query behind the last eviction saw, but for its own.
    const auto first_visible = static_cast<int>(rule.first_visible(before + 1));
    const int left = residency.count_at(before + 1, eviction_.position, first_visible) - 1;
    const auto step = std::ranges::upper_bound(queries, last_query) - queries.begin() - 1;
    for (auto stay = first; stay != end && step >= 0; ++stay) {
      if (stay->position < rule.first_visible(last_query)) continue;  // gone with the window before
      StepOutcome& of = steps[static_cast<std::size_t>(step)];
      ++of.evicted;
      // The prompt arrives with its last token.
      of.steps_stayed += last_query - (stay->from > stay->position ? stay->from - 1 : stay->from);
      if (stay->from <= before + (stay->from > stay->position ? 1 : 0)) ++of.replaced;
    }
    if (step >= 0) steps[static_cast<std::size_t>(step)].left += left;
    before = last_query;
    first = end;
  }
}

// Means over the query heads, of those that have a number.
void LayerMeasurement::measure_steps(std::size_t kind) {
  const auto heads = static_cast<std::size_t>(trace_.info().model.num_attention_heads);
  const std::size_t queries = steps_[kind].size() / heads;
  for (std::size_t head = 0; head < heads; ++head) {
    note_evictions(residency_of(kind, static_cast<int>(head)),
                   std::span(steps_[kind]).subspan(head * queries, queries));
  }
  for (const auto& [measure, calculate] : formulas<StepOutcome>()) {
    for (std::size_t q = 0; q < queries; ++q) {
      double sum = 0;
      int count = 0;
      for (std::size_t head = 0; head < heads; ++head) {
        const double number = calculate(steps_[kind][head * queries + q]);
        if (std::isnan(number)) continue;
        sum += number;
        ++count;
      }
      numbers_[kind][measure][q] =
          count > 0 ? static_cast<float>(sum / count) : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

void LayerMeasurement::measure_head(int kv_head) {
  const ModelInfo& model = trace_.info().model;
  const HeadEvaluation evaluation(trace_, layer_, kv_head, eviction_);
  const Index queries = outputs_.rows() / (static_cast<Index>(distinct_.size()) + 1);
  const int group = model.group_size();
  auto columns = outputs_.middleCols(Index{kv_head} * group * model.head_dim, Index{group} * model.head_dim);
  std::vector<std::vector<const Residency*>> residencies(static_cast<std::size_t>(group));
  std::vector<Eigen::Ref<Matrix>> differences;
  for (std::size_t kind = 0; kind < distinct_.size(); ++kind) {
    for (int member = 0; member < group; ++member) {
      residencies[static_cast<std::size_t>(member)].push_back(&residency_of(kind, kv_head * group + member));
    }
    differences.emplace_back(columns.middleRows((static_cast<Index>(kind) + 1) * queries, queries));
  }
  std::vector<std::vector<StepOutcome>*> steps;
  for (std::vector<StepOutcome>& of_kind : steps_) steps.push_back(of_kind.empty() ? nullptr : &of_kind);
  evaluation.measure(residencies, evicted_, columns.topRows(queries), differences, numbers_, steps);
  const Index first = evaluation_queries(trace_.info(), eviction_).first;
  double& output_errors = output_errors_[static_cast<std::size_t>(kv_head)];
  for (int member = 0; member < group; ++member) {
    const Matrix stored = trace_.read(layer_, HeadTensor::outputs, kv_head * group + member, first, queries);
    for (Index query = 0; query < queries; ++query) {
      const auto exact = columns.row(query).segment(Index{member} * model.head_dim, model.head_dim).cast<double>();
      const double length = exact.norm();
      const double difference = (stored.row(query).cast<double>() - exact).norm();
      output_errors += length > 0 ? difference / length : difference > 0 ? 1 : 0;
    }
  }
}

int LayerMeasurement::panels() const {
  if (!trace_.has_output_projection(layer_)) return 0;
  return static_cast<int>(kernels::rounded_up(outputs_.rows(), kernels::kPanel) / kernels::kPanel);
}

int LayerMeasurement::slices() const {
  return trace_.has_output_projection(layer_) ? projection_slices(trace_.info().model) : 1;
}

void LayerMeasurement::lay_out_panel(int panel) {
  const Index width = outputs_.cols();
  const Index first = panel * kernels::kPanel;
  kernels::to_panels(outputs_.data() + first * width, width, std::min(kernels::kPanel, outputs_.rows() - first), width,
                     panels_.data() + first * width);
}

const RmsNorm& LayerMeasurement::output_norm() const {
  return trace_.info().layers[static_cast<std::size_t>(layer_)].projection_output_norm;
}

void LayerMeasurement::project_slice(int slice) {
  const Index width = outputs_.cols();
  std::vector<Sums>& sums = sums_[static_cast<std::size_t>(slice)];
  sums.assign(static_cast<std::size_t>(outputs_.rows()), {});
  if (!trace_.has_output_projection(layer_)) {
    for (Index row = 0; row < outputs_.rows(); ++row) {
      sums[static_cast<std::size_t>(row)].squares = outputs_.row(row).cast<double>().squaredNorm();
    }
    return;
  }
  // Some rows of the projection with a panel of outputs at a time, of whose depth a part stays in the innermost cache.
  constexpr Index kDepth = 128;
  const Index rows_at_once = trace_.reads_projection_directly(layer_) ? kernels::kPanel : kProjectionSlice;
  const Index first = slice * kProjectionSlice;
  const Index end = std::min<Index>(first + kProjectionSlice, trace_.info().model.hidden_size);
  const Index queries = outputs_.rows() / (static_cast<Index>(distinct_.size()) + 1);
  const std::vector<float>& weights = output_norm().weight;
  Buffer rows(rows_at_once * width);
  Buffer projected(rows_at_once * kernels::kPanel);
  Buffer full(weights.empty() ? 0 : rows_at_once * queries);  // of the full outputs, which come first
  for (Index row = first; row < end; row += rows_at_once) {
    const Index count = std::min(rows_at_once, end - row);
    trace_.read_projection_rows(layer_, row, count, rows.data());
    for (Index output = 0; output < outputs_.rows(); output += kernels::kPanel) {
      const float* panel = panels_.data() + output * width;
      for (Index k = 0; k < width; k += kDepth) {
        kernels::multiply(count, kernels::kPanel, std::min(kDepth, width - k), rows.data() + k, width, 1,
                          panel + k * kernels::kPanel, kernels::kPanel, projected.data(), kernels::kPanel, k > 0);
      }
      const Index columns = std::min(kernels::kPanel, outputs_.rows() - output);
      for (Index i = 0; i < count; ++i) {
        for (Index j = 0; j < columns; ++j) {
          const auto x = static_cast<double>(projected.data()[i * kernels::kPanel + j]);
          Sums& of = sums[static_cast<std::size_t>(output + j)];
          of.squares += x * x;
          if (keeps_changes_) projected_(output + j, row + i) = projected.data()[i * kernels::kPanel + j];
          if (weights.empty()) continue;
          float& y = full.data()[i * queries + (output + j) % queries];
          if (output + j < queries) y = projected.data()[i * kernels::kPanel + j];
          const auto weight = static_cast<double>(weights[static_cast<std::size_t>(row + i)]);
          const double product = x * static_cast<double>(y);
          of.with_full += product;
          of.weighted_squares += weight * weight * x * x;
          of.weighted_with_full += weight * weight * product;
        }
      }
    }
  }
  count_operations(2 * outputs_.size() * (end - first));
}

// N(y) = w·y/r with r² = mean(y²) + ε. The difference of the factors 1/r is taken in the form in which nothing cancels;
// where one of them has no end, or there is no norm, nothing is rescaled.
LayerMeasurement::Rescaling LayerMeasurement::rescaling_of(const Sums& full, const Sums& difference) const {
  if (output_norm().weight.empty()) return {};
  const auto channels = static_cast<double>(trace_.info().model.hidden_size);
  const double added = (2 * difference.with_full + difference.squares) / channels;
  const double before = std::sqrt(full.squares / channels + output_norm().epsilon);
  const double after = std::sqrt(std::max(0.0, full.squares / channels + added) + output_norm().epsilon);
  if (!(before > 0) || !(after > 0)) return {};
  return {.after = after, .factor = -added / (before * after * (before + after))};
}

// ‖N(y + d) − N(y)‖ from sums over the channels of y and of d.
double LayerMeasurement::change_behind_norm(const Sums& full, const Sums& difference) const {
  const auto [after, factor] = rescaling_of(full, difference);
  const double square = difference.weighted_squares / (after * after) +
                        2 * factor / after * difference.weighted_with_full + factor * factor * full.weighted_squares;
  return std::sqrt(std::max(0.0, square));
}

// N(y + d) − N(y) of every query, [E, C]; without a norm, d.
std::vector<float> LayerMeasurement::change_of(std::size_t kind, const std::vector<Sums>& sums) const {
  const Index queries = outputs_.rows() / (static_cast<Index>(distinct_.size()) + 1);
  const Index channels = projected_.cols();
  const std::vector<float>& weights = output_norm().weight;
  std::vector<float> change(static_cast<std::size_t>(queries * channels));
  for (Index query = 0; query < queries; ++query) {
    const Index row = (static_cast<Index>(kind) + 1) * queries + query;
    const auto [after, factor] =
        rescaling_of(sums[static_cast<std::size_t>(query)], sums[static_cast<std::size_t>(row)]);
    const double own = 1 / after;
    for (Index channel = 0; channel < channels; ++channel) {
      const double weight = weights.empty() ? 1 : static_cast<double>(weights[static_cast<std::size_t>(channel)]);
      change[static_cast<std::size_t>(query * channels + channel)] =
          static_cast<float>(weight * (own * static_cast<double>(projected_(row, channel)) +
                                       factor * static_cast<double>(projected_(query, channel))));
    }
  }
  return change;
}

std::vector<LayerMeasures> LayerMeasurement::take() {
  const Index queries = outputs_.rows() / (static_cast<Index>(distinct_.size()) + 1);
  std::vector<Sums> sums(static_cast<std::size_t>(outputs_.rows()));
  for (const std::vector<Sums>& slice : sums_) {
    for (std::size_t row = 0; row < sums.size(); ++row) {
      sums[row].squares += slice[row].squares;
      sums[row].with_full += slice[row].with_full;
      sums[row].weighted_squares += slice[row].weighted_squares;
      sums[row].weighted_with_full += slice[row].weighted_with_full;
    }
  }
  for (const Sums& of : sums) {
    if (std::sqrt(of.squares) <= static_cast<double>(std::numeric_limits<float>::max())) continue;
    throw Error(fmt::format("{}: layer {}: the outputs exceed float32's range", trace_.name(), layer_));
  }
  const auto count = static_cast<std::size_t>(queries);
  const std::vector<float>& residuals = trace_.info().layers[static_cast<std::size_t>(layer_)].residual_norm;
  const bool has_residuals = !residuals.empty() && trace_.has_output_projection(layer_);
  const auto first = static_cast<std::size_t>(evaluation_queries(trace_.info(), eviction_).first);
  for (std::size_t kind = 0; kind < numbers_.size(); ++kind) {
    if (!steps_[kind].empty()) measure_steps(kind);
    for (std::size_t query = 0; query < count; ++query) {
      const Sums& full = sums[query];
      const Sums& difference = sums[(kind + 1) * count + query];
      const LayerOutcome outcome{
          .full = std::sqrt(full.squares),
          .difference = std::sqrt(difference.squares),
          .change = output_norm().weight.empty() ? std::sqrt(difference.squares) : change_behind_norm(full, difference),
          .residual =
              has_residuals ? static_cast<double>(residuals[first + query]) : std::numeric_limits<double>::quiet_NaN()};
      for (const auto& [measure, calculate] : formulas<LayerOutcome>()) {
        numbers_[kind][measure][query] = static_cast<float>(calculate(outcome));
      }
    }
  }
  const double output_error = std::accumulate(output_errors_.begin(), output_errors_.end(), 0.0) /
                              (static_cast<double>(trace_.info().model.num_attention_heads * queries));
  std::vector<std::vector<float>> changes(numbers_.size());
  for (std::size_t kind = 0; keeps_changes_ && kind < changes.size(); ++kind) changes[kind] = change_of(kind, sums);
  // The last setting of a kind takes what the others copy.
  std::vector<std::size_t> left(numbers_.size(), 0);
  for (const std::size_t kind : kind_) ++left[kind];
  std::vector<LayerMeasures> measures;
  measures.reserve(kind_.size());
  for (const std::size_t kind : kind_) {
    const bool last = --left[kind] == 0;
    measures.push_back({.numbers = last ? std::move(numbers_[kind]) : numbers_[kind],
                        .output_error = static_cast<float>(output_error),
                        .change = last ? std::move(changes[kind]) : changes[kind]});
  }
  return measures;
}

Index LayerMeasurement::memory_per_setting(const ModelInfo& model, Index queries, Index spans, bool keeps_changes,
                                           bool over_time) {
  const Index width = Index{model.num_attention_heads} * model.head_dim;
  const Index numbers =
      numbers_per_layer({.query_heads = model.num_attention_heads, .queries = queries, .spans = spans}, false);
  constexpr Index kVector = 64;  // what a vector takes beside its numbers
  // Outputs twice: as they come, and laid out for the projection; numbers twice where settings share them.
  return queries * (2 * width * static_cast<Index>(sizeof(float)) +
                    (projection_slices(model) + 1) * static_cast<Index>(sizeof(Sums))) +
         (over_time ? queries * model.num_attention_heads * static_cast<Index>(sizeof(StepOutcome)) : 0) +
         (keeps_changes ? 2 * queries * model.hidden_size * static_cast<Index>(sizeof(float)) : 0) +
         2 * numbers * static_cast<Index>(sizeof(float)) + 2 * static_cast<Index>(measures().size()) * kVector;
}

Index LayerMeasurement::memory(const ModelInfo& model) {
  return kernels::kPanel * Index{model.num_attention_heads} * model.head_dim * static_cast<Index>(sizeof(float));
}

std::vector<LayerMeasures> measure_layer(const CapturedRun& trace, int layer, const Eviction& eviction,
                                         std::span<const Span> spans,
                                         const std::vector<const LayerResidencies*>& settings, int threads,
                                         const std::vector<bool>& over_time) {
  LayerMeasurement measurement(trace, layer, eviction, spans, settings, false, {}, over_time);
  parallel_for(
      trace.info().model.num_key_value_heads, [&](int kv_head) { measurement.measure_head(kv_head); }, threads);
  parallel_for(
      measurement.panels(), [&](int panel) { measurement.lay_out_panel(panel); }, threads);
  parallel_for(
      measurement.slices(), [&](int slice) { measurement.project_slice(slice); }, threads);
  return measurement.take();
}

}  // namespace kvreplay
