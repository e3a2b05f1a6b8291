#include "replay/engine.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <tuple>
#include <utility>

#include "base/buffer.h"
#include "base/error.h"
#include "base/memory.h"
#include "base/parallel.h"
#include "base/parallel_in_order.h"
#include "base/printable.h"
#include "kernels/kernels.h"
#include "replay/decoding.h"
#include "replay/evaluation.h"
#include "replay/layer_projection.h"
#include "replay/layer_rank_agreement.h"
#include "replay/measurement.h"
#include "replay/refining.h"
#include "replay/replayable.h"
#include "replay/trace_source.h"
#include "trace/identity.h"
#include "trace/inspection.h"

namespace kvreplay {
namespace {

// Why a trace cannot be evicted at a position; empty if it can.
std::string eviction_obstacle(const TraceInfo& info, int eviction_position) {
  if (eviction_position < 1 || eviction_position > info.num_tokens()) {
    return fmt::format("eviction position {} is outside the trace's {} tokens", eviction_position, info.num_tokens());
  }
  if (info.query_positions.back() >= eviction_position) return "";
  return fmt::format(
      "no query at or after position {} was captured, so there is nothing to evaluate; capture with --generate 2 or "
      "more, or evict earlier with --evict-at",
      eviction_position);
}

// Where the evaluation of all of a trace's evictions begins; each of them begins there or, if it is later, at itself.
int evaluation_start(const TraceInfo& info, const ReplayRequest& request, const std::vector<int>& evictions) {
  if (!request.evaluate_from) return std::ranges::max(evictions);
  return *request.evaluate_from == kPromptEnd ? info.prompt_length : *request.evaluate_from;
}

TraceReplay prepare(const CapturedRun& trace, const Eviction& eviction) {
  const TraceInfo& info = trace.info();
  TraceReplay replay;
  replay.trace = trace.name();
  replay.model = info.model;
  replay.prompt_length = info.prompt_length;
  replay.eviction_position = eviction.position;
  replay.evaluate_from = eviction.evaluate_from;
  replay.held = held_positions(info, eviction.position);
  const auto positions = evaluation_queries(info, eviction).positions;
  replay.evaluation_positions.assign(positions.begin(), positions.end());
  for (const Span& span : info.spans) {
    if (span.start < eviction.position && span.end > span.start) replay.spans.push_back(span);
  }
  return replay;
}

// Tells where evictions of one trace, `replays`, are evaluated on different queries.
void note_other_queries(std::span<TraceReplay> replays) {
  const auto as_first = [&](const TraceReplay& replay) {
    return replay.evaluation_positions == replays.front().evaluation_positions;
  };
  if (std::ranges::all_of(replays, as_first)) return;
  std::vector<int> evictions;
  std::set<int> first;
  for (const TraceReplay& replay : replays) {
    evictions.push_back(replay.eviction_position);
    first.insert(replay.evaluation_positions.front());
  }
  const std::string note = fmt::format(
      "evictions at {} are evaluated on different queries, from {} on, so results of different evictions cannot be "
      "compared; --evaluate-from {} evaluates all of them on the same",
      fmt::join(evictions, ", "), fmt::join(first, ", "), *first.rbegin());
  for (TraceReplay& replay : replays) replay.notes.push_back(note);
}

// What putting a position into its ranks and counting inversions takes, in operations of a replay.
constexpr double kOperationsPerRank = 1000;

// The share of a memory limit that given-up buffers may hold.
constexpr Index kShareKept = 8;

// Whether one of a trace's layers has an output projection.
bool has_output_projection(const CapturedRun& trace) {
  bool has = false;
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) has |= trace.has_output_projection(layer);
  return has;
}

// Whether one of the layers tells what an error of its output has to be held against.
bool has_residual_norms(const CapturedRun& trace) {
  bool has = false;
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    const LayerInfo& of = trace.info().layers[static_cast<std::size_t>(layer)];
    has |= !of.residual_norm.empty() && trace.has_output_projection(layer);
  }
  return has;
}

// Whether what all layers change in the residual stream is known, and what its length is in the end.
bool changes_add_up(const CapturedRun& trace) {
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    if (!trace.has_output_projection(layer)) return false;
  }
  return !trace.info().layers.back().residual_norm.empty();
}

// A result of the outline: what the setting is, without numbers.
ReplayResult outline_of(const ReplaySetting& replayed, const TraceReplay& replay) {
  const Setting& setting = replayed.setting;
  ReplayResult result;
  result.trace = replay.trace;
  result.policy = setting.policy->canonical;
  result.capacity_request = setting.asked.text;
  result.capacity = setting.capacity(std::ranges::max(replay.held));
  result.most_kept = setting.most_positions(std::ranges::max(replay.held));
  result.eviction_position = replay.eviction_position;
  result.granularity = setting.granularity;
  result.share = setting.share;
  result.oracle = setting.policy->oracle;
  result.scheduled = setting.policy->schedule.has_value();
  result.rank_agreement = replayed.rank_agreement;
  result.nothing_to_choose = replayed.nothing_to_choose;
  result.kept.granularity = setting.granularity == Granularity::query ? Granularity::query : Granularity::kv;
  result.kept.sets_per_layer = replay.model.num_key_value_heads * setting.sets_per_kv_head(replay.model.group_size());
  return result;
}

// The shape of the outline's heads that hold most, for what memory they take.
HeadShape shape_of(const TraceReplay& outline) {
  const int held = std::ranges::max(outline.held);
  return {.num_layers = outline.model.num_layers,
          .num_kv_heads = outline.model.num_key_value_heads,
          .group_size = outline.model.group_size(),
          .head_dim = outline.model.head_dim,
          .prompt_length = outline.prompt_length,
          .next_position = outline.eviction_position,
          .positions = {outline.eviction_position - held, held}};
}

