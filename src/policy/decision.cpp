#include "policy/decision.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "kernels/kernels.h"

namespace kvreplay {
namespace {

// Whether kept sets can only be drawn once the other heads of the layer are ranked.
bool waits(const Setting& setting, int held) {
  return !setting.is_local() && setting.policy->ranking() && !setting.keeps_all(held);
}

bool surveys_layers(const Setting& setting, int held) {
  return setting.policy->budget && setting.policy->budget->surveys() && !setting.keeps_all(held);
}

bool compares_all(const Setting& setting) { return setting.policy->budget && setting.policy->budget->needs_scores(); }

// Without a budget, or at granularity layer, one capacity serves all sets.
int capacity_for(const std::vector<int>& capacities, int set) {
  return capacities[capacities.size() == 1 ? 0 : static_cast<std::size_t>(set)];
}

}  // namespace

// A piece of all rows at a time, that stays in the cache.
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

LayerDecision::LayerDecision(const LayerSource& layer, std::span<const Setting> settings,
                             const RankingRequirements& requirements, Index combination_bytes, ScoreObserver* observer)
    : layer_(layer),
      settings_(settings),
      requirements_(requirements),
      shape_(layer.shape()),
      held_(shape_.rows()),
      head_shapes_(static_cast<std::size_t>(shape_.num_kv_heads)),
      combination_bytes_(combination_bytes),
      observer_(observer) {
  const auto kv_heads = static_cast<std::size_t>(shape_.num_kv_heads);
  kept_.reserve(settings.size());
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    if (waits(setting, held_)) deferred_[i].resize(kv_heads);
    kept_.emplace_back(kv_heads * static_cast<std::size_t>(setting.sets_per_kv_head(shape_.group_size)));
  }
}

std::span<const LayerSurvey> LayerSource::surveys(std::size_t /*setting*/, const Setting& of) const {
  throw Error(fmt::format("{}: {} divides positions over all layers, and no other layer is known here", name(),
                          of.policy->canonical));
}

std::vector<std::vector<float>> LayerDecision::survey_head(int kv_head) const {
  const std::unique_ptr<HeadSource> source = layer_.head(kv_head);
  const Head head(*source, combination_bytes_);
  std::vector<std::vector<float>> surveys(settings_.size());
  for (std::size_t i = 0; i < settings_.size(); ++i) {
    const Setting& setting = settings_[i];
    const Policy& policy = *setting.policy;
    if (!surveys_layers(setting, held_)) continue;
    // The capacities of a policy follow each other, and the same is found out for each.
    const bool by_capacity = policy.budget->needs_scores() && policy.ranking()->depends_on_capacity();
    if (i > 0 && settings_[i - 1].policy == setting.policy && !surveys[i - 1].empty() && !by_capacity) {
      surveys[i] = surveys[i - 1];
      continue;
    }
    try {
      HeadScores scores;
      if (policy.budget->needs_scores()) {
        Matrix raw(shape_.group_size, held_);
        for (int member = 0; member < shape_.group_size; ++member) {
          policy.ranking()->score(head, member, row_of(raw, member));
        }
        smooth_and_share(setting, head, raw, scores);
      }
      const std::span<const float> shared =
          scores.shared.rows() > 0 ? row_of(std::as_const(scores.shared), 0) : std::span<const float>();
      surveys[i] = policy.budget->survey(head, shared, policy.protection().held_by(shape_));
    } catch (const Error& error) {
      throw in_context(setting, kv_head, error);
    }
  }
  return surveys;
}

