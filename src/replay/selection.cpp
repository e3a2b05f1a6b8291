#include "replay/selection.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <set>

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

// What the heads behind `rows` share: [1, R]. Rows are taken in their order, a piece of all of them at a time that
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

// Whether kept sets can only be drawn once the other heads of the layer are ranked.
bool waits(const Setting& setting, int held) {
  return !setting.is_local() && setting.policy->ranking && !setting.keeps_all(held);
}

bool compares_all(const Setting& setting) { return setting.policy->budget && setting.policy->budget->needs_scores(); }

// Without a budget, or at granularity layer, one capacity serves all sets.
int capacity_for(const std::vector<int>& capacities, int set) {
  return capacities[capacities.size() == 1 ? 0 : static_cast<std::size_t>(set)];
}

}  // namespace

class LayerSelection::Importance {
 public:
  Importance(const Head& head, int group_size) : head_(head), members_(static_cast<std::size_t>(group_size)) {}

  const RankedValues& of_member(int member) {
    std::optional<RankedValues>& ranked = members_[static_cast<std::size_t>(member)];
    if (!ranked) ranked.emplace(head_.evaluation_attention(member));
    return *ranked;
  }

  const RankedValues& of_group(Share share) {
    const auto found = groups_.find(share);
    if (found != groups_.end()) return found->second;
    return groups_.emplace(share, RankedValues(row_of(shared(share), 0))).first->second;
  }

  // Step 3, as of any policy's scores: [1, R].
  Matrix shared(Share share) const {
    Matrix rows(static_cast<Index>(members_.size()), head_.rows());
    for (Index member = 0; member < rows.rows(); ++member) {
      std::ranges::copy(head_.evaluation_attention(static_cast<int>(member)), row_of(rows, member).begin());
    }
    Matrix shared;
    combine(rows, share, shared);
    return shared;
  }

 private:
  const Head& head_;
  std::vector<std::optional<RankedValues>> members_;
  std::map<Share, RankedValues> groups_;
};

LayerSelection::LayerSelection(const TraceReader& trace, const std::vector<Setting>& settings,
                               const RankingRequirements& requirements, int layer, const Eviction& eviction,
                               const LayerProjection* projection, Index combination_bytes)
    : trace_(trace),
      settings_(settings),
      requirements_(requirements),
      eviction_(eviction),
      shape_(head_shape(trace.info(), layer, 0, eviction.position)),
      held_(shape_.rows()),
      projection_(projection),
      combination_bytes_(combination_bytes),
      model_(trace.info().model) {
  const auto kv_heads = static_cast<std::size_t>(model_.num_key_value_heads);
  results_.reserve(settings.size());
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    if (waits(setting, held_)) deferred_[i].resize(kv_heads);
    LayerResult& result = results_.emplace_back();
    result.kept.resize(kv_heads * static_cast<std::size_t>(setting.sets_per_kv_head(model_)));
    if (!setting.rank_agreement) continue;
    result.spearman.assign(static_cast<std::size_t>(model_.num_attention_heads),
                           std::numeric_limits<float>::quiet_NaN());
    result.kendall = result.spearman;
    if (!setting.goes_by_ranks(shape_)) continue;
    if (setting.granularity == Granularity::layer) importance_[setting.share].resize(kv_heads);
  }
}

