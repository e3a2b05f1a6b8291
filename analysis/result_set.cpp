#include "analysis/result_set.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <system_error>
#include <tuple>

#include "analysis/spec_structure.h"
#include "analysis/summary.h"
#include "base/error.h"
#include "base/printable.h"
#include "policy/parameter.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

// The items once each, in their order; not all of very many.
template <class Items>
std::string listed(const Items& items) {
  constexpr std::size_t kShown = 12;
  std::vector<std::string> shown;
  std::set<std::string> seen;
  for (const auto& item : items) {
    const std::string text = printable(fmt::format("{}", item));
    if (seen.insert(text).second && shown.size() < kShown) shown.push_back(text);
  }
  const std::size_t rest = seen.size() - shown.size();
  return fmt::format("{}{}", fmt::join(shown, ", "), rest == 0 ? "" : fmt::format(" and {} more", rest));
}

// A spec as it is written canonically; what is none, or of a policy that is not known here, as it is.
std::string canonical(const std::string& spec) {
  try {
    return make_policy(spec).canonical;
  } catch (const Error&) {
    return spec;
  }
}

std::string canonical_capacity(const std::string& text) {
  try {
    return CapacityRequest::parse(text).text;
  } catch (const UsageError&) {
    return text;
  }
}

bool is_trace(const std::string& trace, const std::string& text) {
  const std::filesystem::path path(trace);
  return trace == text || path.filename() == text || path.stem() == text;
}

bool same_spans(const std::vector<Span>& a, const std::vector<Span>& b) {
  const auto same = [](const Span& x, const Span& y) {
    return x.start == y.start && x.end == y.end && x.label == y.label;
  };
  return std::ranges::equal(a, b, same);
}

// Whether the capacity is no more than what a policy keeps whatever the scores: what files of older versions do not
// say, and a spec does, unless it has a budget that divides the capacity, or is not known here.
bool has_nothing_to_choose(const StoredResult& result) {
  if (result.capacity_request == kAllPositions || result.capacity >= result.eviction_position) return false;
  try {
    const Policy policy = make_policy(result.policy);
    if (policy.budget) return false;
    const bool ranks = policy.ranking() && !policy.selection;
    HeadShape shape;
    shape.next_position = result.eviction_position;
    shape.positions = {0, result.eviction_position};  // older versions had every layer hold the whole prompt
    return result.capacity <= (ranks ? policy.ranking()->unscored(shape) : policy.protection().count());
  } catch (const Error&) {
    return false;
  }
}

// Why two results of one trace and eviction position cannot be compared; empty where they can. Spans count where both
// tell of them.
std::string mismatch(const StoredResult& a, const StoredResult& b, bool tell_spans) {
  if (std::tie(a.num_layers, a.num_query_heads, a.num_kv_heads) !=
      std::tie(b.num_layers, b.num_query_heads, b.num_kv_heads)) {
    return "another number of layers or heads";
  }
  if (a.prompt_length != b.prompt_length) return "another length of the prompt";
  if (a.held != b.held) {
    return "other positions that layers with a sliding window held: one is of an older version; replay it again";
  }
  if (tell_spans && !same_spans(a.spans, b.spans)) return "other spans";
  return "";
}

// "31 queries from 1280 on".
std::string queries_text(const std::vector<int>& positions) {
  return fmt::format("{} quer{} from {} on", positions.size(), positions.size() == 1 ? "y" : "ies", positions.front());
}

// The sets of evaluation queries that a trace's settings were evaluated on.
class Evaluations {
 public:
  void add(const StoredResult& result) {
    Evaluation& evaluation = of_queries_.try_emplace(result.evaluation_positions).first->second;
    evaluation.evictions.insert(result.eviction_position);
    if (result.capacity_request != kAllPositions) evaluation.settings.insert({result.policy, result.capacity_request});
  }

  // The one of most settings, then that which begins last; of one eviction position, or of all (−1).
  const std::vector<int>& best(int eviction) const {
    const std::vector<int>* chosen = nullptr;
    std::tuple<std::size_t, int, std::size_t> rank;
    for (const auto& [queries, evaluation] : of_queries_) {
      if (eviction >= 0 && !evaluation.evictions.contains(eviction)) continue;
      const std::tuple of_this(evaluation.settings.size(), queries.front(), queries.size());
      if (chosen != nullptr && of_this <= rank) continue;
      chosen = &queries;
      rank = of_this;
    }
    return *chosen;
  }

