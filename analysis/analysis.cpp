#include "analysis/analysis.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "analysis/reference.h"
#include "analysis/spec_structure.h"
#include "base/error.h"
#include "base/printable.h"
#include "trace/identity.h"

namespace kvreplay {
namespace {

bool is_usual(const std::string& policy) { return baseline_of(policy) == Method::Baseline::usual; }

// A result is told apart from what keeps everything and from what looks ahead.
bool is_candidate(const ComparisonRow& row) { return !row.oracle && row.key.capacity_request != kAllPositions; }

// Settings that had nothing to choose.
void note_nothing_to_choose(const std::vector<ComparisonRow>& rows, std::vector<std::string>& notes) {
  const auto count = std::ranges::count_if(rows, &ComparisonRow::nothing_to_choose);
  if (count == 0) return;
  const auto first = std::ranges::find_if(rows, &ComparisonRow::nothing_to_choose);
  notes.push_back(fmt::format(
      "{} at {}{} nothing to choose, since all of the capacity is kept whatever the scores: shown (marked †), and left "
      "out of findings, of what parameters change, and of the goal",
      printable(first->key.policy), printable(first->key.capacity_request),
      count == 1 ? " had" : fmt::format(" and {} more setting{} had", count - 1, count == 2 ? "" : "s")));
}

// The baseline's mean at the middle one of its capacities, as its curve has it.
std::optional<double> chosen_goal(const std::vector<CapacityCurve>& curves, const std::string& baseline) {
  const auto found = std::ranges::find(curves, baseline, &CapacityCurve::policy);
  if (found == curves.end()) return std::nullopt;
  // Where nothing is evicted there is nothing to reach.
  std::vector<double> means;
  for (const CapacityPoint& point : found->points) {
    if (point.kept_share < 1 && !point.nothing_to_choose) means.push_back(point.mean);
  }
  if (means.empty()) return std::nullopt;
  return means[means.size() / 2];
}

// The oracle with the best mean over the capacities that all of those have which have the most. Policies are compared
// with it over what both were replayed on, so an oracle of other traces than the policies serves where no other does.
std::string best_oracle(const std::vector<ComparisonRow>& rows, const std::vector<SettingKey>& apart,
                        bool lower_is_better) {
  const auto is_apart = [&apart](const ComparisonRow& row) { return contains(apart, row.key.setting()); };
  const auto is_among_policies = [&](const ComparisonRow& row) { return row.oracle && !is_apart(row); };
  const bool any_is_among_policies = std::ranges::any_of(rows, is_among_policies);
  std::map<std::string, std::map<std::string, double>> oracles;  // means by capacity
  std::size_t most = 0;
  for (const ComparisonRow& row : rows) {
    if (!row.oracle || (any_is_among_policies && is_apart(row))) continue;
    std::map<std::string, double>& means = oracles[row.key.policy];
    means[row.key.capacity_request] = row.distribution.mean * (lower_is_better ? 1 : -1);
    most = std::max(most, means.size());
  }
  std::erase_if(oracles, [most](const auto& entry) { return entry.second.size() < most; });
  std::string best;
  double best_mean = std::numeric_limits<double>::infinity();
  for (const auto& [policy, means] : oracles) {
    double sum = 0;
    int common = 0;
    for (const auto& [capacity, mean] : means) {
      const auto has_it = [&at = capacity](const auto& entry) { return entry.second.contains(at); };
      if (!std::ranges::all_of(oracles, has_it)) continue;
      sum += mean;
      ++common;
    }
    // Of oracles that have no capacity in common none is better than another.
    const double mean = common == 0 ? 0 : sum / common;
    if (mean >= best_mean) continue;
    best_mean = mean;
    best = policy;
  }
  return best;
}

// `results`: those of the input that means are over.
std::vector<TraceOverview> overview(const AnalysisInput& input, const ResultSet& results) {
  std::vector<TraceOverview> traces;
  std::map<std::string, std::string> digests;
  const auto add = [&](const StoredResult& result, bool counted) {
    auto found = std::ranges::find(traces, result.trace, &TraceOverview::trace);
    if (found == traces.end()) {
      digests[result.trace] = result.trace_digest;
      found = traces.insert(traces.end(), TraceOverview{});
      found->trace = result.trace;
      found->model = result.model;
      found->num_layers = result.num_layers;
      found->num_query_heads = result.num_query_heads;
      found->num_kv_heads = result.num_kv_heads;
      found->prompt_length = result.prompt_length;
      found->evaluation_queries = static_cast<int>(result.evaluation_positions.size());
    }
    const auto is_listed = [&](const std::vector<int>& positions) {
      return std::ranges::find(positions, result.eviction_position) != positions.end();
    };
    if (!is_listed(found->eviction_positions) && !is_listed(found->other_eviction_positions)) {
      (counted ? found->eviction_positions : found->other_eviction_positions).push_back(result.eviction_position);
    }
    // A later eviction sees more of the spans.
    if (result.spans.size() > found->spans.size()) found->spans = result.spans;
  };
  for (const StoredResult& result : results.results()) add(result, true);
  for (const StoredResult& result : input.results.results()) add(result, false);
  for (const TraceReader& reader : input.traces) {
    const std::string digest = trace_digest(reader);
    for (TraceOverview& trace : traces) {
      if (digests.at(trace.trace) == digest) trace.token_pieces = reader.info().token_pieces;
    }
  }
  for (TraceOverview& trace : traces) {
    std::ranges::sort(trace.eviction_positions);
    std::ranges::sort(trace.other_eviction_positions);
  }
  return traces;
}

// Per capacity, the settings that are not of the traces and eviction positions that most are of (of equally many: more
// of them, then those of the baseline, then those of the first result).
std::vector<SettingKey> settings_apart(const ResultSet& results, const std::string& baseline) {
  using Places = std::set<std::pair<std::string, int>>;
  std::map<std::string, std::map<Places, std::vector<SettingKey>>> of_capacity;
  for (const SettingKey& key : results.settings()) {
    Places places;
    for (const std::size_t i : results.of_setting(key)) {
      places.emplace(results.results()[i].trace, results.results()[i].eviction_position);
    }
    if (key.capacity_request != kAllPositions) of_capacity[key.capacity_request][places].push_back(key);
  }
  std::vector<SettingKey> apart;
  for (const auto& [capacity, groups] : of_capacity) {
    const auto rank = [&](const auto& group) {
      const auto is_baseline = [&](const SettingKey& key) { return key.policy == baseline; };
      const auto first = std::ranges::find(results.settings(), group.second.front()) - results.settings().begin();
      return std::tuple(group.second.size(), group.first.size(), std::ranges::any_of(group.second, is_baseline),
                        -first);
    };
    const auto most = std::ranges::max_element(groups, {}, rank);
    for (auto group = groups.begin(); group != groups.end(); ++group) {
      if (group != most) apart.insert(apart.end(), group->second.begin(), group->second.end());
    }
  }
  return apart;
}

// Curves of other traces or eviction positions than the rest have no place among them.
void set_apart(std::vector<CapacityCurve>& curves, const std::vector<SettingKey>& apart) {
  for (CapacityCurve& curve : curves) {
    const auto is_apart = [&](const CapacityPoint& point) {
      return contains(apart, {curve.policy, point.capacity_request});
    };
    if (std::ranges::none_of(curve.points, is_apart)) continue;
    curve.area.reset();
    curve.kept_for_goal.reset();
  }
  std::ranges::stable_partition(curves, [](const CapacityCurve& curve) { return curve.area.has_value(); });
}

void note_apart(const std::vector<SettingKey>& apart, std::vector<std::string>& notes) {
  if (apart.empty()) return;
  const std::size_t rest = apart.size() - 1;
  notes.push_back(fmt::format(
      "{} at {}{} not of the traces and eviction positions that most others are of at that capacity: means "
      "cannot be compared with theirs, differences are over those that both have, and nothing else is said of "
      "them",
      printable(apart.front().policy), printable(apart.front().capacity_request),
      rest == 0   ? " is"
      : rest == 1 ? " and 1 more setting are"
                  : fmt::format(" and {} more settings are", rest)));
}

// Of the settings of the usual baseline, the nearest to its defaults where that is of fewer traces or eviction
// positions than most others, so that `baseline` is not it but another; else empty.
std::string passed_over_for(const std::string& baseline, const ResultSet& results) {
  const std::vector<SettingKey> apart = settings_apart(results, "");
  std::vector<std::string> settings_of_usual;
  for (const SettingKey& key : results.settings()) {
    const bool oracle = results.results()[results.of_setting(key).front()].oracle;
    const bool listed = std::ranges::find(settings_of_usual, key.policy) != settings_of_usual.end();
    if (oracle || listed || !is_usual(key.policy)) continue;
    settings_of_usual.push_back(key.policy);
  }
  if (settings_of_usual.empty()) return "";
  const std::string nearest = policies_nearest_to_defaults(settings_of_usual).front();
  const auto compared = [&](const SettingKey& key) {
    return key.policy == nearest && key.capacity_request != kAllPositions && !contains(apart, key);
  };
  return nearest == baseline || std::ranges::any_of(results.settings(), compared) ? "" : nearest;
}

// What others are compared with where nobody said what, and why.
void note_baseline(const ResultSet& results, const std::string& baseline, std::vector<std::string>& notes) {
  if (baseline.empty()) return;
  const std::string passed_over = passed_over_for(baseline, results);
  const std::string method = spec_structure(baseline).method;
  std::size_t of_method = 0;
  std::size_t others = 0;
  for (const std::string& policy : results.policies()) {
    if (policy != baseline) ++(spec_structure(policy).method == method ? of_method : others);
  }
  const bool usual = is_usual(baseline);
  if (usual && (of_method == 0 || baseline == method)) return;
  const std::string nearest = of_method == 0 ? ""
                                             : fmt::format("of the settings of {} the nearest to its defaults{}",
                                                           method, usual && !passed_over.empty() ? " but one" : "");
  const std::string middle = usual || others == 0 ? ""
                                                  : fmt::format("{}in the middle by its mean at the first capacity",
                                                                of_method == 0 ? "" : ", and ");
  const std::string why_not =
      passed_over.empty()
          ? ""
          : fmt::format(", since {} is not of the traces and eviction positions that most others are of",
                        printable(passed_over));
  notes.push_back(fmt::format("{} is what others are compared with, being {}{}{}; --baseline names another",
                              printable(baseline), nearest, middle, why_not));
}

// What keeps positions without looking is the floor of what a choice is worth, under the same protection: a protection
// alone can be most of a policy's gain.
void note_floors(const std::vector<std::string>& policies, std::vector<std::string>& notes) {
  std::map<std::string, std::vector<std::string>> chosen;  // by protection
  std::set<std::string> floors;                            // protections that have one
  for (const std::string& policy : policies) {
    const std::string protection = protection_of(policy);
    if (baseline_of(policy) == Method::Baseline::floor) {
      floors.insert(protection);
    } else if (!protection.empty()) {
      chosen[protection].push_back(policy);
    }
  }
  std::string floor;
  for (const Method* method : registered_methods()) {
    if (floor.empty() && method->baseline == Method::Baseline::floor) floor = method->name;
  }
  for (const auto& [protection, under] : chosen) {
    const std::string who = under.size() == 1
                                ? printable(under.front())
                                : fmt::format("{} and {} more", printable(under.front()), under.size() - 1);
    notes.push_back(floors.contains(protection)
                        ? fmt::format("{} {} to be held against {}{}, which keeps the same positions without choosing",
                                      who, under.size() == 1 ? "is" : "are", floor, protection)
                        : fmt::format("{} {} what {} keeps whatever the scores: replay {}{} beside to see what the "
                                      "choice is worth",
                                      who, under.size() == 1 ? "keeps" : "keep", protection.substr(1), floor,
                                      protection));
  }
}

// Results that others' measure is lacking in.
void note_lacking(const ResultSet& results, Measure measure, std::vector<std::string>& notes) {
  const StoredResult* first = nullptr;
  std::size_t lacking = 0;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    // Only policies that rank have a rank agreement, and only traces with spans a span recall.
    if (const auto per = traits_of(measure).per; per == MeasureTraits::Per::head ||
                                                 per == MeasureTraits::Per::head_and_span ||
                                                 per == MeasureTraits::Per::span_and_query) {
      return;
    }
    if (results.has(i, measure)) continue;
    if (first == nullptr) first = &results.results()[i];
    ++lacking;
  }
  if (first == nullptr) return;
  notes.push_back(fmt::format("{} at {} of {}{} no {} and {} left out", printable(first->policy),
                              printable(first->capacity_request), printable(first->trace),
                              lacking == 1 ? " has" : fmt::format(" and {} more results have", lacking - 1),
                              traits_of(measure).noun, lacking == 1 ? "is" : "are"));
}

// Policies whose curves are not of all that their means at single capacities are of.
void note_partial(const std::vector<CapacityCurve>& curves, std::vector<std::string>& notes) {
  const auto partial = std::ranges::count_if(curves, &CapacityCurve::partial);
  if (partial == 0) return;
  const auto first = std::ranges::find_if(curves, &CapacityCurve::partial);
  notes.push_back(fmt::format(
      "{}{} not replayed on the same traces and eviction positions at all capacities: what is said against capacity is "
      "of those that all have, and differs from the means at one capacity",
      printable(first->policy),
      partial == 1 ? std::string(" was") : fmt::format(" and {} more policies were", partial - 1)));
}

const StoredResult* find_result(const ResultSet& results, const std::string& policy, const std::string& capacity,
                                const std::string& digest) {
  for (const std::size_t i : results.of_setting({policy, capacity})) {
    if (results.results()[i].trace_digest == digest) return &results.results()[i];
  }
  return nullptr;
}

// The head of the first trace that was found with the largest head error under a policy with stages to see, at its
// middle capacity.
void add_importance(const AnalysisInput& input, Analysis& analysis) {
  std::vector<std::string> policies = input.results.policies();
  std::erase_if(policies, [](const std::string& each) {
    // Of what can be taken apart, the plain methods.
    if (find_method(spec_structure(each).method) == nullptr) return true;
    const Policy policy = make_policy(each);
    return !policy.ranking() || !policy.ranking()->has_stages();
  });
  if (policies.empty()) return;
  const std::string policy = policies_nearest_to_defaults(policies).front();
  std::vector<std::string> capacities;
  for (const std::string& capacity : input.results.capacities()) {
    if (capacity != kAllPositions && !input.results.of_setting({policy, capacity}).empty()) {
      capacities.push_back(capacity);
    }
  }
  if (capacities.empty()) return;
  const std::string& capacity = capacities[capacities.size() / 2];
  for (const TraceReader& trace : input.traces) {
    const StoredResult* result = find_result(input.results, policy, capacity, trace_digest(trace));
    if (result == nullptr) continue;
    const ComparisonRow* worst = nullptr;
    for (const ComparisonRow& row : analysis.by_head) {
      if (row.key.policy != policy || row.key.capacity_request != capacity || row.key.layer >= result->num_layers ||
          row.key.head >= result->num_query_heads) {
        continue;
      }
      if (worst == nullptr || row.distribution.mean > worst->distribution.mean) worst = &row;
    }
    const int layer = worst == nullptr ? 0 : worst->key.layer;
    const int head = worst == nullptr ? 0 : worst->key.head;
    try {
      analysis.importance.push_back(importance_map(trace, layer, head, policy, result->capacity,
                                                   result->eviction_position, analysis.options.raster_bins));
    } catch (const Error& error) {
      analysis.notes.push_back(fmt::format("no importance over time: {}", error.what()));
    }
    return;
  }
}

}  // namespace

