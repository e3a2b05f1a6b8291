#include "replay/selection.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "kernels/kernels.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

std::span<const float> row_of(const Matrix& matrix, Index row) {
  return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
}
std::span<float> row_of(Matrix& matrix, Index row) {
  return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
}

// What the heads behind `rows` share: [1, P]. Rows are taken in their order, a piece of all of them at a time that
// stays in the cache.
void combine(const Matrix& rows, Share share, Matrix& shared) {
  constexpr Index kPiece = 1024;
  shared.resize(1, rows.cols());
  for (Index first = 0; first < rows.cols(); first += kPiece) {
    const Index count = std::min(kPiece, rows.cols() - first);
    auto piece = shared.row(0).segment(first, count);
    piece = rows.row(0).segment(first, count);
    for (Index row = 1; row < rows.rows(); ++row) {
      if (share == Share::max) {
        piece = piece.cwiseMax(rows.row(row).segment(first, count));
      } else {
        piece += rows.row(row).segment(first, count);
      }
    }
    if (share == Share::mean) piece /= static_cast<float>(rows.rows());
  }
}

// Without a budget, or at granularity layer, one capacity serves all sets.
int capacity_for(const std::vector<int>& capacities, int set) {
  return capacities[capacities.size() == 1 ? 0 : static_cast<std::size_t>(set)];
}

}  // namespace

LayerSelection::LayerSelection(const TraceReader& trace, const std::vector<Setting>& settings, int layer,
                               int eviction_position, const LayerProjection* projection, Index combination_bytes)
    : trace_(trace),
      settings_(settings),
      layer_(layer),
      prompt_(eviction_position),
      projection_(projection),
      combination_bytes_(combination_bytes),
      model_(trace.info().model) {
  const auto kv_heads = static_cast<std::size_t>(model_.num_key_value_heads);
  deferred_.resize(settings.size(), std::vector<HeadScores>(kv_heads));
  for (const Setting& setting : settings) {
    kept_.emplace_back(kv_heads * static_cast<std::size_t>(setting.sets_per_kv_head(model_)));
  }
}

void LayerSelection::rank_head(int kv_head) {
  const TraceHead source(trace_, layer_, kv_head, prompt_, projection_);
  const Head head(source, combination_bytes_);
  HeadScores scores;
  Matrix raw(model_.group_size(), prompt_);
  std::size_t prepared = 0;  // settings whose combinations were prepared
  for (std::size_t i = 0; i < settings_.size(); ++i) {
    const Setting& setting = settings_[i];
    const Policy& policy = *setting.policy;
    try {
      if (setting.keeps_all(prompt_)) {
        keep_all(i, kv_head);
        continue;
      }
      if (policy.pattern) {
        keep_pattern(i, head.shape());
        continue;
      }
      if (i >= prepared) prepared = prepare(head, i);
      // A policy's capacities follow each other.
      const bool same_policy =
          i > 0 && settings_[i - 1].policy == setting.policy && !settings_[i - 1].keeps_all(prompt_);
      if (!same_policy) {
        for (int member = 0; member < model_.group_size(); ++member) {
          policy.ranking->score(head, member, row_of(raw, member));
        }
      }
      if (!same_policy || policy.ranking->depends_on_capacity()) smooth_and_share(setting, head, raw, scores);
      if (setting.is_local()) {
        select_locally(i, kv_head, scores);
      } else {
        deferred_[i][static_cast<std::size_t>(kv_head)] = scores;
      }
    } catch (const Error& error) {
      throw in_context(setting, kv_head, error);
    }
  }
}

// Computes together what the settings from `first` on will ask the head for, as many of them as memory allows; returns
// the first that is left out.
std::size_t LayerSelection::prepare(const Head& head, std::size_t first) const {
  const auto bytes_of = [&head](std::size_t combinations) {
    return Head::combination_memory(head.shape(), static_cast<Index>(combinations));
  };
  std::vector<WindowCombination> combinations;
  std::size_t i = first;
  for (; i < settings_.size(); ++i) {
    if (!settings_[i].policy->ranking || settings_[i].keeps_all(prompt_)) continue;
    if (i > first && settings_[i].policy == settings_[i - 1].policy) continue;
    std::vector<WindowCombination> more = settings_[i].policy->ranking->requirements().combinations;
    std::erase_if(more, [&combinations](const WindowCombination& combination) {
      return std::ranges::find(combinations, combination) != combinations.end();
    });
    if (i > first && bytes_of(combinations.size() + more.size()) > combination_bytes_) break;
    std::ranges::move(more, std::back_inserter(combinations));
  }
  head.prepare(combinations);
  return i;
}