 private:
  struct Evaluation {
    std::set<int> evictions;
    std::set<SettingKey> settings;
  };
  std::map<std::vector<int>, Evaluation> of_queries_;
};

// Throws where nothing matches one of the texts of a filter.
template <class Texts, class Items, class Matches>
void require_each(const Texts& texts, const Items& items, const char* what, const Matches& matches) {
  for (const auto& text : texts) {
    if (std::ranges::any_of(items, [&](const auto& item) { return matches(item, text); })) continue;
    throw UsageError(
        fmt::format("no result is of {} {}. There {} {}", what, text, items.size() == 1 ? "is" : "are", listed(items)));
  }
}

}  // namespace

bool contains(std::span<const SettingKey> settings, const SettingKey& key) {
  return std::ranges::find(settings, key) != settings.end();
}

bool is_policy(const std::string& policy, const std::string& text) {
  if (policy == text) return true;
  if (text.find('(') == std::string::npos) return spec_structure(policy).method == text;
  return policy == canonical(text);
}

ResultSet ResultSet::open(std::span<const std::filesystem::path> files, const ResultFilter& filter) {
  ResultSet set;
  std::set<std::filesystem::path> seen;
  for (const std::filesystem::path& file : files) {
    std::error_code failure;
    const auto place = std::filesystem::weakly_canonical(file, failure);
    if (!seen.insert(failure ? file : place).second) {
      set.notes_.push_back(fmt::format("{}: is given more than once and read once", file.string()));
      continue;
    }
    set.readers_.push_back(std::make_shared<ResultsReader>(file));
  }
  Known known;
  for (std::size_t reader = 0; reader < set.readers_.size(); ++reader) {
    for (std::size_t i = 0; i < set.readers_[reader]->results().size(); ++i) set.add(reader, i, known);
  }
  if (set.results_.empty()) {
    throw Error(set.readers_.empty() ? "no file of results is named"
                                     : fmt::format("{}: holds no results", set.readers_.front()->path().string()));
  }
  if (set.repetitions_ > 0) {
    set.notes_.push_back(
        fmt::format("{} in more than one file, with the same numbers, and counted once",
                    set.repetitions_ == 1 ? "1 result is" : fmt::format("{} results are", set.repetitions_)));
  }
  set.choose(filter);
  if (filter.full_layers) {
    set.notes_.emplace_back(
        "--full-layers: of layers, only those that held the whole prompt have a part in what follows");
  }
  set.note_results();
  return set;
}