Measure default_measure(const ResultSet& results, bool of_layers, std::vector<std::string>& notes) {
  // What keeps everything loses nothing, and says nothing.
  std::vector<std::size_t> telling;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    if (results.results()[i].capacity_request != kAllPositions) telling.push_back(i);
  }
  const auto having = [&](Measure measure) {
    return std::ranges::count_if(telling, [&](std::size_t i) { return results.has(i, measure); });
  };
  const auto all = std::ssize(telling);
  const auto live = having(Measure::kl);
  if (of_layers || live == 0) return Measure::layer_error;
  const std::string_view noun = traits_of(Measure::kl).noun;
  if (live == all) {
    notes.push_back(
        fmt::format("the model itself ran on over what is kept: findings and rankings go by its {}; --measure {} goes "
                    "by what its layers lose",
                    noun, traits_of(Measure::layer_error).name));
    return Measure::kl;
  }
  const bool layers = having(Measure::layer_error) > 0;
  notes.push_back(fmt::format(
      "{} of {} results have a {}{}", live, all, noun,
      layers ? fmt::format(": what all have is compared; --measure {} compares these", traits_of(Measure::kl).name)
             : ", and nothing else that is compared"));
  return layers ? Measure::layer_error : Measure::kl;
}

std::string default_baseline(const ResultSet& results, Measure measure) {
  const std::vector<SettingKey> apart = settings_apart(results, "");
  std::vector<std::string> policies;
  for (const SettingKey& key : results.settings()) {
    const bool oracle = results.results()[results.of_setting(key).front()].oracle;
    if (oracle || contains(apart, key) || key.capacity_request == kAllPositions) continue;
    if (std::ranges::find(policies, key.policy) == policies.end()) policies.push_back(key.policy);
  }
  if (policies.size() < 2) return "";
  const std::vector<std::string> of_methods = policies_nearest_to_defaults(policies);
  const auto usual = std::ranges::find_if(of_methods, is_usual);
  if (usual != of_methods.end()) return *usual;
  ComparisonOptions options;
  options.measure = measure;
  options.bootstrap.resamples = 0;
  std::vector<std::string> ranked;
  std::string capacity;
  for (const ComparisonRow& row : compare(results, options)) {
    const bool is_one = std::ranges::find(of_methods, row.key.policy) != of_methods.end();
    if (!is_one || contains(apart, row.key.setting()) || !is_candidate(row)) continue;
    if (capacity.empty()) capacity = row.key.capacity_request;
    if (row.key.capacity_request == capacity) ranked.push_back(row.key.policy);
  }
  return ranked.empty() ? "" : ranked[ranked.size() / 2];
}