// Step 2 over positions, and step 3, for one KV head.
void LayerSelection::smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw,
                                      HeadScores& scores) const {
  const Ranking& ranking = *setting.policy->ranking;
  const bool compare_all = setting.policy->budget && setting.policy->budget->needs_scores();
  scores.query = raw;
  std::vector<int> members(static_cast<std::size_t>(model_.group_size()));
  std::iota(members.begin(), members.end(), 0);
  for (const int member : members) {
    ranking.smooth(head, member, setting.capacity, row_of(scores.query, member));
  }
  if (setting.granularity != Granularity::query || compare_all) {
    combine(scores.query, setting.share, scores.shared);
    ranking.refine(head, members, setting.capacity, row_of(scores.shared, 0));
    check_numbers(scores.shared, ranking.protection());
  } else {
    scores.shared.resize(0, 0);
  }
  if (setting.granularity == Granularity::query || compare_all) {
    for (const int& member : members) {
      ranking.refine(head, {&member, 1}, setting.capacity, row_of(scores.query, member));
    }
    check_numbers(scores.query, ranking.protection());
  }
}

void LayerSelection::check_numbers(const Matrix& scores, Protection protection) const {
  for (Index row = 0; row < scores.rows(); ++row) {
    const auto ranked = row_of(scores, row)
                            .subspan(static_cast<std::size_t>(protection.sinks),
                                     static_cast<std::size_t>(prompt_ - protection.count()));
    if (!kernels::has_nan(ranked)) continue;
    const auto found = std::ranges::find_if(ranked, [](float score) { return std::isnan(score); });
    throw Error(fmt::format("the score of position {} is not a number", protection.sinks + (found - ranked.begin())));
  }
}

void LayerSelection::keep_all(std::size_t setting, int kv_head) {
  std::vector<int> all(static_cast<std::size_t>(prompt_));
  std::iota(all.begin(), all.end(), 0);
  const int sets = settings_[setting].sets_per_kv_head(model_);
  for (int i = 0; i < sets; ++i) kept_[setting][static_cast<std::size_t>(kv_head * sets + i)] = all;
}

void LayerSelection::keep_pattern(std::size_t setting, const HeadShape& shape) {
  const Setting& s = settings_[setting];
  const int sets = s.sets_per_kv_head(model_);
  const std::vector<int> capacities = allocate(s, {});
  for (int i = 0; i < sets; ++i) {
    const int set = shape.kv_head * sets + i;
    kept_[setting][static_cast<std::size_t>(set)] =
        checked(s.policy->pattern->keep(shape, i, capacity_for(capacities, set)));
  }
}

// Steps 4 and 5 for the kept sets of one KV head.
void LayerSelection::select_locally(std::size_t setting, int kv_head, const HeadScores& scores) {
  const Setting& s = settings_[setting];
  const Matrix& rows = s.granularity == Granularity::query ? scores.query : scores.shared;
  const int sets = static_cast<int>(rows.rows());
  const std::vector<int> capacities = allocate(s, {});
  for (int i = 0; i < sets; ++i) {
    const int set = kv_head * sets + i;
    kept_[setting][static_cast<std::size_t>(set)] = select_set(s, row_of(rows, i), capacity_for(capacities, set));
  }
}

// Steps 4 and 5 for settings whose heads depend on each other.
void LayerSelection::select_together(int index) {
  const auto setting = static_cast<std::size_t>(index);
  const Setting& s = settings_[setting];
  if (s.is_local() || s.policy->pattern || s.keeps_all(prompt_)) return;
  const std::vector<HeadScores>& parts = deferred_[setting];
  try {
    if (s.granularity == Granularity::layer) {
      Matrix rows(static_cast<Index>(parts.size()), prompt_);
      for (std::size_t i = 0; i < parts.size(); ++i) rows.row(static_cast<Index>(i)) = parts[i].shared;
      Matrix scores;
      combine(rows, s.share, scores);
      std::ranges::fill(kept_[setting], select_set(s, row_of(scores, 0), allocate(s, parts)[0]));
      return;
    }
    const std::vector<int> capacities = allocate(s, parts);
    const int sets = s.sets_per_kv_head(model_);
    for (std::size_t set = 0; set < kept_[setting].size(); ++set) {
      const HeadScores& part = parts[set / static_cast<std::size_t>(sets)];
      const std::span<const float> scores = s.granularity == Granularity::query
                                                ? row_of(part.query, static_cast<Index>(set) % sets)
                                                : row_of(part.shared, 0);
      kept_[setting][set] = select_set(s, scores, capacities[set]);
    }
  } catch (const Error& error) {
    throw in_context(s, -1, error);
  }
}