// What measures and rank agreement of a layer hold, in all settings.
Index memory_of_numbers(const TraceReplay& outline) {
  Index numbers = 0;
  for (const ReplayResult& result : outline.results) {
    numbers += numbers_per_layer(outline.extent(), result.rank_agreement);
  }
  return numbers * static_cast<Index>(sizeof(float));
}

std::vector<const CapturedRun*> pointers_to(std::span<const TraceReader> traces) {
  std::vector<const CapturedRun*> pointers;
  for (const TraceReader& trace : traces) pointers.push_back(&trace);
  return pointers;
}

// What a layer's changes of the residual stream hold, in all settings.
Index memory_of_changes(const TraceReplay& outline) {
  const auto settings = std::ranges::count_if(outline.results, &ReplayResult::residual_sum);
  return settings * outline.extent().queries * outline.model.hidden_size * static_cast<Index>(sizeof(float));
}

}  // namespace

ReplayEngine::ReplayEngine(std::span<const TraceReader> traces, ReplayRequest request)
    : ReplayEngine(pointers_to(traces), std::move(request)) {}

ReplayEngine::ReplayEngine(std::vector<const CapturedRun*> runs, ReplayRequest request)
    : traces_(std::move(runs)), request_(std::move(request)) {
  std::string refusal;
  for (std::size_t t = 0; t < traces_.size(); ++t) {
    const CapturedRun& trace = *traces_[t];
    const TraceInfo& info = trace.info();
    const std::string file = trace.name();
    const auto leave_out = [&](const std::string& why, const std::vector<std::string>& notes) {
      if (request_.strict) throw Error(fmt::format("{}: {}", file, why));
      if (refusal.empty()) refusal = fmt::format("{}: {}", file, why);
      for (const std::string& note : notes) left_out_.push_back({file, note});
    };
    if (const std::string why = replay_obstacle(info); !why.empty()) {
      leave_out(why, {fmt::format("left out: {}", why)});
      continue;
    }
    std::vector<int> asked = request_.eviction_positions;
    if (asked.empty()) asked.push_back(info.prompt_length);
    std::vector<int> evictions;
    for (const int eviction : asked) {
      const std::string why = eviction_obstacle(info, eviction);
      if (why.empty()) {
        evictions.push_back(eviction);
      } else {
        leave_out(why, {fmt::format("left out: {}", why)});
      }
    }
    if (evictions.empty()) continue;
    const int start = evaluation_start(info, request_, evictions);
    if (start > info.query_positions.back()) {
      const std::string why = fmt::format(
          "no query at or after position {} was captured, so there is nothing to evaluate; evaluate from an earlier "
          "position with --evaluate-from",
          start);
      leave_out(why, {fmt::format("left out: {}", why)});
      continue;
    }
    const std::string digest = trace.digest();
    const bool residual_norms = has_residual_norms(trace);
    const bool residual_sum = request_.residual_sum && changes_add_up(trace);
    const std::size_t first = outlines_.size();
    for (const int eviction : evictions) {
      TraceReplay outline = prepare(trace, {eviction, start});
      outline.trace_digest = digest;
      outline.tokens_digest = tokens_digest(std::span(info.token_ids).first(static_cast<std::size_t>(eviction)));
      LeftOut left_out;
      const std::vector<ReplaySetting> replayed = settings_for(
          trace, request_, eviction, {outline.trace_digest, outline.tokens_digest, info.model.name, info.num_tokens()},
          outline.notes, left_out);
      if (!left_out.first().empty() && (replayed.empty() || request_.strict)) {
        leave_out(left_out.first(), left_out.notes());
        continue;
      }
      std::vector<Setting> settings;
      for (const ReplaySetting& each : replayed) {
        ReplayResult& result = outline.results.emplace_back(outline_of(each, outline));
        result.residual_norms = residual_norms;
        result.residual_sum = residual_sum;
        settings.push_back(each.setting);
      }
      std::map<int, Sums>& sums = sums_.emplace_back();
      for (const int held : outline.held) {
        if (!sums.contains(held)) sums.emplace(held, sum_up(trace, outline, settings, held));
      }
      outlines_.push_back(std::move(outline));
      settings_.push_back(std::move(settings));
      trace_of_outline_.push_back(t);
    }
    note_other_queries(std::span(outlines_).subspan(first));
  }
  if (outlines_.empty()) throw Error(refusal);
}