// Where it can be compared with all that there is so far.
void ResultSet::add(std::size_t reader, std::size_t index, Known& known) {
  StoredResult result = readers_[reader]->results()[index];
  if (!result.nothing_to_choose) result.nothing_to_choose = has_nothing_to_choose(result);
  const auto both = [&](std::size_t other) {
    const std::string& a = readers_[places_[other].front().first]->path().string();
    const std::string& b = readers_[reader]->path().string();
    return a == b ? a : fmt::format("{} and {}", a, b);
  };
  // One capture goes by one name, and one name means one capture.
  const std::string given = result.trace;
  const auto [capture, is_new_capture] = known.captures.try_emplace(result.trace_digest, results_.size());
  if (!is_new_capture) result.trace = results_[capture->second].trace;
  const auto [name, is_new_name] = known.names.try_emplace(given, capture->second);
  if (name->second != capture->second) {
    throw Error(fmt::format("{}: {} is not the same capture everywhere; replay the captures under names of their own",
                            both(name->second), printable(given)));
  }
  if (is_new_name) called_[given] = result.trace;
  if (is_new_name && given != result.trace) {
    notes_.push_back(
        fmt::format("{} is the same capture as {} and goes by that name", printable(given), printable(result.trace)));
  }

  const std::pair<std::string, int> where{result.trace, result.eviction_position};
  const std::size_t other = known.evictions.try_emplace(where, results_.size()).first->second;
  // What measured no layer, but only what the model loses, may leave spans out.
  const auto tells_spans = [&](const StoredResult& of, const Place& place) {
    return !of.spans.empty() || readers_[place.first]->has(place.second, Measure::layer_error);
  };
  const auto why_not = [&]() {
    if (other == results_.size()) return std::string();
    const bool both_tell = tells_spans(results_[other], places_[other].front()) && tells_spans(result, {reader, index});
    return mismatch(results_[other], result, both_tell);
  };
  if (const std::string why = why_not(); !why.empty()) {
    throw Error(fmt::format("{}: results of {} evicted at {} have {}, so they cannot be compared", both(other),
                            printable(result.trace), result.eviction_position, why));
  }
  const SettingKey setting{result.policy, result.capacity_request};
  const std::size_t alike = known.settings.try_emplace(setting, results_.size()).first->second;
  if (alike < results_.size()) {
    const StoredResult& first = results_[alike];
    if (first.granularity != result.granularity || first.share != result.share) {
      throw Error(fmt::format(
          "{}: {} at capacity {} is there with heads {}, share {} and with heads {}, share {}; "
          "analyze one of them at a time",
          both(alike), printable(result.policy), printable(result.capacity_request), name_of(first.granularity),
          name_of(first.share), name_of(result.granularity), name_of(result.share)));
    }
  }
  const std::size_t evaluation =
      known.evaluations.try_emplace(result.evaluation_positions, known.evaluations.size()).first->second;
  const auto [twin, is_new] = known.results.try_emplace({setting, where, evaluation}, results_.size());
  if (!is_new) {
    count_once(twin->second, {reader, index});
    return;
  }
  places_.push_back({{reader, index}});
  results_.push_back(std::move(result));
}

// Of a result that is there already, the numbers must be the same; measures that it lacks are read from the other
// place.
void ResultSet::count_once(std::size_t result, Place place) {
  bool has_more = false;
  for (const MeasureTraits& measure : measures()) {
    const Table a = read_all_layers(result, measure.measure);
    const Table b = readers_[place.first]->read(place.second, measure.measure);
    has_more = has_more || (a.numbers.empty() && !b.numbers.empty());
    const auto same_number = [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); };
    if (a.numbers.empty() || b.numbers.empty() || std::ranges::equal(a.numbers, b.numbers, same_number)) continue;
    const StoredResult& same = results_[result];
    throw Error(
        fmt::format("{} and {}: {} at capacity {} of {} evicted at {} is in both, with another {}; analyze one "
                    "of them at a time",
                    readers_[places_[result].front().first]->path().string(), readers_[place.first]->path().string(),
                    printable(same.policy), printable(same.capacity_request), printable(same.trace),
                    same.eviction_position, measure.noun));
  }
  if (has_more) places_[result].push_back(place);
  if (results_[result].spans.empty()) results_[result].spans = readers_[place.first]->results()[place.second].spans;
  ++repetitions_;
}

