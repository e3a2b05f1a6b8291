#include "replay/resolution.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "policy/decoding.h"
#include "replay/decoding.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

// Layers that hold the same positions at an eviction.
struct AlikeLayers {
  HeadShape shape;  // of the first of them
  std::vector<int> layers;

  bool hold_everything() const { return shape.rows() == shape.next_position; }
};

// The layers of a trace at an eviction, looked up once.
struct EvictedLayers {
  std::vector<HeadShape> shapes;  // [L]
  std::vector<AlikeLayers> alike;

  EvictedLayers(const TraceInfo& info, int eviction_position) {
    for (int layer = 0; layer < info.model.num_layers; ++layer) {
      shapes.push_back(head_shape(info, layer, 0, eviction_position));
      const auto is_alike = [this](const AlikeLayers& some) { return some.shape.positions == shapes.back().positions; };
      auto found = std::ranges::find_if(alike, is_alike);
      if (found == alike.end()) found = alike.insert(alike.end(), {shapes.back(), {}});
      found->layers.push_back(layer);
    }
  }

  // Those that hold what the layer of this shape does.
  const AlikeLayers& alike_to(const HeadShape& shape) const {
    return *std::ranges::find_if(alike,
                                 [&shape](const AlikeLayers& some) { return some.shape.positions == shape.positions; });
  }
};

// "layer 5", "layers 0–2, 4".
std::string named(const std::vector<int>& layers) {
  std::string text = layers.size() == 1 ? "layer " : "layers ";
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t last = i;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) ++last;
    text += fmt::format("{}{}", i == 0 ? "" : ", ", layers[i]);
    if (last > i) text += fmt::format("{}{}", last == i + 1 ? ", " : "–", layers[last]);
    i = last + 1;
  }
  return text;
}

// Tells of layers whose sliding window has dropped positions before the eviction.
void note_windows(const std::vector<AlikeLayers>& alike, const ReplayRequest& request,
                  std::vector<std::string>& notes) {
  for (const AlikeLayers& some : alike) {
    if (some.hold_everything()) continue;
    const int held = some.shape.rows();
    std::vector<std::string> kept_whole;
    for (const CapacityRequest& asked : request.capacities) {
      if (asked.resolve(held) >= held) kept_whole.push_back(asked.text);
    }
    notes.push_back(fmt::format(
        "{} hold{} the last {} position{} of {} sliding window alone; capacities and shares are of these{}",
        named(some.layers), some.layers.size() == 1 ? "s" : "", held, held == 1 ? "" : "s",
        some.layers.size() == 1 ? "its" : "their",
        kept_whole.empty() ? "" : fmt::format(", and at {} nothing is evicted there", fmt::join(kept_whole, ", "))));
  }
}

std::string count_or_none(int count) { return count == 0 ? "none" : fmt::to_string(count); }

Holdings holdings_of(const CapturedRun& trace, int eviction_position) {
  const TraceInfo& info = trace.info();
  const TraceHead head(trace, 0, 0, eviction_position);
  Holdings holdings{.next_position = eviction_position,
                    .window_queries = contiguous_window(head.query_positions(), eviction_position),
                    .later_prompt = std::max(0, info.prompt_length - eviction_position),
                    .later_queries = static_cast<int>(head.later_positions().size()),
                    .attention_mass = eviction_position == info.prompt_length,
                    .rotary = true};
  int without_projection = 0;
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    holdings.rotary = holdings.rotary && head_shape(info, layer, 0, eviction_position).rotary != nullptr;
    without_projection += trace.has_output_projection(layer) ? 0 : 1;
    holdings.attention_mass = holdings.attention_mass && trace.has_attention_mass(layer);
  }
  if (without_projection == info.model.num_layers) {
    holdings.missing_projection = "the trace has no output projection";
  } else if (without_projection > 0) {
    holdings.missing_projection =
        fmt::format("{} of {} layers have no output projection", without_projection, info.model.num_layers);
  }
  return holdings;
}

