#include "replay/setting.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "base/error.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

// What a trace holds of what policies may need, looked up once.
struct Holdings {
  int window = 0;                  // queries before the eviction, without a gap
  bool attention_mass = false;     // for this eviction
  std::string missing_projection;  // empty: no layer lacks one

  Holdings(const TraceReader& trace, int eviction_position) {
    const TraceInfo& info = trace.info();
    const TraceHead head(trace, 0, 0, eviction_position);
    window = contiguous_window(head.query_positions(), eviction_position);
    attention_mass = eviction_position == info.prompt_length;
    int without_projection = 0;
    for (int layer = 0; layer < info.model.num_layers; ++layer) {
      without_projection += trace.has_output_projection(layer) ? 0 : 1;
      attention_mass = attention_mass && trace.has_attention_mass(layer);
    }
    if (without_projection == info.model.num_layers) {
      missing_projection = "the trace has no output projection";
    } else if (without_projection > 0) {
      missing_projection =
          fmt::format("{} of {} layers have no output projection", without_projection, info.model.num_layers);
    }
  }
};

// Why a policy cannot be replayed at any capacity that evicts something, because of how heads share; nothing if it can.
std::optional<Obstacle> sharing_obstacle(const Policy& policy, Granularity granularity) {
  if (policy.pattern && granularity > policy.pattern->coarsest_granularity()) {
    return Obstacle{
        .reason = fmt::format("{} keeps a set per {} head, which granularity {} cannot show", policy.canonical,
                              policy.pattern->coarsest_granularity() == Granularity::query ? "query" : "KV",
                              name_of(granularity)),
        .cure = "leave out --heads",
        .shared = fmt::format("they keep a set per head, which granularity {} cannot show", name_of(granularity))};
  }
  if (policy.budget && policy.budget->needs_scores() && granularity == Granularity::layer) {
    return Obstacle{.reason = fmt::format("{} divides positions among heads, and at granularity layer they share one "
                                          "set",
                                          policy.canonical),
                    .cure = "ask for --heads kv or query",
                    .shared = "they divide positions among heads, and at granularity layer these share one set"};
  }
  return std::nullopt;
}

// The same because of what the trace lacks.
std::optional<Obstacle> missing_need(const Policy& policy, const Requirements& needs, const Holdings& trace,
                                     int eviction_position) {
  if (needs.window_queries > trace.window) {
    return Obstacle{
        .reason = fmt::format("{} needs the last {} queries before position {}, and the trace holds the last {} prompt "
                              "queries",
                              policy.canonical, needs.window_queries, eviction_position, trace.window),
        .cure =
            fmt::format("capture with --queries window:{} or all, or choose a smaller window", needs.window_queries),
        .shared = fmt::format("they need more queries before position {} than the last {} that the trace holds",
                              eviction_position, trace.window),
        .amount = needs.window_queries};
  }
  const bool mass = needs.accumulated_attention && !needs.all_queries;
  if ((needs.all_queries || (mass && !trace.attention_mass)) && trace.window < eviction_position) {
    const std::string what = fmt::format(
        "{}all {} queries before the eviction, and the trace holds the last {} prompt "
        "queries",
        mass ? "the recorded attention mass of the whole prompt, or " : "", eviction_position, trace.window);
    return Obstacle{.reason = fmt::format("{} needs {}", policy.canonical, what),
                    .cure = mass ? "capture with --queries all (kvtrace: queries=\"all\" or attention_mass=True)"
                                 : "capture with --queries all",
                    .shared = fmt::format("they need {}", what)};
  }
  return std::nullopt;
}