void LayerSelection::rank_head(int kv_head) {
  const TraceHead source(trace_, shape_.layer, kv_head, eviction_, projection_);
  const Head head(source, combination_bytes_);
  HeadScores scores;
  Importance importance(head, model_.group_size());
  for (auto& [share, groups] : importance_) groups[static_cast<std::size_t>(kv_head)] = importance.shared(share);
  Matrix raw(model_.group_size(), held_);
  std::size_t prepared = 0;  // settings whose combinations were prepared
  for (std::size_t i = 0; i < settings_.size(); ++i) {
    const Setting& setting = settings_[i];
    const Policy& policy = *setting.policy;
    try {
      if (setting.keeps_all(held_)) {
        keep_all(i, kv_head);
        continue;
      }
      if (policy.pattern) {
        keep_pattern(i, head.shape());
        continue;
      }
      if (i >= prepared) prepared = prepare(head, i);
      // A policy's capacities follow each other.
      const bool same_policy = i > 0 && settings_[i - 1].policy == setting.policy && !settings_[i - 1].keeps_all(held_);
      if (!same_policy) {
        for (int member = 0; member < model_.group_size(); ++member) {
          policy.ranking->score(head, member, row_of(raw, member));
        }
      }
      const bool same_scores = same_policy && !policy.ranking->depends_on_capacity();
      if (!same_scores) smooth_and_share(setting, head, raw, scores);
      if (is_compared(setting) && setting.granularity != Granularity::layer) {
        if (same_scores) {
          copy_agreement(i, kv_head);
        } else {
          compare_ranks(i, kv_head, scores, importance);
        }
      }
      if (setting.is_local()) {
        select_locally(i, kv_head, scores);
      } else {
        HeadScores& waiting = deferred_.at(i)[static_cast<std::size_t>(kv_head)];
        waiting.shared = scores.shared;
        if (compares_all(setting) || setting.granularity == Granularity::query) waiting.query = scores.query;
      }
    } catch (const Error& error) {
      throw in_context(setting, kv_head, error);
    }
  }
}

// Computes together what the settings from `first` on will ask the head for, as many of them as memory allows; returns
// the first that is left out.
std::size_t LayerSelection::prepare(const Head& head, std::size_t first) const {
  const auto bytes_of = [&](std::size_t combinations) {
    return Head::combination_memory(head.shape(), requirements_.window, static_cast<Index>(combinations));
  };
  std::vector<WindowCombination> combinations;
  std::vector<bool> taken(requirements_.combinations.size(), false);
  std::size_t i = first;
  for (; i < settings_.size(); ++i) {
    std::vector<std::size_t> more;
    std::ranges::copy_if(requirements_.first_asked_by(i), std::back_inserter(more),
                         [&taken](std::size_t combination) { return !taken[combination]; });
    if (i > first && !more.empty() && bytes_of(combinations.size() + more.size()) > combination_bytes_) break;
    for (const std::size_t combination : more) {
      taken[combination] = true;
      combinations.push_back(requirements_.combinations[combination]);
    }
  }
  head.prepare(combinations);
  return i;
}

// Step 2 over positions, and step 3, for one KV head.
void LayerSelection::smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw,
                                      HeadScores& scores) const {
  const Ranking& ranking = *setting.policy->ranking;
  const bool compare_all = compares_all(setting);
  const int capacity = setting.capacity(held_);
  scores.query = raw;
  std::vector<int> members(static_cast<std::size_t>(model_.group_size()));
  std::iota(members.begin(), members.end(), 0);
  for (const int member : members) {
    ranking.smooth(head, member, capacity, row_of(scores.query, member));
  }
  if (setting.granularity != Granularity::query || compare_all) {
    combine(scores.query, setting.share, scores.shared);
    ranking.refine(head, members, capacity, row_of(scores.shared, 0));
    check_numbers(scores.shared, ranking);
  } else {
    scores.shared.resize(0, 0);
  }
  if (setting.granularity == Granularity::query || compare_all) {
    for (const int& member : members) {
      ranking.refine(head, {&member, 1}, capacity, row_of(scores.query, member));
    }
    check_numbers(scores.query, ranking);
  }
}

void LayerSelection::check_numbers(const Matrix& scores, const Ranking& ranking) const {
  const Protection protection = ranking.protection().held_by(shape_);
  for (Index row = 0; row < scores.rows(); ++row) {
    const auto ranked =
        row_of(scores, row)
            .subspan(static_cast<std::size_t>(protection.sinks), static_cast<std::size_t>(held_ - protection.count()));
    if (!kernels::has_nan(ranked)) continue;
    const auto found = std::ranges::find_if(ranked, [](float score) { return std::isnan(score); });
    throw Error(fmt::format("the score of position {} is not a number",
                            shape_.positions[protection.sinks + static_cast<int>(found - ranked.begin())]));
  }
}