std::vector<int> LayerSelection::allocate(const Setting& setting, const std::vector<HeadScores>& scores) const {
  const Policy& policy = *setting.policy;
  if (!policy.budget) return {setting.capacity};
  BudgetRequest request{.layer = layer_,
                        .num_layers = model_.num_layers,
                        .prompt_length = prompt_,
                        .capacity = setting.capacity,
                        .protection = policy.ranking ? policy.ranking->protection()
                                                     : Protection{.sinks = policy.pattern->minimum_capacity()},
                        .granularity = setting.granularity,
                        .num_query_heads = model_.num_attention_heads,
                        .num_kv_heads = model_.num_key_value_heads,
                        .pyramid_on_short_prompts = policy.ranking && policy.ranking->pyramid_on_short_prompts(),
                        .query_head_scores = {},
                        .kv_head_scores = {}};
  for (const HeadScores& part : scores) {
    for (Index member = 0; member < part.query.rows(); ++member) {
      request.query_head_scores.push_back(row_of(part.query, member));
    }
    if (part.shared.rows() > 0) request.kv_head_scores.push_back(row_of(part.shared, 0));
  }
  return policy.budget->allocate(request);
}

std::vector<int> LayerSelection::select_set(const Setting& setting, std::span<const float> scores, int capacity) const {
  const Policy& policy = *setting.policy;
  const Protection protection = policy.ranking->protection();
  return checked(policy.selection ? policy.selection->select(scores, protection, capacity)
                                  : select_top(scores, protection, capacity));
}

// A method, maybe a plug-in's, that keeps what is not there must not get as far as the measures.
std::vector<int> LayerSelection::checked(std::vector<int> kept) const {
  const bool inside = !kept.empty() && kept.front() >= 0 && kept.back() < prompt_;
  if (!inside || !std::ranges::is_sorted(kept, std::less_equal<>())) {
    throw Error(fmt::format("a kept set is not ascending positions from 0 to {}", prompt_ - 1));
  }
  return kept;
}

Error LayerSelection::in_context(const Setting& setting, int kv_head, const Error& error) const {
  return Error(fmt::format("{}: {}, layer {}{}: {}", trace_.path().string(), setting.policy->canonical, layer_,
                           kv_head < 0 ? "" : fmt::format(", KV head {}", kv_head), error.what()));
}

namespace {

// The shape of the outline's heads, for what memory they take.
HeadShape shape_of(const TraceReplay& outline) {
  return {.num_layers = outline.model.num_layers,
          .num_kv_heads = outline.model.num_key_value_heads,
          .group_size = outline.model.group_size(),
          .head_dim = outline.model.head_dim,
          .prompt_length = outline.eviction_position};
}

}  // namespace

Index LayerSelection::memory_of_head(const TraceReader& trace, const TraceReplay& outline,
                                     const std::vector<Setting>& settings) {
  int window = 0;
  bool whole_tensors = false;
  for (const Setting& setting : settings) {
    if (!setting.policy->ranking || setting.keeps_all(outline.eviction_position)) continue;
    const Requirements needs = setting.policy->ranking->requirements();
    for (const WindowCombination& combination : needs.combinations) {
      window = std::max(window, static_cast<int>(combination.weights.size()));
    }
    window = std::max(window, needs.window_queries);
    whole_tensors = whole_tensors || needs.keys_or_values || needs.combinations.empty();
  }
  const ModelInfo& model = outline.model;
  const Index prompt = outline.eviction_position;
  // Raw and smoothed scores of the group, what it shares, and neighbours while they are pooled.
  const Index scores = prompt * (2 * model.group_size() + 3);
  const bool unpacked = !trace.reads_directly(0, HeadTensor::keys) || !trace.reads_directly(0, HeadTensor::values);
  const Index tensors = ((whole_tensors ? 2 : 0) + (unpacked ? 2 : 0)) * prompt * model.head_dim;
  return Head::memory(shape_of(outline), window) + (scores + tensors) * static_cast<Index>(sizeof(float));
}

Index LayerSelection::memory_of_layer(const TraceReplay& outline, const std::vector<Setting>& settings) {
  const ModelInfo& model = outline.model;
  Index bytes = 0;
  for (const Setting& setting : settings) {
    bytes += Index{model.num_key_value_heads} * setting.sets_per_kv_head(model) * setting.capacity *
             static_cast<Index>(sizeof(int));
    if (setting.is_local() || setting.policy->pattern || setting.keeps_all(outline.eviction_position)) continue;
    bytes += Index{model.num_key_value_heads} * (model.group_size() + 1) * outline.eviction_position *
             static_cast<Index>(sizeof(float));
  }
  return bytes;
}

Index LayerSelection::least_combination_bytes(const TraceReplay& outline, const std::vector<Setting>& settings) {
  std::size_t most = 0;
  for (const Setting& setting : settings) {
    if (!setting.policy->ranking || setting.keeps_all(outline.eviction_position)) continue;
    most = std::max(most, setting.policy->ranking->requirements().combinations.size());
  }
  return Head::combination_memory(shape_of(outline), static_cast<Index>(most));
}

}  // namespace kvreplay