void ResultSet::choose(const ResultFilter& filter) {
  const auto capacities_of = [&]() {
    std::vector<std::string> texts;
    for (const std::string& text : filter.capacities) texts.push_back(canonical_capacity(text));
    return texts;
  };
  const std::vector<std::string> wanted_capacities = capacities_of();
  std::vector<std::string> traces;
  std::map<std::string, std::string> digests;  // of the traces
  std::set<int> evictions;
  std::set<int> layers;
  for (const StoredResult& result : results_) {
    if (digests.emplace(result.trace, result.trace_digest).second) traces.push_back(result.trace);
    evictions.insert(result.eviction_position);
    for (int layer = 0; layer < result.num_layers; ++layer) layers.insert(layer);
  }
  of_setting_.clear();
  for (const StoredResult& result : results_) of_setting_[{result.policy, result.capacity_request}];
  require_each(filter.policies, policies(), "policy", is_policy);
  require_each(wanted_capacities, capacities(), "capacity", std::equal_to<>());
  // By its name, or by the capture that the file of that path holds, whatever it was called.
  const auto is_meant = [&](const std::string& trace, const std::string& text) {
    const auto file = filter.trace_digests.find(text);
    return is_trace(trace, text) || (file != filter.trace_digests.end() && file->second == digests.at(trace));
  };
  require_each(filter.traces, traces, "trace", is_meant);
  require_each(filter.eviction_positions, evictions, "eviction position", std::equal_to<>());
  require_each(filter.layers, layers, "layer", std::equal_to<>());
  filter_ = filter;
  layers_ = filter.layers;
  full_layers_ = filter.full_layers;
  std::ranges::sort(layers_);
  layers_.erase(std::unique(layers_.begin(), layers_.end()), layers_.end());

  // Empty lists choose everything.
  const auto is_in = [](const auto& list, const auto& matches) {
    return list.empty() || std::ranges::any_of(list, matches);
  };
  std::map<std::string, bool> chosen_policies;
  for (const std::string& policy : policies()) {
    chosen_policies[policy] = is_in(filter.policies, [&](const std::string& text) { return is_policy(policy, text); });
  }
  const auto is_chosen = [&](const StoredResult& result) {
    return chosen_policies[result.policy] &&
           (result.capacity_request == kAllPositions ||
            is_in(wanted_capacities, [&](const std::string& text) { return text == result.capacity_request; })) &&
           is_in(filter.traces, [&](const std::string& text) { return is_meant(result.trace, text); }) &&
           is_in(filter.eviction_positions, [&](int position) { return position == result.eviction_position; }) &&
           !layers_of(result).empty();
  };
  std::vector<StoredResult> results;
  std::vector<std::vector<Place>> places;
  for (std::size_t i = 0; i < results_.size(); ++i) {
    if (!is_chosen(results_[i])) continue;
    results.push_back(results_[i]);
    places.push_back(places_[i]);
  }
  if (results.empty() && filter.full_layers) {
    throw UsageError(
        "no result is left: of the layers asked for, --full-layers leaves those that held the whole prompt, and there "
        "is none");
  }
  if (results.empty()) {
    throw UsageError(
        fmt::format("no result is left: each of the policies, capacities, traces and eviction positions "
                    "is there, but not together. Policies: {}; capacities: {}; traces: {}; evicted at: {}",
                    listed(policies()), listed(capacities()), listed(traces), listed(evictions)));
  }
  results_ = std::move(results);
  places_ = std::move(places);
  index_settings();
}

void ResultSet::index_settings() {
  settings_.clear();
  of_setting_.clear();
  for (std::size_t i = 0; i < results_.size(); ++i) {
    const SettingKey key{results_[i].policy, results_[i].capacity_request};
    const auto [place, is_new] = of_setting_.try_emplace(key);
    if (is_new) settings_.push_back(key);
    place->second.push_back(i);
  }
}

ResultSet ResultSet::only(const std::function<bool(const StoredResult&)>& wanted) const {
  ResultSet set = *this;
  set.keep([&](std::size_t i) { return wanted(results_[i]); });
  return set;
}

std::vector<StoredResult> ResultSet::comparable(std::span<const StoredResult> results) {
  ResultSet set;
  set.results_.assign(results.begin(), results.end());
  set.places_.resize(results.size());
  set.index_settings();
  set.leave_out_other_evaluations(false);
  set.leave_out_partial_evictions();
  return set.results_;
}

ResultSet ResultSet::comparable() const {
  ResultSet set = *this;
  set.leave_out_other_evaluations(false);
  set.require_two_policies_of(*this);
  set.leave_out_partial_evictions();
  set.require_what_was_named();
  return set;
}

ResultSet ResultSet::comparable_at_each_eviction() const {
  ResultSet set = *this;
  set.leave_out_other_evaluations(true);
  set.require_two_policies_of(*this);
  set.require_what_was_named();
  return set;
}

void ResultSet::keep(const std::function<bool(std::size_t)>& wanted) {
  std::vector<StoredResult> results;
  std::vector<std::vector<Place>> places;
  for (std::size_t i = 0; i < results_.size(); ++i) {
    if (!wanted(i)) continue;
    results.push_back(std::move(results_[i]));
    places.push_back(std::move(places_[i]));
  }
  results_ = std::move(results);
  places_ = std::move(places);
  index_settings();
}