// Why a policy cannot be replayed at any capacity that evicts something, because of how heads share; nothing if it can.
std::optional<Obstacle> sharing_obstacle(const Policy& policy, Granularity granularity) {
  if (policy.across_layers && granularity == Granularity::query) {
    return Obstacle{.reason = fmt::format("{} keeps the same in all layers, of a KV head or of all, which granularity "
                                          "query cannot show",
                                          policy.canonical),
                    .cure = "ask for --heads kv or layer",
                    .shared = "they keep the same in all layers, which granularity query cannot show"};
  }
  if (policy.pattern() && granularity > policy.pattern()->coarsest_granularity()) {
    return Obstacle{
        .reason = fmt::format("{} keeps a set per {} head, which granularity {} cannot show", policy.canonical,
                              policy.pattern()->coarsest_granularity() == Granularity::query ? "query" : "KV",
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

// Why a capacity is too small, and whether the pattern and the budget can be drawn at all.
std::optional<Obstacle> capacity_obstacle(const EvictedLayers& layers, const Setting& setting, const RunIdentity& run) {
  const Policy& policy = *setting.policy;
  const auto least_in = [&policy](const HeadShape& shape) {
    return shape.rows() == shape.next_position ? policy.minimum_capacity()
                                               : std::max(1, policy.protection().held_by(shape).count());
  };
  const auto below = [&](int needed, const AlikeLayers& some) {
    const bool is_protected = needed == least_in(some.shape);
    const int held = some.shape.rows();
    const std::string where =
        some.hold_everything() ? ""
                               : fmt::format(" that {} hold{}", named(some.layers), some.layers.size() == 1 ? "s" : "");
    const std::string share = setting.asked.text.ends_with('%')
                                  ? fmt::format(" ({} of {} positions{})", setting.capacity(held), held, where)
                                  : "";
    return Obstacle{
        .reason = fmt::format("capacity {}{} is below the {} positions that {} {}{}", setting.asked.text, share, needed,
                              policy.canonical, is_protected ? "always keeps" : "needs at least",
                              some.hold_everything() ? "" : " there"),
        .cure = is_protected ? "ask for a larger capacity or protect fewer" : "ask for a larger capacity",
        .shared = fmt::format(
            "the capacity is below the positions that they {}{}", is_protected ? "always keep" : "need at least",
            some.hold_everything()
                ? ""
                : fmt::format(" in {}, which hold{} {} in {} sliding window", named(some.layers),
                              some.layers.size() == 1 ? "s" : "", held, some.layers.size() == 1 ? "its" : "their")),
        .amount = needed};
  };
  for (const AlikeLayers& some : layers.alike) {
    const int held = some.shape.rows();
    const int least = least_in(some.shape);
    if (!setting.keeps_all(held) && setting.capacity(held) < std::min(least, held)) return below(least, some);
  }
  if (!policy.pattern() && !policy.budget) return std::nullopt;
  for (const HeadShape& shape : layers.shapes) {
    if (setting.keeps_all(shape.rows())) continue;
    try {
      if (policy.pattern()) policy.pattern()->check(shape);
      std::vector<int> capacities = {setting.capacity(shape.rows())};
      if (policy.budget) {
        const BudgetRequest request = setting.budget_request(shape);
        policy.budget->check(request);
        if (!policy.budget->looks_at_heads()) capacities = policy.budget->allocate(request);
      }
      if (!policy.pattern()) continue;
      const int needed = policy.minimum_capacity(shape);
      const bool goes_by_capacity = policy.pattern()->capacity_rule() == Pattern::CapacityRule::asked;
      if (goes_by_capacity && std::ranges::min(capacities) < needed) return below(needed, layers.alike_to(shape));
    } catch (const Error& error) {
      return Obstacle{.reason = error.what()};
    }
  }
  try {
    if (policy.pattern()) policy.pattern()->check_run(run);
  } catch (const Error& error) {
    return Obstacle{.reason = error.what()};
  }
  return std::nullopt;
}

// Why a ranking cannot rank what these layers hold, or what this run does; nothing if it can.
std::optional<Obstacle> ranking_obstacle(const EvictedLayers& layers, const Policy& policy, const RunIdentity& run) {
  if (!policy.ranking()) return std::nullopt;
  try {
    for (const HeadShape& shape : layers.shapes) policy.ranking()->check(shape);
    policy.ranking()->check_run(run);
  } catch (const Error& error) {
    return Obstacle{.reason = error.what()};
  }
  return std::nullopt;
}

// Why a policy cannot evict while the trace's tokens come, at any capacity; nothing if it can.
std::optional<Obstacle> schedule_obstacle(const CapturedRun& trace, const Setting& setting, const Holdings& holdings) {
  const TraceInfo& info = trace.info();
  const Policy& policy = *setting.policy;
  const Schedule& schedule = *policy.schedule;
  const int steps = info.num_tokens() - holdings.next_position;
  const auto refused = [&](std::string why, std::string cure) {
    return Obstacle{.reason = fmt::format("{} {}", policy.canonical, why),
                    .cure = std::move(cure),
                    .shared = fmt::format("each of them {}", why)};
  };
  if (schedule.interval != Schedule::kOnce && schedule.interval > steps) {
    return refused(fmt::format("evicts every {} steps, and {} come{} after position {}", schedule.interval,
                               count_or_none(steps), steps == 1 ? "s" : "", holdings.next_position),
                   "choose a shorter interval, capture a longer run, or leave out +every");
  }
  if (schedule.phase == Schedule::Phase::turns &&
      std::ranges::none_of(info.turn_starts, [&](int start) { return start >= holdings.next_position; })) {
    const auto second = std::ranges::find_if(info.turn_starts, [](int start) { return start > 0; });
    return refused(
        fmt::format("evicts where turns begin, and the trace marks none from position {} on", holdings.next_position),
        second == info.turn_starts.end() ? "capture with --turns"
                                         : fmt::format("evict where one begins, as with --evict-at {}", *second));
  }
  if (policy.oracle && (policy.refinement || !policy.ranking()->memory({}))) {
    return refused("looks ahead of one eviction", "leave out the schedule, or take oracle-residency");
  }
  for (const Need& need : policy.requirements().needs) {
    if (need.kind == Need::Kind::later_prompt) {
      return refused("goes by what the prompt still says, which no later eviction has", "leave out the schedule");
    }
    if (need.kind == Need::Kind::all_queries && !policy.ranking()->memory({})) {
      return refused("goes by all queries, of which a cache under a schedule remembers the last ones",
                     "leave out the schedule");
    }
  }
  if (policy.row_positions == RowPositions::reindexed && !holdings.rotary) {
    return refused("turns keys to their places in the cache, and the trace does not say how positions turned them",
                   "capture again with this version");
  }
  if (!LayerDecoding::looks_at_queries(setting)) return std::nullopt;
  const int at_hand = queries_from(info.query_positions, holdings.next_position);
  if (at_hand >= steps) return std::nullopt;
  return refused(fmt::format("looks at the query of every step, and the trace lacks that at position {}",
                             holdings.next_position + at_hand),
                 "capture with --queries all, or window:N, which holds every query after the prompt");
}

// Why layers do not see what a policy with a schedule wants them to see.
std::optional<Obstacle> layers_obstacle(const EvictedLayers& layers, const Policy& policy) {
  const auto sees_all = [](const HeadShape& shape) {
    return shape.rule.sliding_window == 0 && shape.rule.attention_chunk_size == 0;
  };
  if (policy.schedule->attention == Schedule::Attention::full && !std::ranges::all_of(layers.shapes, sees_all)) {
    constexpr std::string_view kDoes =
        "by the attention of the run without eviction, and some layers do not see all of it";
    return Obstacle{.reason = fmt::format("{} goes {}", policy.canonical, kDoes),
                    .cure = "leave out attention=full",
                    .shared = fmt::format("they go {}", kDoes)};
  }
  const auto sees_as_the_first = [&layers](const HeadShape& shape) {
    return shape.rule.sliding_window == layers.shapes.front().rule.sliding_window &&
           shape.rule.attention_chunk_size == layers.shapes.front().rule.attention_chunk_size;
  };
  if (!policy.across_layers || std::ranges::all_of(layers.shapes, sees_as_the_first)) return std::nullopt;
  constexpr std::string_view kWhy = "the same in all layers, and these do not see as far back as each other";
  return Obstacle{.reason = fmt::format("{} keeps {}", policy.canonical, kWhy),
                  .cure = "replay a policy that goes layer by layer",
                  .shared = fmt::format("they keep {}", kWhy)};
}

// Why a policy with a schedule cannot evict in a running model, which computes one layer after the other; nothing if it
// can.
std::optional<Obstacle> running_model_obstacle(const Policy& policy) {
  const auto refused = [&policy](std::string_view does, std::string_view they_do, std::string_view has) {
    return Obstacle{
        .reason = fmt::format("{} {}, and a running model has {} when it decides", policy.canonical, does, has),
        .cure = "replay it",
        .shared = fmt::format("they {}, and a running model has {} when they decide", they_do, has)};
  };
  if (policy.oracle) {
    return refused("looks at the queries to come", "look at the queries to come", "none of them");
  }
  if (policy.schedule->attention == Schedule::Attention::full) {
    return refused("goes by the attention of the run without eviction",
                   "go by the attention of the run without eviction", "evicted what that is over");
  }
  if (policy.across_layers) {
    return refused("keeps the same positions in all layers", "keep the same positions in all layers",
                   "computed only the first ones");
  }
  return std::nullopt;
}

// Why a policy with a schedule cannot evict at a capacity.
std::optional<Obstacle> schedule_capacity_obstacle(const EvictedLayers& layers, const Setting& setting, int steps) {
  const Policy& policy = *setting.policy;
  for (const AlikeLayers& some : layers.alike) {
    const Protection protection = policy.protection().held_by(some.shape);
    const int pinned = policy.pin.prompt && !policy.pin.counted ? some.shape.rows() : 0;
    const int capacity = setting.capacity(some.shape.rows()) + pinned;
    const int room = policy.schedule->coming();
    int least = policy.pattern() ? policy.minimum_capacity(some.shape) : std::max(1, protection.count());
    if (policy.pin.prompt) least = std::max(least, protection.sinks + policy.protection().window + 1);
    least += room;
    if (capacity >= least) {
      // What a cache above its capacity waits for may never come.
      Schedule schedule = *policy.schedule;
      schedule.grow(capacity - pinned, policy.protection().window);
      const int most = steps + (schedule.counts_prompt ? some.shape.rows() : 0);
      if (!some.hold_everything() || most <= capacity || schedule.is_full(most, capacity)) continue;
      return Obstacle{
          .reason = fmt::format("{} at capacity {} waits for more rows than the {} that there are in the end",
                                policy.canonical, setting.asked.text, most),
          .cure = "ask for a smaller capacity or capture a longer run",
          .shared = fmt::format("they wait for more rows than the {} that there are in the end", most)};
    }
    return Obstacle{.reason = fmt::format("capacity {} is below the {} positions that {} needs: {}", setting.asked.text,
                                          least - pinned, policy.canonical,
                                          room > 0            ? "what it protects and room for the tokens that come"
                                          : policy.pin.prompt ? "the prompt, what it protects and one that is generated"
                                                              : "what it protects"),
                    .cure = "ask for a larger capacity",
                    .shared = "the capacity is below what they protect and what comes between evictions",
                    .amount = least - pinned};
  }
  if (!policy.budget) return std::nullopt;
  for (const HeadShape& shape : layers.shapes) {
    try {
      Policy once = policy;
      once.schedule.reset();
      Setting as_once = setting;
      as_once.policy = &once;
      policy.budget->check(as_once.budget_request(shape));
    } catch (const Error& error) {
      return Obstacle{.reason = error.what()};
    }
  }
  return std::nullopt;
}

// What a policy tells of its sets.
void add_notes_of(const Policy& policy, const EvictedLayers& layers, const RunIdentity& run,
                  std::vector<std::string>& notes) {
  const auto add = [&notes](std::string note) {
    if (!note.empty() && std::ranges::find(notes, note) == notes.end()) notes.push_back(std::move(note));
  };
  for (const std::string& note : policy.notes) add(note);
  if (!policy.pattern()) return;
  for (const HeadShape& shape : layers.shapes) add(policy.pattern()->note(shape));
  add(policy.pattern()->note_on_run(run));
}

// Tells where published code makes another count of a share.
void note_count(const EvictedLayers& layers, const Setting& setting, std::vector<std::string>& notes) {
  const Policy& policy = *setting.policy;
  if (policy.budget && !policy.budget->looks_at_heads()) return;  // which spreads fractions over layers
  for (const AlikeLayers& some : layers.alike) {
    const int held = some.shape.rows();
    const int capacity = setting.capacity(held);
    const int rounded_down = std::min(setting.asked.resolve(held), held);
    if (capacity == rounded_down) continue;
    notes.push_back(fmt::format("{}: {} of {} positions are {}, and not {}, as its code counts", policy.canonical,
                                setting.asked.text, held, capacity, rounded_down));
  }
}

// Whether what is kept follows from the capacity alone, though the policy would choose at a larger one.
// Layers that keep everything have no choice to make at any capacity and do not count.
bool leaves_nothing_to_choose(const EvictedLayers& layers, const Setting& setting) {
  const Policy& policy = *setting.policy;
  // What is in the heads divides positions, or chooses them not one by one: only what is protected is certain.
  const bool by_scores = (policy.budget && policy.budget->looks_at_heads()) || policy.selection;
  const auto unscored = [&](const HeadShape& shape) {
    const int is_protected = policy.protection().held_by(shape).count();
    return policy.ranking() && !by_scores ? std::max(policy.ranking()->unscored(shape), is_protected) : is_protected;
  };
  if (!policy.budget || policy.budget->looks_at_heads()) {
    return std::ranges::all_of(layers.alike, [&](const AlikeLayers& some) {
      const int held = some.shape.rows();
      return setting.keeps_all(held) || setting.capacity(held) <= unscored(some.shape);
    });
  }
  return std::ranges::all_of(layers.shapes, [&](const HeadShape& shape) {
    return setting.keeps_all(shape.rows()) ||
           std::ranges::max(policy.budget->allocate(setting.budget_request(shape))) <= unscored(shape);
  });
}

}  // namespace

std::vector<ReplaySetting> settings_for(const CapturedRun& trace, const ReplayRequest& request, int eviction_position,
                                        const RunIdentity& run, std::vector<std::string>& notes, LeftOut& left_out) {
  const Holdings holdings = holdings_of(trace, eviction_position);
  const EvictedLayers layers(trace.info(), eviction_position);
  std::vector<ReplaySetting> settings;
  SettingNames nothing_to_choose;
  SettingNames without_projection;
  SettingNames without_rotary;
  for (const Policy& policy : request.policies) {
    const auto rule = policy.pattern() ? policy.pattern()->capacity_rule() : Pattern::CapacityRule::asked;
    const std::optional<int> own = policy.budget ? policy.budget->own_capacity() : std::nullopt;
    const bool once = own || rule != Pattern::CapacityRule::asked;  // the same for every capacity asked for
    const Granularity granularity = request.granularity.value_or(policy.granularity.value_or(Granularity::kv));
    if (const auto obstacle = sharing_obstacle(policy, granularity)) {
      left_out.add(policy.canonical, "", *obstacle);
      continue;
    }
    const Requirements needs = policy.requirements();
    std::optional<Obstacle> missing = missing_need(needs.needs, policy.canonical, holdings);
    if (!missing) missing = ranking_obstacle(layers, policy, run);
    bool replayed = false;
    bool is_missing = false;
    for (const CapacityRequest& asked : request.capacities) {
      ReplaySetting replayed_setting;
      Setting& setting = replayed_setting.setting;
      setting = {.policy = &policy,
                 .asked = once ? CapacityRequest{.text = std::string(kAllPositions), .share = 1} : asked,
                 .granularity = granularity,
                 .share = request.share.value_or(policy.share.value_or(Share::mean))};
      if (own) setting.asked.count = std::max(*own, policy.minimum_capacity());
      if (policy.schedule) {
        std::optional<Obstacle> obstacle = request.layer_by_layer ? running_model_obstacle(policy) : std::nullopt;
        if (!obstacle) obstacle = layers_obstacle(layers, policy);
        if (!obstacle) obstacle = schedule_obstacle(trace, setting, holdings);
        const auto too_small =
            schedule_capacity_obstacle(layers, setting, trace.info().num_tokens() - eviction_position);
        if (obstacle || missing) {
          left_out.add(policy.canonical, "", obstacle ? *obstacle : *missing);
          break;
        }
        if (too_small) {
          left_out.add(policy.canonical, asked.text, *too_small);
          continue;
        }
        add_notes_of(policy, layers, run, notes);
        replayed = true;
        settings.push_back(std::move(replayed_setting));
        continue;
      }
      const bool evicts = std::ranges::any_of(
          layers.alike, [&setting](const AlikeLayers& some) { return !setting.keeps_all(some.shape.rows()); });
      if (evicts) {
        if (const auto obstacle = capacity_obstacle(layers, setting, run)) {
          left_out.add(policy.canonical, once ? "" : asked.text, *obstacle);
          if (once) break;
          continue;
        }
        if (missing) {
          is_missing = true;
          continue;
        }
        add_notes_of(policy, layers, run, notes);
        note_count(layers, setting, notes);
        replayed_setting.nothing_to_choose = leaves_nothing_to_choose(layers, setting);
        if (replayed_setting.nothing_to_choose) nothing_to_choose.add(policy.canonical, once ? "" : asked.text);
        replayed_setting.rank_agreement =
            request.rank_agreement && std::ranges::any_of(layers.alike, [&setting](const AlikeLayers& some) {
              return setting.goes_by_ranks(some.shape);
            });
        replayed = true;
      }
      settings.push_back(std::move(replayed_setting));
      if (once) break;
    }
    if (is_missing) left_out.add(policy.canonical, "", *missing);
    if (replayed && needs.includes(Need::Kind::output_projection) && !holdings.missing_projection.empty()) {
      without_projection.add(policy.canonical, "");
    }
    if (replayed && needs.includes(Need::Kind::rotary) && trace.info().rotary.empty()) {
      without_rotary.add(policy.canonical, "");
    }
  }
  if (without_rotary.count() > 0) {
    notes.push_back(
        fmt::format("{}: the trace does not say how positions turned its queries; the plain rotation of base "
                    "{} is taken, which is wrong for models that scale it or turn some dimensions alone",
                    without_rotary.text(), trace.info().model.rope_theta));
  }
  if (without_projection.count() > 0) {
    notes.push_back(fmt::format("{}: {}; lengths are taken before it there", without_projection.text(),
                                holdings.missing_projection));
  }
  const bool once = std::ranges::any_of(request.policies, [](const Policy& policy) { return !policy.schedule; });
  for (const CapacityRequest& asked : request.capacities) {
    const int capacity = asked.resolve(eviction_position);
    if (capacity < eviction_position || !once) continue;
    notes.push_back(fmt::format("capacity {} {} the {} position{} before the eviction: everything is kept", asked.text,
                                capacity > eviction_position ? "exceeds" : "is all", eviction_position,
                                eviction_position == 1 ? "" : "s"));
  }
  note_windows(layers.alike, request, notes);
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