// What settings add up to in layers that hold so many positions.
ReplayEngine::Sums ReplayEngine::sum_up(const CapturedRun& trace, const TraceReplay& outline,
                                        const std::vector<Setting>& settings, int held) {
  Sums sums{.asked = RankingRequirements(settings, held)};
  const bool has_projection = has_output_projection(trace);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    sums.capacities += setting.capacity(held);
    sums.compared += outline.results[i].rank_agreement ? 1 : 0;
    if (!setting.policy->oracle || setting.keeps_all(held)) continue;
    sums.looks_ahead = true;
    if (!setting.policy->refinement) continue;
    const RefinementShape refined{.granularity = setting.granularity,
                                  .num_kv_heads = outline.model.num_key_value_heads,
                                  .group_size = outline.model.group_size(),
                                  .head_dim = outline.model.head_dim,
                                  .hidden_size = has_projection ? outline.model.hidden_size : 0,
                                  .positions = held,
                                  .tokens = outline.evaluation_positions.back() + 1,
                                  .queries = static_cast<Index>(outline.evaluation_positions.size())};
    sums.refining += setting.policy->refinement->operations(refined);
    sums.refining_bytes = std::max(sums.refining_bytes, setting.policy->refinement->memory(refined));
  }
  const HeadShape shape = shape_of(outline);
  const Index tokens = outline.evaluation_positions.back() + 1;
  sums.layer_bytes =
      LayerDecision::memory_of_layer(shape, settings) + memory_of_numbers(outline) + memory_of_changes(outline) +
      static_cast<Index>(settings.size() * (sizeof(LayerResult) + measures().size() * sizeof(std::vector<float>)));
  for (const ReplayResult& result : outline.results) {
    sums.layer_bytes += result.kept.sets_per_layer * static_cast<Index>(sizeof(Residency));
  }
  sums.setting_bytes = LayerDecision::memory_of_setting(shape, settings);
  sums.head_bytes = LayerDecision::memory_of_head(shape, sums.asked, outline.model.hidden_size, tokens) +
                    TraceLayer::memory_of_head(trace, outline.eviction_position);
  if (sums.compared > 0) {
    sums.layer_bytes += LayerRankAgreement::memory_of_layer(shape, settings);
    sums.head_bytes += LayerRankAgreement::memory_of_head(shape, tokens);
    if (sums.setting_bytes > 0) sums.setting_bytes += LayerRankAgreement::memory_of_setting(shape);
  }
  const Index all_tokens = trace.info().num_tokens();
  Index caches = 0;  // of all settings, while they are decoded together
  for (const Setting& setting : settings) {
    if (!setting.policy->schedule) continue;
    const Index heads = setting.is_local() ? 1 : outline.model.num_key_value_heads;
    const Index sets = setting.sets_per_kv_head(outline.model.group_size());
    // Of every position when it was seen last; masks tell of gaps as well.
    const Index told = all_tokens * (setting.policy->masks ? 8 : 2) * static_cast<Index>(sizeof(int));
    sums.layer_bytes += outline.model.num_key_value_heads * sets * told;
    caches += heads * sets * 2 * told;
    const Index looking_ahead =
        setting.policy->oracle
            ? look_ahead_memory(shape, tokens, static_cast<Index>(outline.evaluation_positions.size()), heads)
            : 0;
    sums.decoding_bytes =
        std::max(sums.decoding_bytes, decoding_memory(shape, all_tokens, heads) + looking_ahead + sums.head_bytes);
    if (setting.policy->row_positions != RowPositions::reindexed) continue;
    sums.layer_bytes += (all_tokens - outline.eviction_position) * outline.model.num_attention_heads *
                        outline.model.head_dim * static_cast<Index>(sizeof(float));
  }
  if (sums.decoding_bytes > 0) sums.decoding_bytes += caches;
  sums.least_combinations = LayerDecision::least_combination_bytes(shape, sums.asked);
  sums.all_combinations = LayerDecision::all_combination_bytes(shape, sums.asked);
  return sums;
}

bool ReplayEngine::surveys(int replay) const {
  const std::vector<Setting>& settings = settings_[static_cast<std::size_t>(replay)];
  return std::ranges::any_of(settings,
                             [](const Setting& s) { return s.policy->budget && s.policy->budget->surveys(); });
}

std::vector<LayerSurvey> ReplayEngine::survey(const ReplayUnit& unit) const {
  const auto replay = static_cast<std::size_t>(unit.replay);
  const Plan plan = plan_for(memory_limit_);
  const int kv_heads = outlines_[replay].model.num_key_value_heads;
  const TraceLayer layer(trace_of(unit), unit.layer, outlines_[replay].eviction());
  const LayerDecision decision(layer, settings_[replay], sums_of(unit).asked, plan.combination_bytes);
  std::vector<LayerSurvey> surveys(settings_[replay].size(), LayerSurvey(static_cast<std::size_t>(kv_heads)));
  parallel_for(
      kv_heads,
      [&](int kv_head) {
        std::vector<std::vector<float>> found = decision.survey_head(kv_head);
        for (std::size_t s = 0; s < found.size(); ++s)
          surveys[s][static_cast<std::size_t>(kv_head)] = std::move(found[s]);
      },
      plan.heads_at_once);
  return surveys;
}

void ReplayEngine::give_surveys(int replay, const std::vector<std::vector<LayerSurvey>>& layers) const {
  AlikeSurveys& surveys = surveys_[replay];
  surveys.clear();
  const std::vector<int>& held = outlines_[static_cast<std::size_t>(replay)].held;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    std::vector<std::vector<LayerSurvey>>& alike = surveys[held[layer]];
    alike.resize(layers[layer].size());
    for (std::size_t s = 0; s < alike.size(); ++s) alike[s].push_back(layers[layer][s]);
  }
}

// Of every setting, what is known of the layers that hold as much as a unit's; none where nothing is.
std::vector<std::span<const LayerSurvey>> ReplayEngine::surveys_of(const ReplayUnit& unit) const {
  const auto found = surveys_.find(unit.replay);
  if (found == surveys_.end()) return {};
  const int held = outlines_[static_cast<std::size_t>(unit.replay)].held[static_cast<std::size_t>(unit.layer)];
  const std::vector<std::vector<LayerSurvey>>& surveys = found->second.at(held);
  return {surveys.begin(), surveys.end()};
}

// What was not given is found out here.
void ReplayEngine::complete_surveys(std::span<const ReplayUnit> units) const {
  for (const ReplayUnit& unit : units) {
    if (!surveys(unit.replay) || surveys_.contains(unit.replay)) continue;
    std::vector<std::vector<LayerSurvey>> layers;
    const int num_layers = outlines_[static_cast<std::size_t>(unit.replay)].model.num_layers;
    for (int layer = 0; layer < num_layers; ++layer) layers.push_back(survey({unit.replay, layer}));
    give_surveys(unit.replay, layers);
  }
}