// Why a capacity is too small, and whether the pattern and the budget can be drawn at all.
std::optional<Obstacle> capacity_obstacle(const TraceReader& trace, const Setting& setting, int eviction_position) {
  const Policy& policy = *setting.policy;
  const auto below = [&](int needed) {
    const bool is_protected = needed == policy.minimum_capacity();
    const std::string share = setting.capacity_request.ends_with('%')
                                  ? fmt::format(" ({} of {} positions)", setting.capacity, eviction_position)
                                  : "";
    return Obstacle{
        .reason = fmt::format("capacity {}{} is below the {} positions that {} {}", setting.capacity_request, share,
                              needed, policy.canonical, is_protected ? "always keeps" : "needs at least"),
        .cure = is_protected ? "ask for a larger capacity or protect fewer" : "ask for a larger capacity",
        .shared = is_protected ? "the capacity is below the positions that they always keep"
                               : "the capacity is below the positions that they need at least",
        .amount = needed};
  };
  if (setting.capacity < policy.minimum_capacity()) return below(policy.minimum_capacity());
  if (!policy.pattern && !policy.budget) return std::nullopt;
  const ModelInfo& model = trace.info().model;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const HeadShape shape = head_shape(trace.info(), layer, 0, eviction_position);
    try {
      if (policy.pattern) policy.pattern->check(shape);
      std::vector<int> capacities = {setting.capacity};
      if (policy.budget) {
        const BudgetRequest request = setting.budget_request(shape);
        policy.budget->check(request);
        if (!policy.budget->needs_scores()) capacities = policy.budget->allocate(request);
      }
      if (!policy.pattern) continue;
      const int needed = policy.pattern->minimum_capacity(shape);
      const bool goes_by_capacity = policy.pattern->capacity_rule() == Pattern::CapacityRule::asked;
      if (goes_by_capacity && std::ranges::min(capacities) < needed) return below(needed);
    } catch (const Error& error) {
      return Obstacle{.reason = error.what()};
    }
  }
  return std::nullopt;
}

// Whether what is kept follows from the capacity alone, though the policy would choose at a larger one.
bool leaves_nothing_to_choose(const TraceReader& trace, const Setting& setting, int eviction_position) {
  const Policy& policy = *setting.policy;
  if (setting.keeps_all(eviction_position)) return false;
  // Scores divide positions, or choose them not one by one: only what is protected is certain.
  const bool by_scores = (policy.budget && policy.budget->needs_scores()) || policy.selection;
  const int unscored =
      policy.ranking && !by_scores ? policy.ranking->unscored(eviction_position) : policy.protection().count();
  if (!policy.budget || policy.budget->needs_scores()) return setting.capacity <= unscored;
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    const HeadShape shape = head_shape(trace.info(), layer, 0, eviction_position);
    if (std::ranges::max(policy.budget->allocate(setting.budget_request(shape))) > unscored) return false;
  }
  return true;
}

}  // namespace

bool Setting::keeps_all(int prompt_length) const {
  if (policy->budget && policy->budget->own_capacity()) return false;
  if (!policy->pattern) return capacity >= prompt_length;
  const Pattern::CapacityRule rule = policy->pattern->capacity_rule();
  return rule == Pattern::CapacityRule::everything ||
         (rule == Pattern::CapacityRule::asked && capacity >= prompt_length);
}

bool Setting::goes_by_ranks(int prompt_length) const {
  return policy->ranking && policy->exchanges == 0 && !keeps_all(prompt_length) &&
         prompt_length - policy->ranking->protection().count() >= 2;
}

bool Setting::is_local() const {
  return granularity != Granularity::layer && !(policy->budget && policy->budget->needs_scores());
}