void ResultSet::leave_out_other_evaluations(bool evictions_apart) {
  std::map<std::string, Evaluations> traces;
  for (const StoredResult& result : results_) traces[result.trace].add(result);
  std::map<std::string, std::map<std::vector<int>, std::vector<std::size_t>>> left_out;  // by trace, and their queries
  std::vector<bool> stays(results_.size(), true);
  for (std::size_t i = 0; i < results_.size(); ++i) {
    const StoredResult& result = results_[i];
    const Evaluations& evaluations = traces.at(result.trace);
    const std::vector<int>& chosen = evaluations.best(evictions_apart ? result.eviction_position : -1);
    stays[i] = result.evaluation_positions == chosen;
    if (stays[i]) continue;
    left_out[result.trace][result.evaluation_positions].push_back(i);
    not_comparable_.push_back(
        {{result.policy, result.capacity_request},
         fmt::format("was evaluated on {} of {}, and others on {}; replay it with --evaluate-from {}",
                     queries_text(result.evaluation_positions), printable(result.trace), queries_text(chosen),
                     chosen.front())});
  }
  for (const auto& [trace, others] : left_out) {
    for (const auto& [queries, which] : others) {
      const std::vector<int>& chosen =
          traces.at(trace).best(evictions_apart ? results_[which.front()].eviction_position : -1);
      notes_.push_back(
          fmt::format("{}: {} evaluated on {}, and cannot be compared with what was evaluated on {}: left out of "
                      "comparisons and means; replay with --evaluate-from {} what is to be compared{}",
                      printable(trace), results_text(which), queries_text(queries), queries_text(chosen),
                      chosen.front(), evictions_apart ? "" : ", or look at one eviction with --evict-at"));
    }
  }
  if (!left_out.empty()) keep([&stays](std::size_t i) { return stays[i]; });
}

void ResultSet::require_two_policies_of(const ResultSet& all) const {
  const auto candidates = [](const ResultSet& set) {
    std::set<std::string> found;
    for (const StoredResult& result : set.results_) {
      if (!result.oracle && result.capacity_request != kAllPositions) found.insert(result.policy);
    }
    return found.size();
  };
  if (candidates(all) < 2 || candidates(*this) >= 2) return;
  const NotComparable& first = not_comparable_.front();
  throw Error(fmt::format("no two policies were evaluated on the same queries: {} {}", printable(first.setting.policy),
                          first.why));
}

void ResultSet::leave_out_partial_evictions() {
  struct OfTrace {
    std::set<SettingKey> settings;
    std::map<int, std::set<SettingKey>> by_eviction;
  };
  std::map<std::string, OfTrace> traces;
  for (const StoredResult& result : results_) {
    if (result.capacity_request == kAllPositions) continue;
    OfTrace& trace = traces[result.trace];
    const SettingKey key{result.policy, result.capacity_request};
    trace.settings.insert(key);
    trace.by_eviction[result.eviction_position].insert(key);
  }
  std::set<std::pair<std::string, int>> left_out;
  for (const auto& [name, trace] : traces) {
    std::vector<int> of_all;
    std::vector<int> of_some;
    for (const auto& [eviction, settings] : trace.by_eviction) {
      (settings.size() == trace.settings.size() ? of_all : of_some).push_back(eviction);
    }
    if (of_all.empty() || of_some.empty()) continue;
    for (const int eviction : of_some) left_out.emplace(name, eviction);
    notes_.push_back(fmt::format(
        "{}: only some of its policies and capacities were replayed with evictions at {}: means are of those "
        "at {} (stability is of all)",
        printable(name), fmt::join(of_some, ", "), fmt::join(of_all, ", ")));
  }
  keep([&](std::size_t i) { return !left_out.contains({results_[i].trace, results_[i].eviction_position}); });
}

void ResultSet::require_what_was_named() const {
  const auto require = [this](const std::vector<std::string>& texts, const auto& matches) {
    for (const std::string& text : texts) {
      const auto is_it = [&](const SettingKey& setting) { return matches(setting, text); };
      if (std::ranges::any_of(settings_, is_it)) continue;
      const auto gone = std::ranges::find_if(not_comparable_, is_it, &NotComparable::setting);
      if (gone == not_comparable_.end()) continue;
      throw Error(fmt::format("{} cannot be compared with the rest: {} at {} {}", printable(text),
                              printable(gone->setting.policy), printable(gone->setting.capacity_request), gone->why));
    }
  };
  require(filter_.policies,
          [](const SettingKey& setting, const std::string& text) { return is_policy(setting.policy, text); });
  require(filter_.capacities, [](const SettingKey& setting, const std::string& text) {
    return setting.capacity_request == canonical_capacity(text);
  });
}