void LayerSelection::keep_all(std::size_t setting, int kv_head) {
  std::vector<int> all;
  for (int row = 0; row < held_; ++row) all.push_back(shape_.positions[row]);
  const int sets = settings_[setting].sets_per_kv_head(model_);
  for (int i = 0; i < sets; ++i) results_[setting].kept[static_cast<std::size_t>(kv_head * sets + i)] = all;
}

void LayerSelection::keep_pattern(std::size_t setting, const HeadShape& shape) {
  const Setting& s = settings_[setting];
  const int sets = s.sets_per_kv_head(model_);
  const std::vector<int> capacities = allocate(s, {});
  // Sets that are given can be of positions that the layer no longer holds.
  const bool may_be_empty = s.policy->pattern->capacity_rule() == Pattern::CapacityRule::own;
  for (int i = 0; i < sets; ++i) {
    const int set = shape.kv_head * sets + i;
    results_[setting].kept[static_cast<std::size_t>(set)] =
        positions_of(s.policy->pattern->keep(shape, i, capacity_for(capacities, set)), may_be_empty);
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
    results_[setting].kept[static_cast<std::size_t>(set)] =
        select_set(s, row_of(rows, i), capacity_for(capacities, set));
  }
}

// Of the scores of one KV head's group.
void LayerSelection::compare_ranks(std::size_t setting, int kv_head, const HeadScores& scores, Importance& importance) {
  const Setting& s = settings_[setting];
  const int group = model_.group_size();
  RankCorrelation agreement;
  for (int member = 0; member < group; ++member) {
    if (s.granularity == Granularity::query) {
      agreement = agreement_of(s, importance.of_member(member), row_of(scores.query, member));
    } else if (member == 0) {
      agreement = agreement_of(s, importance.of_group(s.share), row_of(scores.shared, 0));
    }
    put_agreement(setting, kv_head * group + member, agreement);
  }
}

// The scores are those of the setting before.
void LayerSelection::copy_agreement(std::size_t setting, int kv_head) {
  for (int head = kv_head * model_.group_size(); head < (kv_head + 1) * model_.group_size(); ++head) {
    const auto h = static_cast<std::size_t>(head);
    results_[setting].spearman[h] = results_[setting - 1].spearman[h];
    results_[setting].kendall[h] = results_[setting - 1].kendall[h];
  }
}

void LayerSelection::put_agreement(std::size_t setting, int query_head, const RankCorrelation& agreement) {
  const auto head = static_cast<std::size_t>(query_head);
  results_[setting].spearman[head] = static_cast<float>(agreement.spearman);
  results_[setting].kendall[head] = static_cast<float>(agreement.kendall);
}

bool LayerSelection::is_compared(const Setting& setting) const {
  return setting.rank_agreement && setting.goes_by_ranks(shape_);
}

// Over the positions that the policy ranks.
RankCorrelation LayerSelection::agreement_of(const Setting& setting, const RankedValues& importance,
                                             std::span<const float> scores) const {
  const Protection protection = setting.policy->ranking->protection().held_by(shape_);
  return importance.correlation(scores, protection.sinks, held_ - protection.window);
}