Analysis analyze(const AnalysisInput& input, AnalysisOptions options) {
  const ResultSet results = input.results.comparable();
  Analysis analysis;
  analysis.notes = results.notes();
  if (options.baseline.empty()) {
    options.baseline = default_baseline(results, options.measure);
    note_baseline(results, options.baseline, analysis.notes);
  } else {
    options.baseline = results.policy_named(options.baseline);
  }
  const bool lower_is_better = traits_of(options.measure).lower_is_better;
  analysis.traces = overview(input, results);
  analysis.settings = results.settings();
  for (const std::string& note : input.kept.notes()) analysis.notes.push_back(note);

  ComparisonOptions comparison;
  comparison.measure = options.measure;
  comparison.baseline = options.baseline;
  comparison.bootstrap = options.bootstrap;
  analysis.comparison = compare(results, comparison);
  analysis.draws = draw_summaries(analysis.comparison);
  analysis.apart = settings_apart(results, options.baseline);
  note_apart(analysis.apart, analysis.notes);
  note_nothing_to_choose(analysis.comparison, analysis.notes);
  note_lacking(results, options.measure, analysis.notes);
  note_floors(input.results.policies(), analysis.notes);
  analysis.curves = capacity_curves(results, options.measure, options.bootstrap);
  note_partial(analysis.curves, analysis.notes);
  const bool against_capacity = traits_of(options.measure).per != MeasureTraits::Per::head;
  if (!options.goal && against_capacity) options.goal = chosen_goal(analysis.curves, options.baseline);
  if (options.goal) find_goal(analysis.curves, options.measure, *options.goal);
  set_apart(analysis.curves, analysis.apart);
  analysis.step_effects = step_effects(results, options.measure, options.bootstrap);
  const auto is_measured = [&](Measure measure) {
    return std::ranges::any_of(results.settings(), [&](const SettingKey& key) {
      return results.has(results.of_setting(key).front(), measure);
    });
  };
  if (traits_of(options.measure).is_of_layers()) {
    analysis.layer_measure = options.measure;
  } else if (is_measured(analysis.layer_measure)) {
    ComparisonOptions beside = comparison;
    beside.measure = analysis.layer_measure;
    beside.baseline = "";
    analysis.beside = compare(results, beside);
    std::ranges::copy_if(step_effects(results, analysis.layer_measure, options.bootstrap),
                         std::back_inserter(analysis.step_effects),
                         [](const StepEffect& effect) { return effect.layer >= 0; });
  }
  analysis.parameter_points = parameter_points(analysis.comparison);
  analysis.oracle = best_oracle(analysis.comparison, analysis.apart, lower_is_better);
  if (!analysis.oracle.empty()) {
    comparison.baseline = analysis.oracle;
    analysis.regret = compare(results, comparison);
    std::erase_if(analysis.regret, [](const ComparisonRow& row) { return !row.difference; });
    comparison.baseline = options.baseline;
  }
  analysis.options = options;
  analysis.loss_predictions = loss_predictions(results, options.bootstrap);
  analysis.overlaps = policy_overlaps(results);
  analysis.span_recalls = span_recalls(results);
  analysis.span_excesses = span_excesses(analysis.span_recalls, options.bootstrap.confidence);
  analysis.rank_agreements = rank_agreements(results);
  if (!input.kept.empty()) {
    analysis.head_overlaps = head_overlaps(input.results, input.kept, results);
    analysis.stabilities = stabilities(input.results, input.kept);
  }
  if (!options.details) return analysis;

  comparison.grouping.layer = true;
  comparison.measure = analysis.layer_measure;
  if (is_measured(comparison.measure)) analysis.by_layer = compare(results, comparison);
  comparison.grouping.head = true;
  comparison.measure = Measure::head_error;
  comparison.bootstrap.resamples = 0;
  if (is_measured(comparison.measure)) analysis.by_head = compare(results, comparison);
  if (!input.kept.empty()) analysis.rasters = kept_rasters(input.results, input.kept, options.raster_bins, true);
  constexpr std::array kOverTime = {Measure::layer_error, Measure::cache_size, Measure::late_hits};
  analysis.time_courses = time_courses(results, kOverTime, options.step_bins);
  if (!analysis.time_courses.empty()) {
    analysis.span_survivals = span_survivals(results, options.step_bins);
    constexpr int kStepsOfRasters = 64;
    analysis.residency_rasters = residency_rasters(input.results, input.kept, kStepsOfRasters, options.raster_bins);
  }
  add_importance(input, analysis);
  return analysis;
}

}  // namespace kvreplay