// "tova at 16 and 3 more results, evicted at 512, 768, were".
std::string ResultSet::results_text(const std::vector<std::size_t>& which) const {
  const StoredResult& first = results_[which.front()];
  std::set<int> evictions;
  for (const std::size_t i : which) evictions.insert(results_[i].eviction_position);
  const std::size_t others = which.size() - 1;
  return fmt::format("{} at {}{}, evicted at {}, {}", printable(first.policy), printable(first.capacity_request),
                     others == 0 ? "" : fmt::format(" and {} more result{}", others, others == 1 ? "" : "s"),
                     fmt::join(evictions, ", "), others == 0 ? "was" : "were");
}

void ResultSet::note_results() {
  std::vector<std::pair<std::string, std::vector<std::string>>> about;
  for (const StoredResult& result : results_) {
    for (const std::string& note : result.notes) {
      auto found = std::ranges::find(about, note, &std::pair<std::string, std::vector<std::string>>::first);
      if (found == about.end()) found = about.insert(about.end(), {note, {}});
      if (std::ranges::find(found->second, result.trace) == found->second.end()) found->second.push_back(result.trace);
    }
  }
  for (const auto& [note, traces] : about) {
    const std::size_t others = traces.size() - 1;
    notes_.push_back(fmt::format("{}{}: {}", printable(traces.front()),
                                 others == 0 ? "" : fmt::format(" and {} more trace{}", others, others == 1 ? "" : "s"),
                                 printable(note)));
  }
}

bool ResultSet::has(std::size_t result, Measure measure) const {
  return std::ranges::any_of(places_.at(result),
                             [&](const Place& place) { return readers_[place.first]->has(place.second, measure); });
}

Table ResultSet::read_all_layers(std::size_t result, Measure measure) const {
  for (const auto& [reader, index] : places_.at(result)) {
    Table table = readers_[reader]->read(index, measure);
    if (!table.numbers.empty()) return table;
  }
  return {};
}

Table ResultSet::read(std::size_t result, Measure measure) const {
  Table table = read_all_layers(result, measure);
  const bool of_all = (layers_.empty() && !full_layers_) || !traits_of(measure).is_of_layers();
  if (of_all || table.numbers.empty()) return table;
  const std::size_t per_layer = table.numbers.size() / static_cast<std::size_t>(table.shape.front());
  const std::vector<int> layers = layers_of(results_[result]);
  Table chosen;
  chosen.shape = table.shape;
  chosen.shape.front() = static_cast<Index>(layers.size());
  for (const int layer : layers) {
    const auto first = table.numbers.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(layer) * per_layer);
    chosen.numbers.insert(chosen.numbers.end(), first, first + static_cast<std::ptrdiff_t>(per_layer));
  }
  return chosen;
}

const std::vector<std::size_t>& ResultSet::of_setting(const SettingKey& key) const {
  static const std::vector<std::size_t> none;
  const auto found = of_setting_.find(key);
  return found == of_setting_.end() ? none : found->second;
}

std::vector<std::string> ResultSet::policies() const {
  std::vector<std::string> policies;
  std::set<std::string> seen;
  for (const StoredResult& result : results_) {
    if (seen.insert(result.policy).second) policies.push_back(result.policy);
  }
  return policies;
}

std::vector<std::string> ResultSet::capacities() const {
  std::map<std::string, std::vector<std::string>> of_policies;
  bool all = false;
  for (const StoredResult& result : results_) {
    std::vector<std::string>& asked = of_policies[result.policy];
    if (std::ranges::find(asked, result.capacity_request) == asked.end()) asked.push_back(result.capacity_request);
    all = all || result.capacity_request == kAllPositions;
  }
  std::vector<std::string> capacities = in_order(of_policies);
  if (!all) capacities.erase(capacities.begin());
  return capacities;
}

