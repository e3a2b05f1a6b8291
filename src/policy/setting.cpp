#include "policy/setting.h"

#include <algorithm>
#include <map>

namespace kvreplay {

int Setting::capacity(int held) const {
  const int count = asked.resolve(held, policy->share_rule);
  return policy->schedule ? count : std::min(count, held);
}

int Setting::most_positions(int held) const {
  if (policy->schedule) return held;
  if (!policy->budget) return capacity(held);
  if (policy->budget->surveys() || policy->budget->own_capacity()) return held;
  return std::min(2 * capacity(held), held);
}

bool Setting::keeps_all(int held) const {
  if (policy->schedule) return false;
  if (held == 0) return true;
  if (policy->budget && policy->budget->own_capacity()) return false;
  if (!policy->pattern()) return capacity(held) >= held;
  const Pattern::CapacityRule rule = policy->pattern()->capacity_rule();
  return rule == Pattern::CapacityRule::everything || (rule == Pattern::CapacityRule::asked && capacity(held) >= held);
}

bool Setting::goes_by_ranks(const HeadShape& shape) const {
  return policy->ranking() && !policy->refinement && !policy->schedule && !keeps_all(shape.rows()) &&
         shape.rows() - policy->protection().held_by(shape).count() >= 2;
}

bool Setting::is_local() const {
  return granularity != Granularity::layer && !(policy->budget && policy->budget->needs_scores());
}

BudgetRequest Setting::budget_request(const HeadShape& shape) const {
  return {.layer = shape.layer,
          .num_layers = shape.num_layers,
          .layer_among_alike = shape.layer_among_alike,
          .layers_alike = shape.layers_alike,
          .rows = shape.rows(),
          .capacity = std::min(capacity(shape.rows()), shape.rows()),
          .unrounded_capacity =
              std::min(asked.unrounded(shape.rows(), policy->share_rule), static_cast<double>(shape.rows())),
          .protection = policy->ranking() ? policy->protection().held_by(shape)
                                          : Protection{.sinks = policy->minimum_capacity(shape)},
          .granularity = granularity,
          .num_query_heads = shape.num_kv_heads * shape.group_size,
          .num_kv_heads = shape.num_kv_heads,
          .query_head_scores = {},
          .kv_head_scores = {},
          .surveys = {}};
}

RankingRequirements::RankingRequirements(std::span<const Setting> settings, int held) {
  using Distance = WindowCombination::Distance;
  std::map<WindowCombination, std::size_t> places;
  const Policy* previous = nullptr;
  const auto add_need = [this](Need::Kind kind) {
    if (!includes(kind)) needs.push_back(kind);
  };
  for (const Setting& setting : settings) {
    begin.push_back(asked.size());
    if (setting.policy == previous || setting.policy->schedule || setting.keeps_all(held)) continue;
    previous = setting.policy;
    Requirements own = setting.policy->requirements();
    for (const Need& need : own.needs) add_need(need.kind);
    if (setting.policy->ranking() && own.combinations.empty()) add_need(Need::Kind::keys_or_values);
    window = std::max(window, own.count(Need::Kind::window_queries));
    most_combinations = std::max(most_combinations, own.combinations.size());
    for (WindowCombination& combination : own.combinations) {
      const auto [place, is_new] = places.try_emplace(combination, combinations.size());
      asked.push_back(place->second);
      if (!is_new) continue;
      window = std::max(window, static_cast<int>(combination.weights.size()));
      with_distance += combination.distance == Distance::none ? 0 : 1;
      projected_distance = projected_distance || combination.distance == Distance::projected;
      combinations.push_back(std::move(combination));
    }
  }
  begin.push_back(asked.size());
}

bool RankingRequirements::includes(Need::Kind kind) const { return std::ranges::find(needs, kind) != needs.end(); }

}  // namespace kvreplay