// Settings that keep the same in all layers: once for all units of an outline, KV head by KV head or all together.
void ReplayEngine::complete_decodings(std::span<const ReplayUnit> units, const Plan& plan) const {
  for (const ReplayUnit& unit : units) {
    if (across_layers_.contains(unit.replay)) continue;
    const auto replay = static_cast<std::size_t>(unit.replay);
    const int num_kv_heads = outlines_[replay].model.num_key_value_heads;
    std::map<std::size_t, std::vector<CacheHistory>> found;
    for (const Granularity granularity : {Granularity::kv, Granularity::layer}) {
      std::vector<std::size_t> indices;
      std::vector<Setting> settings;
      for (std::size_t s = 0; s < settings_[replay].size(); ++s) {
        const Setting& setting = settings_[replay][s];
        if (!setting.policy->across_layers || setting.granularity != granularity) continue;
        indices.push_back(s);
        settings.push_back(setting);
        found[s].resize(static_cast<std::size_t>(num_kv_heads));
      }
      if (settings.empty()) continue;
      const bool apart = granularity == Granularity::kv;
      parallel_for(
          apart ? num_kv_heads : 1,
          [&](int first) {
            std::vector<int> kv_heads(apart ? 1 : static_cast<std::size_t>(num_kv_heads));
            std::iota(kv_heads.begin(), kv_heads.end(), first);
            const std::vector<CacheHistory> kept = decode_across_layers(trace_of(unit), outlines_[replay].eviction(),
                                                                        settings, kv_heads, plan.combination_bytes);
            for (std::size_t i = 0; i < indices.size(); ++i) {
              for (const int kv_head : kv_heads) found.at(indices[i])[static_cast<std::size_t>(kv_head)] = kept[i];
            }
          },
          plan.heads_at_once);
    }
    across_layers_.emplace(unit.replay, std::move(found));
  }
}

std::vector<ReplayUnit> ReplayEngine::units() const {
  std::vector<ReplayUnit> units;
  std::vector<bool> listed(outlines_.size(), false);
  for (std::size_t first = 0; first < outlines_.size(); ++first) {
    if (listed[first]) continue;
    std::vector<int> together;
    for (std::size_t r = first; r < outlines_.size(); ++r) {
      if (listed[r] || (r != first && !share_projections(first, r))) continue;
      listed[r] = true;
      together.push_back(static_cast<int>(r));
    }
    for (int layer = 0; layer < outlines_[first].model.num_layers; ++layer) {
      for (const int replay : together) units.push_back({replay, layer});
    }
  }
  return units;
}

Work ReplayEngine::cost(const ReplayUnit& unit) const {
  const auto replay = static_cast<std::size_t>(unit.replay);
  const TraceReplay& outline = outlines_[replay];
  const ModelInfo& model = outline.model;
  const CapturedRun& trace = trace_of(unit);
  const int held = outline.held[static_cast<std::size_t>(unit.layer)];
  const double prompt = held;
  const double tokens = outline.evaluation_positions.back() + 1;
  const double heads = model.num_attention_heads;
  const double head_dim = model.head_dim;
  const auto queries = static_cast<double>(outline.evaluation_positions.size());
  const auto stored = static_cast<double>(size_of(trace.element_type()));
  const double weight = trace.has_output_projection(unit.layer) ? heads * head_dim * model.hidden_size : 0;

  // Ranking: logits of the window, then per combination its attention, its output and the distances from it.
  const Sums& sums = sums_of(unit);
  const RankingRequirements& asked = sums.asked;
  const auto combinations = static_cast<double>(asked.combinations.size());
  const auto with_distance = static_cast<double>(asked.with_distance);
  Work work;
  work.bytes = model.num_key_value_heads * prompt * head_dim * stored * (with_distance > 0 ? 3 : 1);
  work.operations = 2 * heads * prompt * asked.window * (head_dim + combinations);
  work.operations += 4 * heads * prompt * head_dim * with_distance;
  if (needs_projection(unit)) {
    work.bytes += weight * stored;
    work.operations += weight * head_dim + heads * prompt * head_dim * head_dim;
  }

  // Oracles and rank agreement: attention of the evaluation queries, then both orders and the inversions between them.
  if (sums.compared > 0 || sums.looks_ahead) {
    const bool by_query = settings_[replay].front().granularity == Granularity::query;
    const double rows = by_query ? heads : model.num_key_value_heads;
    work.bytes += heads * tokens * head_dim * stored;
    work.operations += 2 * heads * queries * tokens * head_dim;
    work.operations += sums.compared * rows * prompt * kOperationsPerRank;
  }
  work.operations += sums.refining;

  // Measures: full attention of the evaluation queries, then per setting what is kept, and the projection of the
  // difference.
  work.bytes += (2 * model.num_key_value_heads * tokens + heads * queries) * head_dim * stored + weight * stored;
  work.operations += 4 * heads * queries * tokens * head_dim;
  const auto settings = static_cast<double>(settings_[replay].size());
  work.operations += 2 * heads * queries * head_dim * sums.capacities + 2 * queries * weight * settings;
  return work;
}

ReplayEngine::Plan ReplayEngine::plan_for(Index limit) const {
  const int threads = omp_get_max_threads();
  const Index used = limit - limit / kShareKept;
  Plan plan;
  // Fewer layers at once cost little; fewer heads leave threads idle.
  for (int heads = threads; heads >= 1; --heads) {
    for (const int rounds : {8, 2, 1}) {
      plan = plan_of(heads, rounds, used);
      if (plan.fits) return plan;
    }
  }
  return plan;
}