void LayerDecision::decide_head(int kv_head) {
  const std::unique_ptr<HeadSource> source = layer_.head(kv_head);
  const Head head(*source, combination_bytes_);
  if (observer_ != nullptr) observer_->begin_head(head);
  head_shapes_[static_cast<std::size_t>(kv_head)] = head.shape();
  HeadScores scores;
  Matrix raw(shape_.group_size, head.rows());
  std::size_t prepared = 0;  // settings whose combinations were prepared
  for (std::size_t i = 0; i < settings_.size(); ++i) {
    const Setting& setting = settings_[i];
    const Policy& policy = *setting.policy;
    if (policy.schedule) continue;
    try {
      if (setting.keeps_all(held_)) {
        keep_all(i, head.shape());
        continue;
      }
      if (policy.pattern()) {
        keep_pattern(i, *source);
        continue;
      }
      if (i >= prepared) prepared = prepare(head, i);
      // A policy's capacities follow each other.
      const bool same_policy = i > 0 && settings_[i - 1].policy == setting.policy && !settings_[i - 1].keeps_all(held_);
      if (!same_policy) {
        for (int member = 0; member < shape_.group_size; ++member) {
          policy.ranking()->score(head, member, row_of(raw, member));
        }
      }
      const bool same_scores = same_policy && !policy.ranking()->depends_on_capacity();
      if (!same_scores) smooth_and_share(setting, head, raw, scores);
      if (observer_ != nullptr && setting.goes_by_ranks(shape_) && setting.granularity != Granularity::layer) {
        observer_->head_scored(i, head, scores, same_scores);
      }
      if (setting.is_local()) {
        choose_locally(i, head.shape(), scores);
      } else {
        HeadScores& waiting = deferred_.at(i)[static_cast<std::size_t>(kv_head)];
        waiting.shared = scores.shared;
        if (compares_all(setting) || setting.granularity == Granularity::query) waiting.query = scores.query;
      }
    } catch (const Error& error) {
      throw in_context(setting, kv_head, error);
    }
  }
  if (observer_ != nullptr) observer_->end_head(head);
}

