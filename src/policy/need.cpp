#include "policy/need.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvreplay {
namespace {

std::string count_or_none(int count) { return count == 0 ? "none" : fmt::to_string(count); }

std::optional<Obstacle> missing_window(int queries, const std::string& policy, const Holdings& holdings) {
  if (queries <= holdings.window_queries) return std::nullopt;
  const bool none = holdings.window_queries == 0;
  return Obstacle{
      .reason =
          fmt::format("{} needs {} before position {}, and the trace holds {}{}", policy,
                      queries == 1 ? "the last query" : fmt::format("the last {} queries", queries),
                      holdings.next_position, count_or_none(holdings.window_queries), queries == 1 ? "" : " of them"),
      .cure = fmt::format("capture with --queries window:{} or all{}", queries + holdings.later_prompt,
                          none ? "" : ", or choose a smaller window"),
      .shared = none ? fmt::format("they need queries before position {}, and the trace holds none there",
                                   holdings.next_position)
                     : fmt::format("they need more queries before position {} than the last {} that the trace holds",
                                   holdings.next_position, holdings.window_queries),
      .amount = queries};
}

std::optional<Obstacle> missing_queries(bool or_mass, const std::string& policy, const Holdings& holdings) {
  if (holdings.window_queries >= holdings.next_position) return std::nullopt;
  const std::string what =
      fmt::format("{}all {} queries before the eviction, and the trace holds {}",
                  or_mass ? "the recorded attention mass of the whole prompt, or " : "", holdings.next_position,
                  holdings.window_queries == 0 ? "none there" : fmt::format("the last {}", holdings.window_queries));
  return Obstacle{.reason = fmt::format("{} needs {}", policy, what),
                  .cure = or_mass ? "capture with --queries all (kvtrace: queries=\"all\" or attention_mass=True)"
                                  : "capture with --queries all",
                  .shared = fmt::format("they need {}", what)};
}

std::optional<Obstacle> missing_later_prompt(const std::string& policy, const Holdings& holdings) {
  if (holdings.later_prompt == 0) {
    const std::string what = "the prompt's queries after the eviction, and the prompt ends there";
    return Obstacle{.reason = fmt::format("{} needs {}", policy, what),
                    .cure = "capture a prompt that repeats its context, and evict at the context's end with --evict-at",
                    .shared = fmt::format("they need {}", what)};
  }
  if (holdings.later_queries >= holdings.later_prompt) return std::nullopt;
  const std::string what =
      fmt::format("the {} queries of the prompt from position {} on, and the trace holds {}", holdings.later_prompt,
                  holdings.next_position, count_or_none(holdings.later_queries));
  return Obstacle{.reason = fmt::format("{} needs {}", policy, what),
                  .cure = fmt::format("capture with --queries window:{} or all", holdings.later_prompt),
                  .shared = fmt::format("they need {}", what)};
}

std::optional<Obstacle> missing(const Need& need, const std::string& policy, const Holdings& holdings) {
  switch (need.kind) {
    case Need::Kind::window_queries:
      return missing_window(need.count, policy, holdings);
    case Need::Kind::all_queries:
      return missing_queries(false, policy, holdings);
    case Need::Kind::accumulated_attention:
      return holdings.attention_mass ? std::nullopt : missing_queries(true, policy, holdings);
    case Need::Kind::later_prompt:
      return missing_later_prompt(policy, holdings);
    case Need::Kind::rotary:
      if (holdings.rotary) return std::nullopt;
      return Obstacle{.reason = fmt::format("{} takes the rotation off queries, and the trace does not say how "
                                            "positions turned them",
                                            policy),
                      .cure = "capture again with this version",
                      .shared =
                          "they take the rotation off queries, and the trace does not say how positions turned "
                          "them"};
    case Need::Kind::output_projection:
    case Need::Kind::evaluation_queries:
    case Need::Kind::keys_or_values:
      return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace

bool Requirements::includes(Need::Kind kind) const { return std::ranges::count(needs, kind, &Need::kind) > 0; }

int Requirements::count(Need::Kind kind) const {
  int most = 0;
  for (const Need& need : needs) most = need.kind == kind ? std::max(most, need.count) : most;
  return most;
}

std::optional<Obstacle> missing_need(const std::vector<Need>& needs, const std::string& policy,
                                     const Holdings& holdings) {
  for (const Need& need : needs) {
    if (auto obstacle = missing(need, policy, holdings)) return obstacle;
  }
  return std::nullopt;
}

}  // namespace kvreplay