// The division of work with so many heads at once and so many rounds of them in a group; a limit of 0 is none.
ReplayEngine::Plan ReplayEngine::plan_of(int heads_at_once, int rounds, Index limit) const {
  constexpr Index kCombinations = Index{256} << 20;
  constexpr Index kDifferences = Index{512} << 20;
  constexpr Index kRefining = Index{2} << 30;
  Plan plan{.heads_at_once = heads_at_once,
            .rounds = rounds,
            .combination_bytes = kCombinations,
            .settings_at_once = std::numeric_limits<Index>::max(),
            .layers_apart = heads_at_once};
  for (std::size_t r = 0; r < outlines_.size(); ++r) {
    const TraceReplay& outline = outlines_[r];
    const Sums& sums = sums_[r].rbegin()->second;  // of the layers that hold most
    const auto queries = static_cast<Index>(outline.evaluation_positions.size());
    const auto count = static_cast<Index>(settings_[r].size());
    const Index width = Index{outline.model.num_attention_heads} * outline.model.head_dim;
    const std::vector<ReplayUnit> layers(static_cast<std::size_t>(outline.model.num_layers),
                                         ReplayUnit{static_cast<int>(r), 0});
    const Index projections = sums.asked.projected_distance ? LayerProjection::memory(outline.model) : 0;
    const bool over_time = std::ranges::any_of(outline.results, &ReplayResult::scheduled);
    const Index evaluated = HeadEvaluation::memory(outline.model, outline.evaluation_positions.back() + 1, over_time);
    const Index setting = LayerMeasurement::memory_per_setting(outline.model, queries, outline.extent().spans,
                                                               outline.results.front().residual_sum, over_time);
    auto layers_at_once = static_cast<Index>(units_at_once(layers, plan));
    Index waiting = 0;  // layers that are done and not handed out
    if (sums.refining > 0) {
      const Index least = sums.refining_bytes + 2 * (sums.layer_bytes + setting) + projections +
                          LayerMeasurement::memory(outline.model) + evaluated;
      const Index most = limit > 0 ? limit / least : kRefining / sums.refining_bytes;
      const Index apart = std::clamp<Index>(most, 1, heads_at_once);
      plan.layers_apart = std::min(plan.layers_apart, static_cast<int>(apart));
      const bool everywhere = std::ranges::all_of(sums_[r], [](const auto& of) { return of.second.refining > 0; });
      layers_at_once = everywhere ? apart : std::max(apart, layers_at_once);
      waiting = apart - 1;
    }
    const Index unit = layers_at_once * (sums.layer_bytes + projections) + waiting * sums.layer_bytes;
    const auto take = [&plan, limit](Index bytes) {
      plan.memory = std::max(plan.memory, bytes);
      plan.fits = plan.fits && (limit == 0 || bytes <= limit);
    };

    // Heads that are ranked, then settings that are put together.
    Index combinations = std::min(std::max(sums.least_combinations, kCombinations), sums.all_combinations);
    if (limit > 0) combinations = std::min(combinations, (limit - unit) / plan.heads_at_once - sums.head_bytes);
    combinations = std::max(combinations, sums.least_combinations);
    plan.combination_bytes = std::min(plan.combination_bytes, combinations);
    const Index projected = kProjectionSlice * (width + kernels::kPanel) * static_cast<Index>(sizeof(float));
    take(unit + plan.heads_at_once * std::max({sums.head_bytes + combinations, projected, sums.setting_bytes}));
    if (sums.decoding_bytes > 0) take(unit + plan.heads_at_once * (sums.decoding_bytes + combinations));

    // Measures, which refining takes in between.
    const Index fixed = unit + (waiting + 1) * sums.refining_bytes +
                        plan.heads_at_once * std::max(evaluated, projected) +
                        layers_at_once * (setting + LayerMeasurement::memory(outline.model));
    Index at_once = std::clamp<Index>(kDifferences / (layers_at_once * setting), 1, count);
    if (limit > 0) at_once = std::min(at_once, (limit - fixed) / (layers_at_once * setting));
    at_once = std::max<Index>(at_once, 1);
    plan.settings_at_once = std::min(plan.settings_at_once, at_once);
    take(fixed + layers_at_once * at_once * setting);
  }
  return plan;
}

Index ReplayEngine::memory() const {
  const Index memory = plan_for(memory_limit_).memory;
  // What one stage gave up may stand beside what the next one takes.
  return memory + std::min(memory, memory_limit_ > 0 ? memory_limit_ / kShareKept : kBuffersKept);
}

Index ReplayEngine::least_memory() const {
  const Index memory = plan_of(1, 1, 1).memory;
  // The share of what was given up on top, rounded up.
  return memory + (memory - 1) / (kShareKept - 1) + 1;
}

void ReplayEngine::limit_memory(Index bytes) {
  if (!plan_for(bytes).fits) {
    throw Error(
        fmt::format("{} of memory are too little: one head at a time takes {}; give --memory as much, or replay "
                    "fewer settings at once",
                    size_text(bytes), enough_text(least_memory())));
  }
  memory_limit_ = bytes;
  // What one stage gives up must not stand beside what the next one takes.
  Buffer::keep_at_most(bytes / kShareKept);
}

const ReplayEngine::Sums& ReplayEngine::sums_of(const ReplayUnit& unit) const {
  const auto replay = static_cast<std::size_t>(unit.replay);
  return sums_[replay].at(outlines_[replay].held[static_cast<std::size_t>(unit.layer)]);
}

bool ReplayEngine::needs_projection(const ReplayUnit& unit) const {
  return sums_of(unit).asked.projected_distance && trace_of(unit).has_output_projection(unit.layer);
}

// Whether projections of two outlines could be the same: then it pays to look.
bool ReplayEngine::may_share_projections(std::size_t replay, std::size_t other) const {
  const auto shape = [&](std::size_t r) {
    const ModelInfo& model = outlines_[r].model;
    return std::tuple(model.num_layers, model.num_attention_heads, model.head_dim, model.hidden_size);
  };
  const auto is_asked = [&](std::size_t r) {
    return std::ranges::any_of(sums_[r], [](const auto& of) { return of.second.asked.projected_distance; });
  };
  return shape(replay) == shape(other) && is_asked(replay) && is_asked(other);
}

// Whether the same is calculated of all their projections.
bool ReplayEngine::share_projections(std::size_t replay, std::size_t other) const {
  if (!may_share_projections(replay, other)) return false;
  for (int layer = 0; layer < outlines_[replay].model.num_layers; ++layer) {
    const ReplayUnit one{static_cast<int>(replay), layer};
    const ReplayUnit another{static_cast<int>(other), layer};
    if (needs_projection(one) != needs_projection(another)) return false;
    if (needs_projection(one) && projection_key(one) != projection_key(another)) return false;
  }
  return true;
}