// Computes together what the settings from `first` on will ask the head for, as many of them as memory allows; returns
// the first that is left out.
std::size_t LayerDecision::prepare(const Head& head, std::size_t first) const {
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
void LayerDecision::smooth_and_share(const Setting& setting, const Head& head, const Matrix& raw,
                                     HeadScores& scores) const {
  const Ranking& ranking = *setting.policy->ranking();
  const bool compare_all = compares_all(setting);
  const int capacity = std::min(setting.capacity(held_), static_cast<int>(head.rows()));
  scores.query = raw;
  std::vector<int> members(static_cast<std::size_t>(shape_.group_size));
  std::iota(members.begin(), members.end(), 0);
  for (const int member : members) {
    ranking.smooth(head, member, capacity, row_of(scores.query, member));
  }
  if (setting.granularity != Granularity::query || compare_all) {
    combine(scores.query, setting.share, scores.shared);
    ranking.refine(head, members, capacity, row_of(scores.shared, 0));
    check_numbers(scores.shared, ranking, head.shape());
  } else {
    scores.shared.resize(0, 0);
  }
  if (setting.granularity == Granularity::query || compare_all) {
    for (const int& member : members) {
      ranking.refine(head, {&member, 1}, capacity, row_of(scores.query, member));
    }
    check_numbers(scores.query, ranking, head.shape());
  }
}

void LayerDecision::check_numbers(const Matrix& scores, const Ranking& ranking, const HeadShape& shape) const {
  const Protection protection = ranking.protection().held_by(shape);
  for (Index row = 0; row < scores.rows(); ++row) {
    const auto ranked = row_of(scores, row)
                            .subspan(static_cast<std::size_t>(protection.sinks),
                                     static_cast<std::size_t>(shape.rows() - protection.count()));
    if (!kernels::has_nan(ranked)) continue;
    const auto found = std::ranges::find_if(ranked, [](float score) { return std::isnan(score); });
    throw Error(fmt::format("the score of position {} is not a number",
                            shape.positions[protection.sinks + static_cast<int>(found - ranked.begin())]));
  }
}

void LayerDecision::keep_all(std::size_t setting, const HeadShape& shape) {
  std::vector<int> all;
  for (int row = 0; row < shape.rows(); ++row) all.push_back(shape.positions[row]);
  const int sets = settings_[setting].sets_per_kv_head(shape.group_size);
  for (int i = 0; i < sets; ++i) kept_[setting][static_cast<std::size_t>(shape.kv_head * sets + i)] = all;
}

void LayerDecision::keep_pattern(std::size_t setting, const HeadSource& head) {
  const HeadShape& shape = head.shape();
  const Setting& s = settings_[setting];
  const int sets = s.sets_per_kv_head(shape_.group_size);
  const std::vector<int> capacities = allocate(setting, {});
  // Sets that are given can be of positions that the layer no longer holds.
  const bool may_be_empty = s.policy->pattern()->capacity_rule() == Pattern::CapacityRule::own;
  for (int i = 0; i < sets; ++i) {
    const int set = shape.kv_head * sets + i;
    kept_[setting][static_cast<std::size_t>(set)] = positions_of(
        s.policy->draw(shape, i, capacity_for(capacities, set), head.pattern_memory()), shape, may_be_empty);
  }
}

// Steps 4 and 5 for the kept sets of one KV head.
void LayerDecision::choose_locally(std::size_t setting, const HeadShape& shape, const HeadScores& scores) {
  const Setting& s = settings_[setting];
  const Matrix& rows = s.granularity == Granularity::query ? scores.query : scores.shared;
  const int sets = static_cast<int>(rows.rows());
  const std::vector<int> capacities = allocate(setting, {});
  for (int i = 0; i < sets; ++i) {
    const int set = shape.kv_head * sets + i;
    kept_[setting][static_cast<std::size_t>(set)] = choose(s, shape, row_of(rows, i), capacity_for(capacities, set));
  }
}

// Steps 4 and 5 for settings whose heads depend on each other.
void LayerDecision::decide_together(int index) {
  const auto setting = static_cast<std::size_t>(index);
  const Setting& s = settings_[setting];
  if (s.policy->schedule || !waits(s, held_)) return;
  const std::vector<HeadScores>& parts = deferred_.at(setting);
  try {
    if (s.granularity == Granularity::layer) {
      Matrix rows(shape_.num_kv_heads, held_);
      for (Index i = 0; i < rows.rows(); ++i) rows.row(i) = parts[static_cast<std::size_t>(i)].shared;
      Matrix scores;
      combine(rows, s.share, scores);
      if (observer_ != nullptr && s.goes_by_ranks(shape_)) observer_->layer_scored(setting, row_of(scores, 0));
      std::ranges::fill(kept_[setting], choose(s, shape_, row_of(scores, 0), allocate(setting, parts)[0]));
      return;
    }
    const std::vector<int> capacities = allocate(setting, parts);
    const int sets = s.sets_per_kv_head(shape_.group_size);
    for (std::size_t set = 0; set < kept_[setting].size(); ++set) {
      const std::size_t kv_head = set / static_cast<std::size_t>(sets);
      const HeadScores& part = parts[kv_head];
      const std::span<const float> scores = s.granularity == Granularity::query
                                                ? row_of(part.query, static_cast<Index>(set) % sets)
                                                : row_of(part.shared, 0);
      kept_[setting][set] = choose(s, head_shapes_[kv_head], scores, capacities[set]);
    }
  } catch (const Error& error) {
    throw in_context(s, -1, error);
  }
}

std::vector<int> LayerDecision::allocate(std::size_t setting, const std::vector<HeadScores>& scores) const {
  const Setting& s = settings_[setting];
  const Policy& policy = *s.policy;
  if (!policy.budget) return {s.capacity(held_)};
  BudgetRequest request = s.budget_request(shape_);
  if (policy.budget->surveys()) request.surveys = layer_.surveys(setting, s);
  for (const HeadScores& part : scores) {
    for (Index member = 0; member < part.query.rows(); ++member) {
      request.query_head_scores.push_back(row_of(part.query, member));
    }
    if (part.shared.rows() > 0) request.kv_head_scores.push_back(row_of(part.shared, 0));
  }
  return policy.budget->allocate(request);
}

std::vector<int> LayerDecision::choose(const Setting& setting, const HeadShape& shape, std::span<const float> scores,
                                       int capacity) const {
  const Policy& policy = *setting.policy;
  const Protection protection = policy.protection().held_by(shape);
  // A head whose cache is shorter than others may be granted more than it holds.
  capacity = std::min(capacity, shape.rows());
  return positions_of(policy.selection ? policy.selection->select(scores, protection, capacity)
                                       : select_top(scores, protection, capacity),
                      shape, shape.rows() == 0);
}

// What stands in kept rows. A method, maybe a plug-in's, that keeps what is not there must not get as far as the
// measures.
std::vector<int> LayerDecision::positions_of(std::vector<int> rows, const HeadShape& shape, bool may_be_empty) {
  const bool inside = rows.empty() ? may_be_empty : rows.front() >= 0 && rows.back() < shape.rows();
  if (!inside || !std::ranges::is_sorted(rows, std::less_equal<>())) {
    throw Error(fmt::format("a kept set is not ascending rows from 0 to {}", shape.rows() - 1));
  }
  for (int& row : rows) row = shape.positions[row];
  return rows;
}

Error LayerDecision::in_context(const Setting& setting, int kv_head, const Error& error) const {
  return Error(fmt::format("{}: {}, layer {}{}: {}", layer_.name(), setting.policy->canonical, shape_.layer,
                           kv_head < 0 ? "" : fmt::format(", KV head {}", kv_head), error.what()));
}

Index LayerDecision::memory_of_head(const HeadShape& shape, const RankingRequirements& requirements, int hidden_size,
                                    Index tokens) {
  constexpr auto kFloat = static_cast<Index>(sizeof(float));
  const Index prompt = shape.next_position;
  // Raw and smoothed scores of the group, what it shares, neighbours while they are pooled, and what is sorted.
  const Index scores = prompt * (3 * shape.group_size + 5);
  const Index whole = requirements.includes(Need::Kind::keys_or_values) ? 2 * prompt * shape.head_dim : 0;
  Index bytes = Head::memory(shape, requirements.window) + (scores + whole) * kFloat;
  if (requirements.includes(Need::Kind::accumulated_attention) || requirements.includes(Need::Kind::all_queries)) {
    // Attention of some queries, its sums, the keys as they are multiplied, and what every query head received.
    bytes += prompt * (shape.head_dim + shape.group_size + 40) * kFloat;
  }
  if (requirements.includes(Need::Kind::all_queries)) bytes += prompt * shape.head_dim * kFloat;
  if (requirements.includes(Need::Kind::later_prompt)) {
    // All keys, and attention of some queries to them.
    const Index all = std::max<Index>(shape.prompt_length, prompt);
    bytes += (3 * all * shape.head_dim + 16 * all) * kFloat;
  }
  if (requirements.includes(Need::Kind::output_projection)) {
    // A head's part of it, and what some values become behind it.
    bytes += Index{hidden_size} * (2 * shape.head_dim + 256) * kFloat;
  }
  if (requirements.includes(Need::Kind::evaluation_queries)) {
    bytes += Head::evaluation_memory(shape, tokens) + shape.group_size * prompt * kFloat;
  }
  return bytes;
}

Index LayerDecision::memory_of_layer(const HeadShape& shape, std::span<const Setting> settings) {
  constexpr Index kVector = 64;  // what a vector takes beside its elements
  const Index held = shape.rows();
  const Index kv_heads = shape.num_kv_heads;
  Index bytes = 0;
  for (const Setting& setting : settings) {
    const Index sets = kv_heads * setting.sets_per_kv_head(shape.group_size);
    const Index kept = setting.most_positions(shape.rows());
    bytes += 2 * kVector + sets * (kept * static_cast<Index>(sizeof(int)) + kVector);
    if (!waits(setting, shape.rows())) continue;
    const bool all = compares_all(setting) || setting.granularity == Granularity::query;
    bytes += kv_heads * ((all ? shape.group_size : 0) + 1) * (held * static_cast<Index>(sizeof(float)) + kVector);
  }
  return bytes;
}

Index LayerDecision::memory_of_setting(const HeadShape& shape, std::span<const Setting> settings) {
  Index most = 0;
  for (const Setting& setting : settings) {
    if (!waits(setting, shape.rows())) continue;
    // The scores of a layer side by side and put together; or a budget's copies of all heads' scores with their heads.
    const Index heads = shape.num_kv_heads;
    const Index rows = compares_all(setting) ? 2 * heads * shape.group_size + 5 : heads + 3;
    most = std::max(most, rows * shape.rows() * static_cast<Index>(sizeof(float)));
  }
  return most;
}

Index LayerDecision::least_combination_bytes(const HeadShape& shape, const RankingRequirements& requirements) {
  return Head::combination_memory(shape, requirements.window, static_cast<Index>(requirements.most_combinations));
}

Index LayerDecision::all_combination_bytes(const HeadShape& shape, const RankingRequirements& requirements) {
  return Head::combination_memory(shape, requirements.window, static_cast<Index>(requirements.combinations.size()));
}

}  // namespace kvreplay
