#include "replay/setting.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

std::vector<Setting> resolve(const TraceReader& trace, const ReplayRequest& request, int eviction_position,
                             std::vector<std::string>& notes) {
  const std::string& file = trace.path().string();
  std::vector<Setting> settings;
  for (const Policy& policy : request.policies) {
    const auto rule = policy.pattern ? policy.pattern->capacity_rule() : Pattern::CapacityRule::asked;
    const std::optional<int> own = policy.budget ? policy.budget->own_capacity() : std::nullopt;
    const bool once = own || rule != Pattern::CapacityRule::asked;  // the same for every capacity asked for
    for (const CapacityRequest& asked : request.capacities) {
      const int capacity = own    ? std::max(*own, policy.minimum_capacity())
                           : once ? eviction_position
                                  : asked.resolve(eviction_position);
      if (capacity < policy.minimum_capacity() && capacity < eviction_position) {
        throw Error(fmt::format(
            "{}: capacity {}{} is below the {} positions that {} always keeps; ask for a larger capacity or protect "
            "fewer",
            file, asked.text, asked.count == 0 ? fmt::format(" ({} of {} positions)", capacity, eviction_position) : "",
            policy.minimum_capacity(), policy.canonical));
      }
      const Granularity granularity = request.granularity.value_or(policy.granularity.value_or(Granularity::kv));
      const Share share = request.share.value_or(policy.share.value_or(Share::mean));
      if (policy.pattern && granularity > policy.pattern->coarsest_granularity()) {
        throw Error(fmt::format("{}: {} keeps a set per {} head, which granularity {} cannot show; leave out --heads",
                                file, policy.canonical,
                                policy.pattern->coarsest_granularity() == Granularity::query ? "query" : "KV",
                                name_of(granularity)));
      }
      if (policy.budget && policy.budget->needs_scores() && granularity == Granularity::layer) {
        throw Error(
            fmt::format("{}: {} divides positions among heads, and at granularity layer they share one set; ask "
                        "for --heads kv or query",
                        file, policy.canonical));
      }
      Setting& setting =
          settings.emplace_back(Setting{.policy = &policy,
                                        .capacity_request = once ? std::string(kAllPositions) : asked.text,
                                        .capacity = std::min(capacity, eviction_position),
                                        .granularity = granularity,
                                        .share = share});
      setting.rank_agreement = request.rank_agreement && setting.goes_by_ranks(eviction_position);
      if (once) break;
    }
  }
  for (const CapacityRequest& asked : request.capacities) {
    const int capacity = asked.resolve(eviction_position);
    if (capacity < eviction_position) continue;
    notes.push_back(fmt::format("capacity {} {} the {} position{} before the eviction: everything is kept", asked.text,
                                capacity > eviction_position ? "exceeds" : "is all", eviction_position,
                                eviction_position == 1 ? "" : "s"));
  }
  return settings;
}

// Tells, before any work, what a policy would find missing.
void check_requirements(const TraceReader& trace, const std::vector<Setting>& settings, int eviction_position,
                        std::vector<std::string>& notes) {
  const TraceInfo& info = trace.info();
  const TraceHead head(trace, 0, 0, eviction_position);
  const int window = contiguous_window(head.query_positions(), eviction_position);
  int without_projection = 0;
  bool mass = eviction_position == info.prompt_length;
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    without_projection += trace.has_output_projection(layer) ? 0 : 1;
    mass = mass && trace.has_attention_mass(layer);
  }
  const std::string missing_projection =
      without_projection == 0 ? ""
      : without_projection == info.model.num_layers
          ? "the trace has no output projection"
          : fmt::format("{} of {} layers have no output projection", without_projection, info.model.num_layers);
  const Policy* previous = nullptr;
  for (const Setting& setting : settings) {
    if (!setting.policy->ranking || setting.keeps_all(eviction_position) || setting.policy == previous) continue;
    previous = setting.policy;
    const Requirements needs = setting.policy->ranking->requirements();
    const auto refuse = [&](const std::string& what, const std::string& remedy) {
      return Error(fmt::format("{}: {} needs {}, and the trace holds the last {} prompt queries; {}",
                               trace.path().string(), setting.policy->canonical, what, window, remedy));
    };
    if (needs.window_queries > window) {
      throw refuse(
          fmt::format("the last {} queries before position {}", needs.window_queries, eviction_position),
          fmt::format("capture with --queries window:{} or all, or choose a smaller window", needs.window_queries));
    }
    if ((needs.all_queries || (needs.accumulated_attention && !mass)) && window < eviction_position) {
      throw refuse(fmt::format("{}all {} queries before the eviction",
                               needs.all_queries ? "" : "the recorded attention mass of the whole prompt, or ",
                               eviction_position),
                   "capture with --queries all");
    }
    if (needs.output_projection && !missing_projection.empty()) {
      notes.push_back(
          fmt::format("{}: {}; lengths are taken before it there", setting.policy->canonical, missing_projection));
    }
  }
  if (!missing_projection.empty()) {
    notes.push_back(fmt::format("layer error: {}; the concatenated heads are compared there", missing_projection));
  }
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

std::vector<Setting> settings_for(const TraceReader& trace, const ReplayRequest& request, int eviction_position,
                                  std::vector<std::string>& notes) {
  std::vector<Setting> settings = resolve(trace, request, eviction_position, notes);
  check_requirements(trace, settings, eviction_position, notes);
  return settings;
}

}  // namespace kvreplay