// Equal for units that need the same factors.
std::string ReplayEngine::projection_key(const ReplayUnit& unit) const {
  const auto replay = static_cast<std::size_t>(unit.replay);
  const std::size_t trace = trace_of_outline_[replay];
  const auto could_be_shared = [&](std::size_t other) {
    return trace_of_outline_[other] != trace && may_share_projections(replay, other);
  };
  const auto [found, is_new] = projection_digests_.try_emplace({trace, unit.layer});
  if (is_new) {
    // Where no other trace has such a projection nobody has to read it for its digest.
    bool shared = false;
    for (std::size_t other = 0; other < outlines_.size() && !shared; ++other) shared = could_be_shared(other);
    std::string digest = shared ? traces_[trace]->projection_digest(unit.layer) : "";
    found->second = digest.empty() ? fmt::format("layer {} of trace {}", unit.layer, trace) : std::move(digest);
  }
  return found->second;
}

const CapturedRun& ReplayEngine::trace_of(const ReplayUnit& unit) const {
  return *traces_[trace_of_outline_[static_cast<std::size_t>(unit.replay)]];
}

// The fewest units whose heads keep all threads busy to the end, or nearly: enough rounds of them that a thread which
// is late matters little, and hardly one that is not full.
std::size_t ReplayEngine::units_at_once(std::span<const ReplayUnit> units, const Plan& plan) const {
  constexpr double kBusyEnough = 0.95;
  const auto at_once = static_cast<std::size_t>(plan.heads_at_once);
  std::size_t heads = 0;
  std::size_t count = 0;
  while (count < units.size()) {
    const TraceReplay& outline = outlines_[static_cast<std::size_t>(units[count].replay)];
    heads += static_cast<std::size_t>(outline.model.num_key_value_heads);
    ++count;
    const std::size_t rounds = (heads + at_once - 1) / at_once;
    const bool full = static_cast<double>(heads) >= kBusyEnough * static_cast<double>(rounds * at_once);
    if (rounds >= static_cast<std::size_t>(plan.rounds) && full) break;
  }
  return count;
}

// Takes the units group by group and hands out, in their order, what work(group, plan, known) makes of each. Refining
// kept sets takes much longer than all else in a layer and goes through it head by head: layers with it are groups of
// their own, each on one thread.
template <class Work, class Done>
void ReplayEngine::for_each_group(std::span<const ReplayUnit> units, const Work& work, const Done& done) const {
  const Plan plan = plan_for(memory_limit_);
  complete_surveys(units);
  complete_decodings(units, plan);
  Projections known;
  const auto hand_out = [&](std::span<const ReplayUnit> group, auto results) {
    for (std::size_t i = 0; i < group.size(); ++i) done(group[i], std::move(results[i]));
    if (memory_limit_ > 0) trim_memory();
  };
  while (!units.empty()) {
    const bool refining = refines(units.front());
    const auto end = std::ranges::find_if(units, [&](const ReplayUnit& u) { return refines(u) != refining; });
    std::span<const ReplayUnit> alike = units.first(static_cast<std::size_t>(end - units.begin()));
    units = units.subspan(alike.size());
    if (refining) {
      known.clear();
      Plan apart = plan;
      apart.layers_apart = std::min(plan.layers_apart, static_cast<int>(alike.size()));
      apart.heads_at_once = plan.heads_at_once / apart.layers_apart;
      const auto group = [alike](int i) { return alike.subspan(static_cast<std::size_t>(i), 1); };
      parallel_in_order(
          static_cast<int>(alike.size()),
          [&](int i) {
            Projections own;
            return work(group(i), apart, own);
          },
          [&](int i, auto results) { hand_out(group(i), std::move(results)); }, apart.layers_apart);
      continue;
    }
    while (!alike.empty()) {
      const std::span<const ReplayUnit> group = alike.first(units_at_once(alike, plan));
      alike = alike.subspan(group.size());
      hand_out(group, work(group, plan, known));
    }
  }
}

void ReplayEngine::run(std::span<const ReplayUnit> units,
                       const std::function<void(const ReplayUnit&, std::vector<LayerResult>)>& done) const {
  for_each_group(
      units,
      [this](std::span<const ReplayUnit> group, const Plan& plan, Projections& known) {
        std::vector<std::vector<LayerResult>> results =
            decide_group(group, plan, known, LayerDecoding::Outputs::untold);
        measure_group(group, plan, results);
        return results;
      },
      done);
}

void ReplayEngine::decide(std::span<const ReplayUnit> units,
                          const std::function<void(const ReplayUnit&, std::vector<LayerResidencies>)>& done) const {
  for_each_group(
      units,
      [this](std::span<const ReplayUnit> group, const Plan& plan, Projections& known) {
        return decide_group(group, plan, known, LayerDecoding::Outputs::none);
      },
      [&done](const ReplayUnit& unit, std::vector<LayerResult> results) {
        std::vector<LayerResidencies> kept;
        for (LayerResult& result : results) kept.push_back(std::move(result.kept));
        results.clear();
        done(unit, std::move(kept));
      });
}

// Calls work(index, piece) for pieces_of(index) pieces of every one of `count`, spread over threads.
template <class Pieces, class Work>
void ReplayEngine::for_each_piece(std::size_t count, const Plan& plan, const Pieces& pieces_of, const Work& work) {
  std::vector<std::pair<std::size_t, int>> pieces;
  for (std::size_t i = 0; i < count; ++i) {
    for (int piece = 0; piece < static_cast<int>(pieces_of(i)); ++piece) pieces.emplace_back(i, piece);
  }
  parallel_for(
      static_cast<int>(pieces.size()),
      [&](int p) { work(pieces[static_cast<std::size_t>(p)].first, pieces[static_cast<std::size_t>(p)].second); },
      plan.heads_at_once);
}