std::string ResultSet::policy_named(const std::string& text) const {
  const std::vector<std::string> known = policies();
  for (const std::string& spec : {text, canonical(text)}) {
    if (std::ranges::find(known, spec) != known.end()) return spec;
  }
  std::vector<std::string> of_method;
  for (const std::string& policy : known) {
    if (is_policy(policy, text)) of_method.push_back(policy);
  }
  const auto gone = std::ranges::find_if(
      not_comparable_, [&text](const SettingKey& setting) { return is_policy(setting.policy, text); },
      &NotComparable::setting);
  if (of_method.empty() && gone != not_comparable_.end()) {
    throw Error(fmt::format("{} cannot be compared with the rest: it {}", printable(text), gone->why));
  }
  if (of_method.size() == 1) return of_method.front();
  if (!of_method.empty()) {
    throw UsageError(fmt::format("{} may be any of {}; name one", text, listed(of_method)));
  }
  throw UsageError(
      fmt::format("no result is of policy {}.{} There are {}", text, suggestion(text, known), listed(known)));
}

const std::string& ResultSet::trace_called(const std::string& name) const {
  const auto found = called_.find(name);
  return found == called_.end() ? name : found->second;
}

std::vector<int> ResultSet::layers_of(const StoredResult& result) const {
  std::vector<int> layers;
  for (int layer = 0; layer < result.num_layers; ++layer) {
    const bool named = layers_.empty() || std::ranges::binary_search(layers_, layer);
    if (named && (!full_layers_ || result.holds_everything(layer))) layers.push_back(layer);
  }
  return layers;
}

std::vector<OverlapTable> ResultSet::overlaps() const {
  std::vector<OverlapTable> tables;
  for (const auto& file : readers_) {
    const ResultsReader& reader = *file;
    for (std::size_t i = 0; i < reader.overlaps().size(); ++i) {
      OverlapTable outline = reader.overlaps()[i];
      outline.trace = trace_called(outline.trace);
      std::vector<std::size_t> chosen;
      for (std::size_t p = 0; p < outline.policies.size(); ++p) {
        const auto is_here = [&](const StoredResult& result) {
          return result.trace == outline.trace && result.eviction_position == outline.eviction_position &&
                 result.policy == outline.policies[p] &&
                 (result.capacity_request == outline.capacity_request || result.capacity_request == kAllPositions);
        };
        if (std::ranges::any_of(results_, is_here)) chosen.push_back(p);
      }
      // What keeps everything is in the table of every capacity, chosen or not.
      const auto of_capacity = [&](const StoredResult& result) {
        return result.capacity_request == outline.capacity_request && result.trace == outline.trace &&
               result.eviction_position == outline.eviction_position;
      };
      if (chosen.empty() || std::ranges::none_of(results_, of_capacity)) continue;
      std::vector<std::string> policies;
      for (const std::size_t p : chosen) policies.push_back(outline.policies[p]);
      const bool known = std::ranges::any_of(tables, [&](const OverlapTable& table) {
        return table.trace == outline.trace && table.capacity_request == outline.capacity_request &&
               table.eviction_position == outline.eviction_position &&
               std::ranges::all_of(policies, [&table](const std::string& policy) {
                 return std::ranges::find(table.policies, policy) != table.policies.end();
               });
      });
      if (known) continue;
      const OverlapTable whole = reader.read_overlap(i);
      const std::size_t count = whole.policies.size();
      const std::size_t cells = whole.jaccard.numbers.size() / (count * count);
      outline.policies = std::move(policies);
      for (Table OverlapTable::*part : {&OverlapTable::jaccard, &OverlapTable::containment}) {
        Table& table = outline.*part;
        table.shape = (whole.*part).shape;
        table.shape[0] = table.shape[1] = static_cast<Index>(chosen.size());
        for (const std::size_t a : chosen) {
          for (const std::size_t b : chosen) {
            const auto first = (whole.*part).numbers.begin() + static_cast<std::ptrdiff_t>((a * count + b) * cells);
            table.numbers.insert(table.numbers.end(), first, first + static_cast<std::ptrdiff_t>(cells));
          }
        }
      }
      tables.push_back(std::move(outline));
    }
  }
  return tables;
}

}  // namespace kvreplay