// Steps 4 and 5 for settings whose heads depend on each other.
void LayerSelection::select_together(int index) {
  const auto setting = static_cast<std::size_t>(index);
  const Setting& s = settings_[setting];
  if (!waits(s, held_)) return;
  const std::vector<HeadScores>& parts = deferred_.at(setting);
  try {
    if (s.granularity == Granularity::layer) {
      const auto combined = [&](const auto& part_of) {
        Matrix rows(model_.num_key_value_heads, held_);
        for (Index i = 0; i < rows.rows(); ++i) rows.row(i) = part_of(static_cast<std::size_t>(i));
        Matrix of_layer;
        combine(rows, s.share, of_layer);
        return of_layer;
      };
      const Matrix scores = combined([&](std::size_t i) -> const Matrix& { return parts[i].shared; });
      if (is_compared(s)) {
        const std::vector<Matrix>& groups = importance_.at(s.share);
        const Matrix importance = combined([&](std::size_t i) -> const Matrix& { return groups[i]; });
        const RankCorrelation agreement = agreement_of(s, RankedValues(row_of(importance, 0)), row_of(scores, 0));
        for (int head = 0; head < model_.num_attention_heads; ++head) put_agreement(setting, head, agreement);
      }
      std::ranges::fill(results_[setting].kept, select_set(s, row_of(scores, 0), allocate(s, parts)[0]));
      return;
    }
    const std::vector<int> capacities = allocate(s, parts);
    const int sets = s.sets_per_kv_head(model_);
    for (std::size_t set = 0; set < results_[setting].kept.size(); ++set) {
      const HeadScores& part = parts[set / static_cast<std::size_t>(sets)];
      const std::span<const float> scores = s.granularity == Granularity::query
                                                ? row_of(part.query, static_cast<Index>(set) % sets)
                                                : row_of(part.shared, 0);
      results_[setting].kept[set] = select_set(s, scores, capacities[set]);
    }
  } catch (const Error& error) {
    throw in_context(s, -1, error);
  }
}

std::vector<int> LayerSelection::allocate(const Setting& setting, const std::vector<HeadScores>& scores) const {
  const Policy& policy = *setting.policy;
  if (!policy.budget) return {setting.capacity(held_)};
  BudgetRequest request = setting.budget_request(shape_);
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
  const Protection protection = policy.ranking->protection().held_by(shape_);
  return positions_of(policy.selection ? policy.selection->select(scores, protection, capacity)
                                       : select_top(scores, protection, capacity),
                      held_ == 0);
}

// What stands in kept rows. A method, maybe a plug-in's, that keeps what is not there must not get as far as the
// measures.
std::vector<int> LayerSelection::positions_of(std::vector<int> rows, bool may_be_empty) const {
  const bool inside = rows.empty() ? may_be_empty : rows.front() >= 0 && rows.back() < held_;
  if (!inside || !std::ranges::is_sorted(rows, std::less_equal<>())) {
    throw Error(fmt::format("a kept set is not ascending rows from 0 to {}", held_ - 1));
  }
  for (int& row : rows) row = shape_.positions[row];
  return rows;
}

Error LayerSelection::in_context(const Setting& setting, int kv_head, const Error& error) const {
  return Error(fmt::format("{}: {}, layer {}{}: {}", trace_.path().string(), setting.policy->canonical, shape_.layer,
                           kv_head < 0 ? "" : fmt::format(", KV head {}", kv_head), error.what()));
}

namespace {

// The shape of the outline's heads that hold most, for what memory they take.
HeadShape shape_of(const TraceReplay& outline) {
  return {.num_layers = outline.model.num_layers,
          .num_kv_heads = outline.model.num_key_value_heads,
          .group_size = outline.model.group_size(),
          .head_dim = outline.model.head_dim,
          .prompt_length = outline.prompt_length,
          .next_position = outline.eviction_position,
          .positions = {outline.eviction_position - std::ranges::max(outline.held), std::ranges::max(outline.held)}};
}

}  // namespace