// The factors that each unit needs: computed, or of the units before. `known` holds these alone afterwards, so that
// those that nobody needs any more are given up before others take their place.
std::vector<std::shared_ptr<LayerProjection>> ReplayEngine::projections_of(std::span<const ReplayUnit> group,
                                                                           const Plan& plan, Projections& known) const {
  Projections used;
  std::vector<std::pair<LayerProjection*, const ModelInfo*>> missing;
  std::vector<std::shared_ptr<LayerProjection>> projections(group.size());
  for (std::size_t i = 0; i < group.size(); ++i) {
    if (!needs_projection(group[i])) continue;
    const std::string key = projection_key(group[i]);
    const auto [found, is_new] = used.try_emplace(key);
    if (is_new) {
      const auto before = known.find(key);
      if (before != known.end()) {
        found->second = before->second;
      } else {
        found->second = std::make_shared<LayerProjection>(trace_of(group[i]), group[i].layer);
        missing.emplace_back(found->second.get(), &trace_of(group[i]).info().model);
      }
    }
    projections[i] = found->second;
  }
  known = std::move(used);
  for_each_piece(
      missing.size(), plan, [&](std::size_t i) { return projection_slices(*missing[i].second); },
      [&](std::size_t i, int slice) { missing[i].first->read_slice(slice); });
  for_each_piece(
      missing.size(), plan, [&](std::size_t i) { return missing[i].second->num_attention_heads; },
      [&](std::size_t i, int head) { missing[i].first->decompose(head); });
  for (const auto& [projection, model] : missing) projection->finish();
  return projections;
}

// Kept sets and rank agreement; what the kept sets do is left open.
std::vector<std::vector<LayerResult>> ReplayEngine::decide_group(std::span<const ReplayUnit> group, const Plan& plan,
                                                                 Projections& known,
                                                                 LayerDecoding::Outputs outputs) const {
  const auto outline = [&](std::size_t i) -> const TraceReplay& {
    return outlines_[static_cast<std::size_t>(group[i].replay)];
  };
  const auto settings = [&](std::size_t i) -> const std::vector<Setting>& {
    return settings_[static_cast<std::size_t>(group[i].replay)];
  };
  const std::vector<std::shared_ptr<LayerProjection>> projections = projections_of(group, plan, known);

  std::vector<std::unique_ptr<TraceLayer>> layers;
  std::vector<std::unique_ptr<LayerRankAgreement>> agreements(group.size());
  std::vector<LayerDecision> decisions;
  for (std::size_t i = 0; i < group.size(); ++i) {
    layers.push_back(std::make_unique<TraceLayer>(trace_of(group[i]), group[i].layer, outline(i).eviction(),
                                                  projections[i].get(), surveys_of(group[i])));
    if (sums_of(group[i]).compared > 0) {
      std::vector<bool> is_compared;
      for (const ReplayResult& result : outline(i).results) is_compared.push_back(result.rank_agreement);
      agreements[i] = std::make_unique<LayerRankAgreement>(settings(i), std::move(is_compared), layers[i]->shape());
    }
    decisions.emplace_back(*layers[i], settings(i), sums_of(group[i]).asked, plan.combination_bytes,
                           agreements[i].get());
  }
  for_each_piece(
      group.size(), plan, [&](std::size_t i) { return outline(i).model.num_key_value_heads; },
      [&](std::size_t i, int head) {
        // Read ahead: this head's values while its keys are worked on, and the keys of the next.
        trace_of(group[i]).prefetch(group[i].layer, HeadTensor::values, head);
        if (head + 1 < outline(i).model.num_key_value_heads) {
          trace_of(group[i]).prefetch(group[i].layer, HeadTensor::keys, head + 1);
        }
        decisions[i].decide_head(head);
      });
  for_each_piece(
      group.size(), plan, [&](std::size_t i) { return settings(i).size(); },
      [&](std::size_t i, int setting) { decisions[i].decide_together(setting); });
  std::vector<std::vector<LayerResult>> results;
  for (std::size_t i = 0; i < group.size(); ++i) {
    std::vector<LayerSets> kept = decisions[i].take();
    std::vector<LayerResult>& of_layer = results.emplace_back(kept.size());
    for (std::size_t s = 0; s < kept.size(); ++s)
      of_layer[s].kept.assign(std::move_iterator(kept[s].begin()), std::move_iterator(kept[s].end()));
    if (agreements[i]) {
      std::vector<LayerNumbers> found = agreements[i]->take();
      for (std::size_t s = 0; s < of_layer.size(); ++s) of_layer[s].measures = std::move(found[s]);
    }
    refine_sets(trace_of(group[i]), *layers[i], outline(i).eviction(), settings(i), results.back(),
                plan.settings_at_once, plan.heads_at_once);
  }
  if (outputs == LayerDecoding::Outputs::none && request_.layer_by_layer) {
    for (std::size_t i = 0; i < group.size(); ++i) {
      for (std::size_t s = 0; s < settings(i).size(); ++s) {
        if (settings(i)[s].policy->schedule) results[i][s].kept.clear();
      }
    }
    return results;
  }
  decode_group(group, plan, projections, outputs, results);
  return results;
}