RankingRequirements::RankingRequirements(const std::vector<Setting>& settings, int prompt_length) {
  using Distance = WindowCombination::Distance;
  std::map<WindowCombination, std::size_t> places;
  const Policy* previous = nullptr;
  for (const Setting& setting : settings) {
    begin.push_back(asked.size());
    if (!setting.policy->ranking || setting.policy == previous || setting.keeps_all(prompt_length)) continue;
    previous = setting.policy;
    Requirements needs = setting.policy->ranking->requirements();
    window = std::max(window, needs.window_queries);
    keys_or_values = keys_or_values || needs.keys_or_values || needs.combinations.empty();
    most_combinations = std::max(most_combinations, needs.combinations.size());
    for (WindowCombination& combination : needs.combinations) {
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

BudgetRequest Setting::budget_request(const HeadShape& shape) const {
  return {.layer = shape.layer,
          .num_layers = shape.num_layers,
          .prompt_length = shape.prompt_length,
          .capacity = capacity,
          .protection = policy->ranking ? policy->ranking->protection()
                                        : Protection{.sinks = policy->pattern->minimum_capacity(shape)},
          .granularity = granularity,
          .num_query_heads = shape.num_kv_heads * shape.group_size,
          .num_kv_heads = shape.num_kv_heads,
          .pyramid_on_short_prompts = policy->ranking && policy->ranking->pyramid_on_short_prompts(),
          .query_head_scores = {},
          .kv_head_scores = {}};
}

std::vector<Setting> settings_for(const TraceReader& trace, const ReplayRequest& request, int eviction_position,
                                  std::vector<std::string>& notes, LeftOut& left_out) {
  const Holdings holdings(trace, eviction_position);
  std::vector<Setting> settings;
  SettingNames nothing_to_choose;
  SettingNames without_projection;
  for (const Policy& policy : request.policies) {
    const auto rule = policy.pattern ? policy.pattern->capacity_rule() : Pattern::CapacityRule::asked;
    const std::optional<int> own = policy.budget ? policy.budget->own_capacity() : std::nullopt;
    const bool once = own || rule != Pattern::CapacityRule::asked;  // the same for every capacity asked for
    const Granularity granularity = request.granularity.value_or(policy.granularity.value_or(Granularity::kv));
    if (const auto obstacle = sharing_obstacle(policy, granularity)) {
      left_out.add(policy.canonical, "", *obstacle);
      continue;
    }
    const Requirements needs = policy.ranking ? policy.ranking->requirements() : Requirements{};
    const std::optional<Obstacle> missing = missing_need(policy, needs, holdings, eviction_position);
    bool replayed = false;
    bool is_missing = false;
    for (const CapacityRequest& asked : request.capacities) {
      const int capacity = own    ? std::max(*own, policy.minimum_capacity())
                           : once ? eviction_position
                                  : asked.resolve(eviction_position);
      Setting setting{.policy = &policy,
                      .capacity_request = once ? std::string(kAllPositions) : asked.text,
                      .capacity = std::min(capacity, eviction_position),
                      .granularity = granularity,
                      .share = request.share.value_or(policy.share.value_or(Share::mean))};
      if (!setting.keeps_all(eviction_position)) {
        if (const auto obstacle = capacity_obstacle(trace, setting, eviction_position)) {
          left_out.add(policy.canonical, once ? "" : asked.text, *obstacle);
          if (once) break;
          continue;
        }
        if (missing) {
          is_missing = true;
          continue;
        }
        setting.nothing_to_choose = leaves_nothing_to_choose(trace, setting, eviction_position);
        if (setting.nothing_to_choose) nothing_to_choose.add(policy.canonical, once ? "" : asked.text);
        setting.rank_agreement = request.rank_agreement && setting.goes_by_ranks(eviction_position);
        replayed = true;
      }
      settings.push_back(std::move(setting));
      if (once) break;
    }
    if (is_missing) left_out.add(policy.canonical, "", *missing);
    if (replayed && needs.output_projection && !holdings.missing_projection.empty()) {
      without_projection.add(policy.canonical, "");
    }
  }
  if (without_projection.count() > 0) {
    notes.push_back(fmt::format("{}: {}; lengths are taken before it there", without_projection.text(),
                                holdings.missing_projection));
  }
  for (const CapacityRequest& asked : request.capacities) {
    const int capacity = asked.resolve(eviction_position);
    if (capacity < eviction_position) continue;
    notes.push_back(fmt::format("capacity {} {} the {} position{} before the eviction: everything is kept", asked.text,
                                capacity > eviction_position ? "exceeds" : "is all", eviction_position,
                                eviction_position == 1 ? "" : "s"));
  }
  if (nothing_to_choose.count() > 0) {
    notes.push_back(
        fmt::format("nothing to choose: {}: the capacity is no more than what is kept whatever the scores, "
                    "so these say nothing of the policy's choice",
                    nothing_to_choose.text()));
  }
  if (!holdings.missing_projection.empty()) {
    notes.push_back(
        fmt::format("layer error: {}; the concatenated heads are compared there", holdings.missing_projection));
  }
  for (std::string& note : left_out.notes()) notes.push_back(std::move(note));
  return settings;
}

}  // namespace kvreplay