Index LayerSelection::memory_of_head(const TraceReader& trace, const TraceReplay& outline,
                                     const std::vector<Setting>& settings, const RankingRequirements& requirements) {
  const ModelInfo& model = outline.model;
  const Index prompt = outline.eviction_position;
  // Raw and smoothed scores of the group, what it shares, neighbours while they are pooled, and what is sorted.
  const Index scores = prompt * (3 * model.group_size() + 5);
  const bool unpacked = !trace.reads_directly(0, HeadTensor::keys) || !trace.reads_directly(0, HeadTensor::values);
  // Unpacked tensors are kept whole, beside them one as it is stored and as it is unpacked.
  const Index tensors = ((requirements.keys_or_values ? 2 : 0) + (unpacked ? 4 : 0)) * prompt * model.head_dim;
  Index bytes =
      Head::memory(shape_of(outline), requirements.window) + (scores + tensors) * static_cast<Index>(sizeof(float));
  if (requirements.accumulated_attention) {
    // Attention of some queries, its sums, the keys as they are multiplied, and what every query head received.
    bytes += prompt * (model.head_dim + model.group_size() + 40) * static_cast<Index>(sizeof(float));
  }
  if (requirements.output_projection) {
    // A head's part of it, and what some values become behind it.
    bytes += Index{model.hidden_size} * (2 * model.head_dim + 256) * static_cast<Index>(sizeof(float));
  }
  const Index tokens = outline.evaluation_positions.back() + 1;
  if (requirements.evaluation_attention) {
    bytes += Head::evaluation_memory(shape_of(outline), tokens) +
             model.group_size() * prompt * static_cast<Index>(sizeof(float));
  }
  if (std::ranges::none_of(settings, &Setting::rank_agreement)) return bytes;
  // The oracle's importance of the group and what it shares, their orders, and the keys while it is taken.
  const Index rows = model.group_size() + 1;
  return bytes + (rows + model.group_size()) * prompt * static_cast<Index>(sizeof(float)) +
         rows * RankedValues::memory(prompt) +
         std::max(Head::evaluation_memory(shape_of(outline), tokens), RankedValues::working_memory(prompt));
}

Index LayerSelection::memory_of_layer(const TraceReplay& outline, const std::vector<Setting>& settings) {
  constexpr Index kVector = 64;  // what a vector takes beside its elements
  const ModelInfo& model = outline.model;
  const Index held = std::ranges::max(outline.held);
  const Index kv_heads = model.num_key_value_heads;
  Index bytes = 0;
  std::set<Share> importance;
  for (const Setting& setting : settings) {
    if (setting.rank_agreement && setting.granularity == Granularity::layer) importance.insert(setting.share);
    const Index sets = kv_heads * setting.sets_per_kv_head(model);
    const Index capacity = setting.capacity(static_cast<int>(held));
    // A budget may give a layer more than the mean.
    const Index kept = setting.policy->budget ? std::min(2 * capacity, held) : capacity;
    bytes += static_cast<Index>(sizeof(LayerResult)) + 2 * kVector +
             sets * (kept * static_cast<Index>(sizeof(int)) + kVector);
    if (!waits(setting, static_cast<int>(held))) continue;
    const bool all = compares_all(setting) || setting.granularity == Granularity::query;
    bytes += kv_heads * ((all ? model.group_size() : 0) + 1) * (held * static_cast<Index>(sizeof(float)) + kVector);
  }
  return bytes + static_cast<Index>(importance.size()) * kv_heads * held * static_cast<Index>(sizeof(float));
}

Index LayerSelection::memory_of_setting(const TraceReplay& outline, const std::vector<Setting>& settings) {
  const ModelInfo& model = outline.model;
  const int held = std::ranges::max(outline.held);
  Index most = 0;
  for (const Setting& setting : settings) {
    if (!waits(setting, held)) continue;
    // The scores of a layer side by side and put together; or a budget's copies of all heads' scores with their heads.
    const Index rows = compares_all(setting) ? 2 * model.num_attention_heads + 5 : model.num_key_value_heads + 3;
    Index bytes = rows * held * static_cast<Index>(sizeof(float));
    if (setting.rank_agreement) bytes = 3 * bytes + RankedValues::memory(held) + RankedValues::working_memory(held);
    most = std::max(most, bytes);
  }
  return most;
}

Index LayerSelection::least_combination_bytes(const TraceReplay& outline, const RankingRequirements& requirements) {
  return Head::combination_memory(shape_of(outline), requirements.window,
                                  static_cast<Index>(requirements.most_combinations));
}

Index LayerSelection::all_combination_bytes(const TraceReplay& outline, const RankingRequirements& requirements) {
  return Head::combination_memory(shape_of(outline), requirements.window,
                                  static_cast<Index>(requirements.combinations.size()));
}

}  // namespace kvreplay