// The settings with a schedule, other than those that keep the same in all layers: those whose heads do not depend on
// each other head by head, the others layer by layer.
void ReplayEngine::decode_group(std::span<const ReplayUnit> group, const Plan& plan,
                                const std::vector<std::shared_ptr<LayerProjection>>& projections,
                                LayerDecoding::Outputs outputs, std::vector<std::vector<LayerResult>>& results) const {
  struct Piece {
    std::size_t unit;
    std::vector<int> kv_heads;
    std::vector<std::size_t> indices;  // of the settings
    std::vector<Setting> settings;
  };
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < group.size(); ++i) {
    const std::vector<Setting>& settings = settings_[static_cast<std::size_t>(group[i].replay)];
    const int kv_heads = outlines_[static_cast<std::size_t>(group[i].replay)].model.num_key_value_heads;
    Piece together{.unit = i, .kv_heads = {}, .indices = {}, .settings = {}};
    Piece apart = together;
    for (std::size_t s = 0; s < settings.size(); ++s) {
      if (!settings[s].policy->schedule) continue;
      if (settings[s].policy->across_layers) {
        const int prompt = outlines_[static_cast<std::size_t>(group[i].replay)].eviction_position;
        LayerResidencies& kept = results[i][s].kept;
        for (std::size_t set = 0; set < kept.size(); ++set) {
          const CacheHistory& history = across_layers_.at(group[i].replay).at(s)[set];
          kept[set] = Residency(history.positions, history.until, prompt, history.from);
        }
        continue;
      }
      Piece& piece = settings[s].is_local() ? apart : together;
      piece.indices.push_back(s);
      piece.settings.push_back(settings[s]);
    }
    for (int head = 0; head < kv_heads; ++head) {
      together.kv_heads.push_back(head);
      if (apart.indices.empty()) continue;
      apart.kv_heads = {head};
      pieces.push_back(apart);
    }
    if (!together.indices.empty()) pieces.push_back(std::move(together));
  }
  for (const Piece& piece : pieces) {
    const ReplayUnit& unit = group[piece.unit];
    const TraceReplay& outline = outlines_[static_cast<std::size_t>(unit.replay)];
    for (std::size_t i = 0; i < piece.settings.size(); ++i) {
      if (outputs == LayerDecoding::Outputs::none) continue;
      if (piece.settings[i].policy->row_positions != RowPositions::reindexed) continue;
      results[piece.unit][piece.indices[i]].outputs.resize(
          trace_of(unit).info().num_tokens() - outline.eviction_position,
          Index{outline.model.num_attention_heads} * outline.model.head_dim);
    }
  }
  parallel_for(
      static_cast<int>(pieces.size()),
      [&](int p) {
        const Piece& piece = pieces[static_cast<std::size_t>(p)];
        const ReplayUnit& unit = group[piece.unit];
        const TraceReplay& outline = outlines_[static_cast<std::size_t>(unit.replay)];
        std::vector<std::span<const LayerSurvey>> surveys;
        const std::vector<std::span<const LayerSurvey>> of_layer = surveys_of(unit);
        for (const std::size_t s : piece.indices) {
          surveys.push_back(of_layer.empty() ? std::span<const LayerSurvey>() : of_layer[s]);
        }
        const TraceLayer prompt(trace_of(unit), unit.layer, outline.eviction(), projections[piece.unit].get(),
                                std::move(surveys));
        std::vector<DecodedSetting> decoded = decode_layer(trace_of(unit), prompt, outline.eviction(), piece.settings,
                                                           piece.kv_heads, plan.combination_bytes, outputs);
        for (std::size_t i = 0; i < decoded.size(); ++i) {
          LayerResult& result = results[piece.unit][piece.indices[i]];
          const Index sets = static_cast<Index>(decoded[i].sets.size()) / outline.model.num_key_value_heads;
          const Index width = Index{outline.model.group_size()} * outline.model.head_dim;
          for (Index place = 0; place < std::ssize(piece.kv_heads); ++place) {
            const int head = piece.kv_heads[static_cast<std::size_t>(place)];
            for (Index set = head * sets; set < (head + 1) * sets; ++set) {
              const CacheHistory& history = decoded[i].sets[static_cast<std::size_t>(set)];
              result.kept[static_cast<std::size_t>(set)] =
                  Residency(history.positions, history.until, outline.eviction_position, history.from);
            }
            if (decoded[i].outputs.size() == 0) continue;
            result.outputs.middleCols(head * width, width) = decoded[i].outputs.middleCols(place * width, width);
          }
        }
      },
      plan.heads_at_once);
}

void ReplayEngine::measure_group(std::span<const ReplayUnit> group, const Plan& plan,
                                 std::vector<std::vector<LayerResult>>& results) const {
  const auto outline = [&](std::size_t i) -> const TraceReplay& {
    return outlines_[static_cast<std::size_t>(group[i].replay)];
  };
  std::size_t most = 0;
  for (const std::vector<LayerResult>& settings : results) most = std::max(most, settings.size());
  const auto step = static_cast<std::size_t>(plan.settings_at_once);
  for (std::size_t first = 0; first < most; first += step) {
    std::vector<LayerMeasurement> measurements;
    for (std::size_t i = 0; i < group.size(); ++i) {
      std::vector<const LayerResidencies*> sets;
      std::vector<const Matrix*> outputs;
      std::vector<bool> over_time;
      for (std::size_t s = first; s < std::min(results[i].size(), first + step); ++s) {
        sets.push_back(&results[i][s].kept);
        outputs.push_back(results[i][s].outputs.size() > 0 ? &results[i][s].outputs : nullptr);
        over_time.push_back(outline(i).results[s].scheduled);
      }
      measurements.emplace_back(trace_of(group[i]), group[i].layer, outline(i).eviction(), outline(i).spans, sets,
                                outline(i).results.front().residual_sum, outputs, over_time);
    }
    const auto is_open = [&](std::size_t i) { return results[i].size() > first; };
    for_each_piece(
        group.size(), plan, [&](std::size_t i) { return is_open(i) ? outline(i).model.num_key_value_heads : 0; },
        [&](std::size_t i, int head) { measurements[i].measure_head(head); });
    for_each_piece(
        group.size(), plan, [&](std::size_t i) { return is_open(i) ? measurements[i].panels() : 0; },
        [&](std::size_t i, int panel) { measurements[i].lay_out_panel(panel); });
    for_each_piece(
        group.size(), plan, [&](std::size_t i) { return is_open(i) ? measurements[i].slices() : 0; },
        [&](std::size_t i, int slice) { measurements[i].project_slice(slice); });
    for (std::size_t i = 0; i < group.size(); ++i) {
      if (!is_open(i)) continue;
      std::vector<LayerMeasures> found = measurements[i].take();
      for (std::size_t m = 0; m < found.size(); ++m) {
        LayerResult& result = results[i][first + m];
        result.output_error = found[m].output_error;
        result.change = std::move(found[m].change);
        result.outputs.resize(0, 0);
        for (const MeasureTraits& measure : measures()) {
          if (measure.per == MeasureTraits::Per::head) continue;
          result.measures[measure.measure] = std::move(found[m].numbers[measure.measure]);
        }
      }
    }
  }
}

}  // namespace kvreplay
