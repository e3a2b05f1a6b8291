#include "notebooks-export/tables/analysis_tables.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "analysis/findings.h"
#include "base/printable.h"
#include "notebooks-export/tables/tables.h"

namespace kvreplay {
namespace {

constexpr std::size_t kSpecWidth = 20;
constexpr std::size_t kMostRows = 40;       // of a table
constexpr std::size_t kMostCompared = 100;  // of the comparison, of which …
constexpr std::size_t kBest = 60;           // … so many are the best of their places
constexpr std::size_t kTextWidth = 110;

// Rows of cells of which the first may be a spec that takes several lines.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> head, std::size_t most = kMostRows)
      : rows_{std::move(head)}, most_(most) {}

  void add(const std::string& spec, const std::vector<std::string>& cells) {
    if (++entries_ > most_) return;
    const std::vector<std::string> lines = broken_spec(printable(spec), kSpecWidth);
    std::vector<std::string> row = {lines.front()};
    row.insert(row.end(), cells.begin(), cells.end());
    rows_.push_back(std::move(row));
    for (std::size_t i = 1; i < lines.size(); ++i) rows_.push_back({lines[i]});
  }

  bool empty() const { return entries_ == 0; }

  // With its title, and lines that explain it; `left_out`: rows that were not added.
  std::string text(const std::string& title, std::size_t left_out = 0, const std::string& below = "") const {
    left_out += entries_ > most_ ? entries_ - most_ : 0;
    return fmt::format(
        "{}\n{}{}{}\n", wrapped(title, 0, kTextWidth), aligned_table(rows_), below,
        left_out == 0 ? ""
                      : fmt::format("Not shown: {} more row{}; --csv has all.\n", left_out, left_out == 1 ? "" : "s"));
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  std::size_t most_;
  std::size_t entries_ = 0;
};

std::string plain(double number) { return std::isnan(number) ? "-" : fmt::format("{:.4f}", number); }

std::string short_plain(double number) { return fmt::format("{:.3f}", number); }

std::string with_sign(double number) { return std::isnan(number) ? "-" : fmt::format("{:+.4f}", number); }

std::string percent(double share) { return std::isnan(share) ? "-" : fmt::format("{:.0f} %", 100 * share); }

std::string fine_percent(double share) { return std::isnan(share) ? "-" : fmt::format("{:.1f} %", 100 * share); }

std::string signed_percent(double share) { return std::isnan(share) ? "-" : fmt::format("{:+.1f} %", 100 * share); }

std::string probability(double p) { return std::isnan(p) ? "-" : p < 0.0005 ? "<0.001" : fmt::format("{:.3f}", p); }

// A mean and how far the interval reaches from its middle to its ends.
std::string with_spread(double mean, const Interval& interval) {
  if (std::isnan(interval.low)) return plain(mean);
  return fmt::format("{:.4f} ±{:.4f}", mean, (interval.high - interval.low) / 2);
}

std::string with_ends(double mean, const Interval& interval) {
  if (std::isnan(interval.low)) return with_sign(mean);
  return fmt::format("{:+.4f} [{:+.4f}, {:+.4f}]", mean, interval.low, interval.high);
}

std::string sure(const AnalysisOptions& options) { return fmt::format("{:.4g} %", 100 * options.bootstrap.confidence); }

std::string marked(const std::string& policy, bool oracle) { return policy + (oracle ? " (ORACLE)" : ""); }

constexpr std::string_view kNothingToChoose = "†";
constexpr std::string_view kElsewhere = "‡";
constexpr std::string_view kUnequal = "*";

// Stores visibly more or less than its capacity in every KV head.
bool is_unequal(const ComparisonRow& row) {
  constexpr double kVisible = 0.001;
  return row.key.capacity_request != kAllPositions && std::abs(row.budget - 1) > kVisible;
}

// The policy of a row, and what keeps it from being compared with its neighbours.
std::string marked(const ComparisonRow& row, std::span<const SettingKey> apart) {
  std::string text = marked(row.key.policy, row.oracle);
  if (row.nothing_to_choose) text += fmt::format(" {}", kNothingToChoose);
  if (contains(apart, row.key.setting())) text += fmt::format(" {}", kElsewhere);
  return text;
}

// The same in tables of other things than the comparison.
class Marked {
 public:
  explicit Marked(const Analysis& analysis) {
    for (const ComparisonRow& row : analysis.comparison) {
      names_[row.key.setting()] = marked(row, analysis.apart);
    }
  }

  const std::string& name(const std::string& policy, const std::string& capacity) const {
    const auto found = names_.find({policy, capacity});
    return found == names_.end() ? policy : found->second;
  }

 private:
  std::map<SettingKey, std::string> names_;
};

// What the marks of a table mean, a line each.
std::string about_marks(std::span<const ComparisonRow* const> rows, std::span<const SettingKey> apart) {
  std::string text;
  const auto add = [&](std::string_view mark, std::string_view meaning, const auto& has) {
    if (std::ranges::any_of(rows, has)) text += wrapped(fmt::format("{} {}", mark, meaning), 0, kTextWidth);
  };
  add(kNothingToChoose, "nothing to choose: all of the capacity is kept whatever the scores",
      [](const ComparisonRow* row) { return row->nothing_to_choose; });
  add(kElsewhere, "of other traces or eviction positions than most at its capacity",
      [apart](const ComparisonRow* row) { return contains(apart, row->key.setting()); });
  add(kUnequal, "stores more or less than its capacity in every KV head",
      [](const ComparisonRow* row) { return is_unequal(*row); });
  return text;
}

// As one counts positions, or means of them.
std::string count_text(double count) {
  return count == std::floor(count) ? fmt::format("{:.0f}", count) : fmt::format("{:.1f}", count);
}

bool keeps_all(const std::string& capacity) { return capacity == kAllPositions; }

// Where a row of a comparison stands, whatever its policy.
auto place_of(const GroupKey& key) {
  return std::tie(key.capacity_request, key.trace, key.eviction_position, key.layer, key.head);
}

// Of many rows, those that one wants to see: the best of each place, and what they are compared with.
std::vector<const ComparisonRow*> worth_showing(const std::vector<ComparisonRow>& rows, const std::string& baseline) {
  std::vector<const ComparisonRow*> shown;
  std::set<std::tuple<std::string, std::string, int, int, int>> places;
  for (const ComparisonRow& row : rows) places.insert(place_of(row.key));
  const std::size_t best = rows.size() <= kBest ? rows.size() : std::max<std::size_t>(3, kBest / places.size());
  std::size_t rank = 0;
  const ComparisonRow* before = nullptr;
  for (const ComparisonRow& row : rows) {
    if (before == nullptr || place_of(before->key) != place_of(row.key)) rank = 0;
    before = &row;
    if (rank++ < best || row.key.policy == baseline) shown.push_back(&row);
  }
  return shown;
}

struct KeyColumn {
  std::string_view head;
  bool Grouping::*chosen;
  std::string (*text)(const GroupKey&);
};

constexpr std::array<KeyColumn, 6> kKeyColumns = {{
    {"policy", &Grouping::policy, [](const GroupKey& key) { return key.policy; }},
    {"capacity", &Grouping::capacity, [](const GroupKey& key) { return printable(key.capacity_request); }},
    {"trace", &Grouping::trace, [](const GroupKey& key) { return printable(key.trace); }},
    {"evicted at", &Grouping::eviction_position,
     [](const GroupKey& key) { return std::to_string(key.eviction_position); }},
    {"layer", &Grouping::layer, [](const GroupKey& key) { return std::to_string(key.layer); }},
    {"head", &Grouping::head, [](const GroupKey& key) { return std::to_string(key.head); }},
}};

std::string keys_of(const Grouping& grouping) {
  std::vector<std::string_view> names;
  for (const KeyColumn& column : kKeyColumns) {
    if (grouping.*column.chosen) names.push_back(column.head);
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::string capitalized(std::string_view text) {
  std::string result(text);
  result.front() = static_cast<char>(std::toupper(static_cast<unsigned char>(result.front())));
  return result;
}

std::string curve_text(const Analysis& analysis) {
  const MeasureTraits& measure = traits_of(analysis.options.measure);
  // Policies of one capacity have no curve.
  std::size_t points = 0;
  for (const CapacityCurve& curve : analysis.curves) points += curve.points.size() < 2 ? 1 : 0;
  if (points == analysis.curves.size() || traits_of(analysis.options.measure).per == MeasureTraits::Per::head)
    return "";
  std::vector<std::string> head = {"policy", "capacities", "mean over log2 kept"};
  if (analysis.options.goal) head.push_back(fmt::format("kept for {:.4g}", *analysis.options.goal));
  TextTable table(std::move(head));
  for (const CapacityCurve& curve : analysis.curves) {
    if (curve.points.size() < 2) continue;
    std::vector<std::string> cells;
    cells.push_back(fmt::format("{} to {}", printable(curve.points.front().capacity_request),
                                printable(curve.points.back().capacity_request)));
    cells.push_back(curve.area ? plain(*curve.area) : "-");
    if (analysis.options.goal) {
      const std::string sets = curve.sets_per_kv_head > 1 ? fmt::format(" in {:.3g} sets", curve.sets_per_kv_head) : "";
      const bool apart = std::ranges::any_of(curve.points, [&](const CapacityPoint& point) {
        return contains(analysis.apart, {curve.policy, point.capacity_request});
      });
      cells.push_back(apart                  ? "-"
                      : !curve.kept_for_goal ? "not reached"
                                             : fmt::format("{}{:.0f}{}", curve.reached_at_smallest ? "at most " : "",
                                                           *curve.kept_for_goal, sets));
    }
    table.add(marked(curve.policy, curve.oracle), cells);
  }
  return table.text(
      fmt::format("{} against capacity: the mean height of the curve over log2 of the kept positions where "
                  "all curves are{}.{}",
                  capitalized(measure.noun), analysis.options.goal ? ", and how many positions the goal takes" : "",
                  points == 0 ? "" : fmt::format(" {} of one capacity are left out.", points)));
}

std::string draws_text(const Analysis& analysis) {
  TextTable table({"policy", "capacity", "draws", "mean", "deviation", "smallest", "largest"});
  for (const DrawSummary& summary : analysis.draws) {
    table.add(printable(summary.policy),
              {printable(summary.capacity_request), std::to_string(summary.draws), plain(summary.mean),
               plain(summary.deviation), plain(summary.smallest), plain(summary.largest)});
  }
  if (table.empty()) return "";
  return table.text(fmt::format("What chance does to the {}: draws of one policy, which differ in the seed alone.",
                                traits_of(analysis.options.measure).noun));
}

std::string steps_text(const Analysis& analysis) {
  TextTable table({"change", "step", "capacity", fmt::format("difference [{}]", sure(analysis.options)), "of it",
                   "wins", "p", "p (Holm)"});
  std::set<std::string> references;
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer >= 0) continue;
    references.insert(effect.reference);
    table.add(effect.change, {effect.step, printable(effect.capacity_request),
                              with_ends(effect.difference.mean, effect.difference.interval),
                              signed_percent(effect.difference.relative), percent(effect.difference.wins),
                              probability(effect.difference.p_value), probability(effect.difference.adjusted)});
  }
  if (table.empty()) return "";
  return table.text(
      fmt::format("What a single change does to the {} of {}, all else equal. [ ] and p are of each change "
                  "alone; p (Holm) is corrected for all at its capacity.",
                  traits_of(analysis.options.measure).noun, fmt::join(references, ", ")));
}

std::string prediction_text(const Analysis& analysis) {
  const std::vector<Prediction>& predictions = analysis.loss_predictions.predictions;
  const auto correlation = [](double number) { return std::isnan(number) ? "-" : fmt::format("{:+.2f}", number); };
  TextTable table({"measure", "all settings", fmt::format("same prompt and capacity [{}]", sure(analysis.options)),
                   "smallest", "groups"});
  bool any_groups = false;
  bool single = false;
  for (const Prediction& each : predictions) {
    if (std::isnan(each.all)) continue;
    any_groups = any_groups || each.groups > 0;
    single = single || each.prompts == 1;
    const std::string interval =
        std::isnan(each.interval.low) ? "" : fmt::format(" [{:+.2f}, {:+.2f}]", each.interval.low, each.interval.high);
    table.add(each.predictor.noun(), {correlation(each.all), correlation(each.mean) + interval,
                                      correlation(each.smallest), std::to_string(each.groups)});
  }
  if (table.empty()) return "";
  return table.text(fmt::format(
      "Do offline measures predict what the model loses? Spearman's correlation with the {}, 1 being the same order: "
      "over all settings, and among the policies of the same prompt and capacity ({}).{}",
      traits_of(Measure::kl).noun,
      any_groups ? fmt::format("groups of {} or more; mean and smallest", kFewestPredicted)
                 : fmt::format("which takes {}", kFewestPredicted),
      single ? " A single prompt has no interval." : ""));
}

std::string regret_text(const Analysis& analysis) {
  TextTable table({"policy", "capacity", fmt::format("difference [{}]", sure(analysis.options)), "of the oracle's"});
  for (const ComparisonRow& row : analysis.regret) {
    table.add(marked(row, analysis.apart),
              {printable(row.key.capacity_request), with_ends(row.difference->mean, row.difference->interval),
               signed_percent(row.difference->relative)});
  }
  if (table.empty()) return "";
  return table.text(fmt::format("Regret: {} in excess of {}, which looks ahead.",
                                traits_of(analysis.options.measure).noun, analysis.oracle));
}

std::string overlap_text(const Analysis& analysis) {
  const Marked names(analysis);
  std::vector<std::string> others;
  if (!analysis.options.baseline.empty()) others.push_back(analysis.options.baseline);
  if (!analysis.oracle.empty() && analysis.oracle != analysis.options.baseline) others.push_back(analysis.oracle);
  std::map<std::tuple<std::string, std::string, std::string>, const PolicyOverlap*> found;
  std::vector<std::pair<std::string, std::string>> order;
  const auto is_whole = [&analysis](const std::string& policy) {
    return std::ranges::find(analysis.settings, SettingKey{policy, std::string(kAllPositions)}) !=
           analysis.settings.end();
  };
  for (const PolicyOverlap& overlap : analysis.overlaps) {
    if (overlap.layer >= 0 || is_whole(overlap.policy) || std::ranges::find(others, overlap.other) == others.end())
      continue;
    found[{overlap.policy, overlap.capacity_request, overlap.other}] = &overlap;
    const std::pair setting{overlap.policy, overlap.capacity_request};
    if (std::ranges::find(order, setting) == order.end()) order.push_back(setting);
  }
  std::vector<std::string> head = {"policy", "capacity"};
  for (const std::string& other : others) {
    head.push_back(fmt::format("Jaccard, {}", other));
    head.emplace_back("containment");
  }
  TextTable table(std::move(head));
  for (const auto& [policy, capacity] : order) {
    if (std::ranges::find(others, policy) != others.end() && others.size() == 1) continue;
    std::vector<std::string> cells = {printable(capacity)};
    for (const std::string& other : others) {
      const auto overlap = found.find({policy, capacity, other});
      const bool is_itself = policy == other;
      cells.push_back(overlap == found.end() || is_itself ? "-" : plain(overlap->second->jaccard));
      cells.push_back(overlap == found.end() || is_itself ? "-" : plain(overlap->second->containment));
    }
    table.add(names.name(policy, capacity), cells);
  }
  if (table.empty()) return "";
  return table.text(
      "Overlap of kept sets: Jaccard, and the share of the smaller set that the other also has; means over layers and "
      "query heads.");
}

// Means of values that share a key, in the order of the keys' first values.
template <class Key>
class Means {
 public:
  void add(const Key& key, double value, double weight = 1) {
    const auto [place, is_new] = place_.try_emplace(key, order_.size());
    if (is_new) order_.push_back({key, Mean()});
    order_[place->second].second.add(value, weight);
  }
  std::vector<std::pair<Key, double>> means() const {
    std::vector<std::pair<Key, double>> found;
    for (const auto& [key, mean] : order_) found.emplace_back(key, mean.value());
    return found;
  }
  double mean(const Key& key) const {
    const auto place = place_.find(key);
    return place == place_.end() ? Mean().value() : order_[place->second].second.value();
  }

 private:
  std::vector<std::pair<Key, Mean>> order_;
  std::map<Key, std::size_t> place_;
};

// The traces that all policies have which have any of these evictions at this capacity; all of them where there are
// none.
std::set<std::string> common_traces(const std::vector<Stability>& stabilities, const Stability& like) {
  std::map<std::string, std::set<std::string>> of_policy;
  for (const Stability& each : stabilities) {
    if (std::tie(each.capacity_request, each.from, each.to) == std::tie(like.capacity_request, like.from, like.to)) {
      of_policy[each.policy].insert(each.trace);
    }
  }
  std::set<std::string> common;
  for (const auto& [policy, traces] : of_policy) common.insert(traces.begin(), traces.end());
  const std::set<std::string> all = common;
  for (const auto& [policy, traces] : of_policy) {
    std::erase_if(common, [&its = traces](const std::string& trace) { return !its.contains(trace); });
  }
  return common.empty() ? all : common;
}

std::string stability_text(const Analysis& analysis) {
  using Key = std::tuple<std::string, std::string, int, int>;
  Means<Key> jaccard;
  Means<Key> returned;
  std::map<std::tuple<std::string, int, int>, std::set<std::string>> traces;
  bool partial = false;
  for (const Stability& stability : analysis.stabilities) {
    if (stability.layer >= 0) continue;
    const std::tuple evictions(stability.capacity_request, stability.from, stability.to);
    if (!traces.contains(evictions)) traces[evictions] = common_traces(analysis.stabilities, stability);
    if (!traces[evictions].contains(stability.trace)) {
      partial = true;
      continue;
    }
    const Key key{stability.policy, stability.capacity_request, stability.from, stability.to};
    jaccard.add(key, stability.jaccard);
    returned.add(key, stability.returned);
  }
  TextTable table({"policy", "capacity", "evicted at", "and at", "Jaccard", "kept again"});
  for (const auto& [key, mean] : jaccard.means()) {
    const auto& [policy, capacity, from, to] = key;
    table.add(policy, {printable(capacity), std::to_string(from), std::to_string(to), plain(mean),
                       percent(returned.mean(key))});
  }
  if (table.empty()) return "";
  return table.text(fmt::format(
      "Stability: what is kept of the positions before an eviction when it comes later; kept again: the share "
      "of them that the earlier eviction had dropped.{}",
      partial ? " Means are over the traces that all policies have." : ""));
}

std::string heads_text(const Analysis& analysis) {
  const Marked names(analysis);
  using Key = std::pair<std::string, std::string>;
  Means<Key> within;
  Means<Key> between;
  std::vector<Key> order;
  for (const HeadOverlap& overlap : analysis.head_overlaps) {
    if (overlap.layer >= 0) continue;
    const Key key{overlap.policy, overlap.capacity_request};
    (overlap.within_group ? within : between).add(key, overlap.jaccard);
    if (std::ranges::find(order, key) == order.end()) order.push_back(key);
  }
  TextTable table({"policy", "capacity", "within groups", "between KV heads"});
  for (const Key& key : order) {
    table.add(names.name(key.first, key.second),
              {printable(key.second), plain(within.mean(key)), plain(between.mean(key))});
  }
  if (table.empty()) return "";
  return table.text("How far the heads of a layer keep the same positions (Jaccard).");
}

std::string span_excess_text(const Analysis& analysis) {
  const Marked names(analysis);
  TextTable table({"policy", "capacity", "of prompt", "of spans",
                   fmt::format("beyond chance [{}]", sure(analysis.options)), "p", "p (Holm)"});
  for (const SpanExcess& excess : analysis.span_excesses) {
    table.add(names.name(excess.policy, excess.capacity_request),
              {printable(excess.capacity_request), fine_percent(excess.kept_share), fine_percent(excess.recall),
               with_ends(excess.mean, excess.interval), probability(excess.p_value), probability(excess.adjusted)});
  }
  if (table.empty()) return "";
  return table.text(
      "Span recall beside chance, which keeps the same share of every span as of the prompt; spans are what is drawn "
      "at "
      "random. [ ] and p are of each row alone; p (Holm) is corrected for all at its capacity.");
}

// The middle one of the capacities at which there are spans.
std::string middle_capacity(const std::vector<SpanExcess>& excesses) {
  std::vector<std::string> capacities;
  for (const SpanExcess& excess : excesses) {
    if (std::ranges::find(capacities, excess.capacity_request) == capacities.end()) {
      capacities.push_back(excess.capacity_request);
    }
  }
  return capacities.empty() ? "" : capacities[capacities.size() / 2];
}

std::string span_label_text(const Analysis& analysis) {
  constexpr std::size_t kMostSpans = 10;  // side by side
  const Marked names_of_policies(analysis);
  const std::string capacity = middle_capacity(analysis.span_excesses);
  using Place = std::tuple<std::string, int, std::string>;  // trace, start, label
  std::vector<Place> spans;
  Means<std::pair<std::string, Place>> recall;
  for (const SpanRecall& each : analysis.span_recalls) {
    if (each.layer >= 0 || each.capacity_request != capacity) continue;
    const Place place(each.trace, each.start, each.label);
    if (std::ranges::find(spans, place) == spans.end()) spans.push_back(place);
    recall.add({each.policy, place}, each.recall, each.weight);
  }
  if (spans.size() < 2) return "";
  const std::size_t left_out = spans.size() > kMostSpans ? spans.size() - kMostSpans : 0;
  spans.resize(spans.size() - left_out);
  std::vector<std::string> head = {"policy", "of prompt"};
  std::string names;
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const auto& [trace, start, label] = spans[i];
    head.push_back(fmt::format("{}", i + 1));
    names += fmt::format("{}{} {}", i == 0 ? "" : ", ", i + 1, label.empty() ? "unnamed" : printable(label));
    if (analysis.traces.size() > 1) names += fmt::format(" ({})", printable(trace));
  }
  TextTable table(std::move(head));
  for (const SpanExcess& excess : analysis.span_excesses) {
    if (excess.capacity_request != capacity) continue;
    std::vector<std::string> cells = {fine_percent(excess.kept_share)};
    for (const Place& place : spans) cells.push_back(fine_percent(recall.mean({excess.policy, place})));
    table.add(names_of_policies.name(excess.policy, excess.capacity_request), cells);
  }
  return table.text(
      fmt::format("Span recall span by span at capacity {}, beside the share of the prompt that is kept: {}{}.",
                  printable(capacity), names,
                  left_out == 0 ? "" : fmt::format("; {} more are left out, and --csv has them", left_out)));
}

constexpr int kDepths = 5;

std::string span_depth_text(const Analysis& analysis) {
  const Marked names(analysis);
  using Key = std::tuple<std::string, std::string, int>;
  Means<Key> recall;
  Means<std::pair<std::string, std::string>> share;
  std::vector<std::pair<std::string, std::string>> order;
  for (const SpanRecall& each : analysis.span_recalls) {
    if (each.layer >= 0 || keeps_all(each.capacity_request)) continue;
    const int depth = std::min(kDepths - 1, static_cast<int>(each.depth * kDepths));
    recall.add({each.policy, each.capacity_request, depth}, each.recall, each.weight);
    share.add({each.policy, each.capacity_request}, each.kept_share, each.weight);
    const std::pair setting{each.policy, each.capacity_request};
    if (std::ranges::find(order, setting) == order.end()) order.push_back(setting);
  }
  std::vector<std::string> head = {"policy", "capacity", "of prompt"};
  for (int depth = 0; depth < kDepths; ++depth) {
    head.push_back(fmt::format("{}-{} %", depth * 100 / kDepths, (depth + 1) * 100 / kDepths));
  }
  TextTable table(std::move(head));
  for (const auto& [policy, capacity] : order) {
    std::vector<std::string> cells = {printable(capacity), percent(share.mean({policy, capacity}))};
    for (int depth = 0; depth < kDepths; ++depth) cells.push_back(percent(recall.mean({policy, capacity, depth})));
    table.add(names.name(policy, capacity), cells);
  }
  if (table.empty()) return "";
  return table.text(
      "Span recall by where the span begins, as a share of the positions before the eviction, beside the share of the "
      "prompt that is kept.");
}

std::string rank_text(const Analysis& analysis) {
  const Marked names(analysis);
  TextTable table({"policy", "capacity", "Spearman", "Kendall"});
  for (const RankAgreement& agreement : analysis.rank_agreements) {
    if (agreement.layer >= 0) continue;
    table.add(names.name(agreement.policy, agreement.capacity_request),
              {printable(agreement.capacity_request), plain(agreement.spearman), plain(agreement.kendall)});
  }
  if (table.empty()) return "";
  return table.text("Rank agreement between scores and the attention of the evaluation queries.");
}

// A tidy table whose keys most sections leave empty.
class Numbers {
 public:
  struct Key {
    std::string section;
    std::string policy;
    std::string other = {};
    std::string detail = {};
    std::string capacity_request = {};
    std::string trace = {};
    int eviction_position = -1;
    int layer = -1;
    int head = -1;
  };

  void add(const Key& key, const std::string& quantity, double value, const Interval& interval = {}) {
    table_.add({key.section, key.policy, key.other, key.detail, key.capacity_request, key.trace,
                number_or_none(key.eviction_position), text_or_all(key.layer), text_or_all(key.head), quantity, value,
                interval.low, interval.high});
  }

  void add(const Key& key, const PairedDifference& difference) {
    add(key, "difference", difference.mean, difference.interval);
    add(key, "relative difference", difference.relative);
    add(key, "wins", difference.wins);
    add(key, "p", difference.p_value);
    add(key, "p corrected", difference.adjusted);
    add(key, "pairs", difference.pairs);
  }

  DataTable take() { return std::move(table_); }

 private:
  static double number_or_none(int number) { return number < 0 ? std::nan("") : number; }
  static std::string text_or_all(int number) { return number < 0 ? "all" : std::to_string(number); }

  DataTable table_{{"section", "policy", "other", "detail", "capacity_request", "trace", "evict_at", "layer", "head",
                    "quantity", "value", "low", "high"}};
};

void add_comparison(const std::vector<ComparisonRow>& rows, const AnalysisOptions& options, Numbers& numbers) {
  for (const ComparisonRow& row : rows) {
    Numbers::Key key{"comparison", row.key.policy};
    key.detail = traits_of(options.measure).name;
    key.capacity_request = row.key.capacity_request;
    key.trace = row.key.trace;
    key.eviction_position = row.key.eviction_position;
    key.layer = row.key.layer;
    key.head = row.key.head;
    numbers.add(key, "traces", row.traces);
    // Of whole results: single layers and heads may keep other numbers.
    if (row.key.layer < 0 && row.key.head < 0) {
      numbers.add(key, "kept", std::round(row.kept * 1e6) / 1e6);
      numbers.add(key, "kept share", row.kept_share);
      numbers.add(key, "stored over capacity", std::round(row.budget * 1e6) / 1e6);
      if (!std::isnan(row.bytes_per_token)) numbers.add(key, "bytes per token", row.bytes_per_token);
    }
    numbers.add(key, "nothing to choose", row.nothing_to_choose ? 1 : 0);
    numbers.add(key, "mean", row.distribution.mean, row.interval);
    numbers.add(key, "median", row.distribution.median);
    numbers.add(key, "p90", row.distribution.p90);
    numbers.add(key, "worst", row.distribution.worst);
    if (!row.difference) continue;
    key.other = options.baseline;
    numbers.add(key, *row.difference);
  }
}

void add_retention(const Analysis& analysis, Numbers& numbers) {
  for (const PolicyOverlap& each : analysis.overlaps) {
    Numbers::Key key{"overlap", each.policy, each.other};
    key.capacity_request = each.capacity_request;
    key.layer = each.layer;
    numbers.add(key, "Jaccard", each.jaccard);
    numbers.add(key, "containment", each.containment);
  }
  for (const HeadOverlap& each : analysis.head_overlaps) {
    Numbers::Key key{"overlap of heads", each.policy, "", each.within_group ? "within groups" : "between KV heads"};
    key.capacity_request = each.capacity_request;
    key.layer = each.layer;
    numbers.add(key, "Jaccard", each.jaccard);
  }
  for (const Stability& each : analysis.stabilities) {
    Numbers::Key key{"stability", each.policy, "", fmt::format("from {} to {}", each.from, each.to)};
    key.capacity_request = each.capacity_request;
    key.trace = each.trace;
    key.eviction_position = each.from;
    key.layer = each.layer;
    numbers.add(key, "Jaccard", each.jaccard);
    numbers.add(key, "kept again", each.returned);
  }
  for (const SpanRecall& each : analysis.span_recalls) {
    Numbers::Key key{"span recall", each.policy, "", each.label};
    key.capacity_request = each.capacity_request;
    key.trace = each.trace;
    key.eviction_position = each.eviction_position;
    key.layer = each.layer;
    numbers.add(key, "depth", each.depth);
    numbers.add(key, "recall", each.recall);
    numbers.add(key, "share kept", each.kept_share);
  }
  for (const SpanExcess& each : analysis.span_excesses) {
    Numbers::Key key{"spans", each.policy};
    key.capacity_request = each.capacity_request;
    numbers.add(key, "recall", each.recall);
    numbers.add(key, "share kept", each.kept_share);
    numbers.add(key, "beyond chance", each.mean, each.interval);
    numbers.add(key, "p", each.p_value);
    numbers.add(key, "p corrected", each.adjusted);
    numbers.add(key, "spans", each.spans);
  }
  for (const RankAgreement& each : analysis.rank_agreements) {
    Numbers::Key key{"rank agreement", each.policy};
    key.capacity_request = each.capacity_request;
    key.layer = each.layer;
    numbers.add(key, "Spearman", each.spearman);
    numbers.add(key, "Kendall", each.kendall);
  }
}

}  // namespace

std::string analysis_headline(std::span<const StoredResult> results) {
  std::set<std::string> traces;
  std::vector<std::string> models;
  std::set<int> evictions;
  std::set<int> others;
  std::set<std::pair<std::string, int>> queries;
  for (const StoredResult& result : ResultSet::comparable(results)) {
    evictions.insert(result.eviction_position);
    for (const int position : result.evaluation_positions) queries.emplace(result.trace, position);
  }
  for (const StoredResult& result : results) {
    traces.insert(result.trace);
    if (!evictions.contains(result.eviction_position)) others.insert(result.eviction_position);
    const auto count = [](int number, const char* noun) {
      return fmt::format("{} {}{}", number, noun, number == 1 ? "" : "s");
    };
    std::string model = fmt::format("{}: {}, {} on {}", printable(result.model), count(result.num_layers, "layer"),
                                    count(result.num_query_heads, "query head"), count(result.num_kv_heads, "KV head"));
    if (std::ranges::find(models, model) == models.end()) models.push_back(std::move(model));
  }
  const std::string of_models = models.size() == 1 ? models.front() : fmt::format("{} models", models.size());
  std::string text =
      fmt::format("{} trace{} of {}; evicted at {}, {} evaluation quer{}", traces.size(), traces.size() == 1 ? "" : "s",
                  of_models, range_text(evictions), queries.size(), queries.size() == 1 ? "y" : "ies");
  if (!others.empty()) text += fmt::format("; apart from these also evicted at {}", range_text(others));
  if (models.size() == 1) return text;
  for (const std::string& model : models) text += fmt::format("\n  {}", model);
  return text;
}

namespace {

// The cells of a row's keys, the policy marked.
std::vector<std::string> key_cells(const ComparisonRow& row, const Grouping& grouping,
                                   std::span<const SettingKey> apart) {
  std::vector<std::string> keys;
  for (const KeyColumn& column : kKeyColumns) {
    if (grouping.*column.chosen) keys.push_back(column.text(row.key));
  }
  if (grouping.policy) keys.front() = marked(row, apart);
  return keys;
}

// What was kept, what it costs, and the measure.
std::string means_text(const std::vector<const ComparisonRow*>& shown, const Grouping& grouping,
                       const AnalysisOptions& options, std::span<const SettingKey> apart, const MeansBeside& beside,
                       std::size_t left_out) {
  // What is kept is told of whole results.
  const bool kept = grouping.policy && !grouping.layer && !grouping.head;
  const bool bytes =
      kept && std::ranges::none_of(shown, [](const ComparisonRow* row) { return std::isnan(row->bytes_per_token); });
  const auto larger = [](const ComparisonRow* row) { return row->bytes_per_token >= 10'000; };
  const bool large = bytes && std::ranges::any_of(shown, larger);  // one unit for all, so that they can be compared
  std::vector<std::string> head;
  for (const KeyColumn& column : kKeyColumns) {
    if (grouping.*column.chosen) head.emplace_back(column.head);
  }
  if (kept) head.emplace_back("kept");
  if (bytes) head.emplace_back(large ? "KiB/token" : "B/token");
  // The measure is told in the title.
  for (const char* name : {"mean", "median", "p90", "worst"}) head.emplace_back(name);
  if (!beside.means.empty()) head.push_back(beside.head);
  TextTable table(std::move(head), kMostCompared);
  for (const ComparisonRow* row : shown) {
    const std::vector<std::string> keys = key_cells(*row, grouping, apart);
    std::vector<std::string> cells(keys.begin() + 1, keys.end());
    const std::string_view mark = kept && is_unequal(*row) ? kUnequal : "";
    if (kept) cells.push_back(count_text(std::round(10 * row->kept) / 10) + std::string(bytes ? "" : mark));
    if (bytes) {
      cells.push_back((large ? fmt::format("{:.1f}", row->bytes_per_token / 1024)
                             : count_text(std::round(10 * row->bytes_per_token) / 10)) +
                      std::string(mark));
    }
    cells.push_back(with_spread(row->distribution.mean, row->interval));
    cells.push_back(short_plain(row->distribution.median));
    cells.push_back(short_plain(row->distribution.p90));
    cells.push_back(short_plain(row->distribution.worst));
    if (!beside.means.empty()) {
      const auto found = beside.means.find({row->key.policy, row->key.capacity_request});
      cells.push_back(found == beside.means.end() ? "-" : plain(found->second));
    }
    table.add(keys.front(), cells);
  }
  std::string title = fmt::format("{} by {}", capitalized(traits_of(options.measure).noun), keys_of(grouping));
  if (grouping.policy) title += ", best first";
  return table.text(title + ".", left_out, kept ? about_marks(shown, apart) : "");
}

// The differences from the baseline; empty where there are none.
std::string differences_text(const std::vector<const ComparisonRow*>& shown, const Grouping& grouping,
                             const AnalysisOptions& options, std::span<const SettingKey> apart, std::size_t left_out) {
  std::vector<std::string> head;
  for (const KeyColumn& column : kKeyColumns) {
    if (grouping.*column.chosen) head.emplace_back(column.head);
  }
  for (const std::string& name : {fmt::format("difference [{}]", sure(options)), std::string("of it"),
                                  std::string("wins"), std::string("p"), std::string("p (Holm)")}) {
    head.push_back(name);
  }
  TextTable table(std::move(head), kMostCompared);
  for (const ComparisonRow* row : shown) {
    if (!row->difference) continue;
    const std::vector<std::string> keys = key_cells(*row, grouping, apart);
    std::vector<std::string> cells(keys.begin() + 1, keys.end());
    cells.push_back(with_ends(row->difference->mean, row->difference->interval));
    cells.push_back(signed_percent(row->difference->relative));
    cells.push_back(percent(row->difference->wins));
    cells.push_back(probability(row->difference->p_value));
    cells.push_back(probability(row->difference->adjusted));
    table.add(keys.front(), cells);
  }
  if (table.empty()) return "";
  return table.text(fmt::format("{}: difference from {}, in pairs. [ ] and p are of each comparison alone; p (Holm) is "
                                "corrected for all at its capacity.",
                                capitalized(traits_of(options.measure).noun), options.baseline),
                    left_out);
}

}  // namespace

std::string comparison_text(const std::vector<ComparisonRow>& rows, const Grouping& grouping,
                            const AnalysisOptions& options, std::span<const SettingKey> apart,
                            const MeansBeside& beside) {
  const bool compared = std::ranges::any_of(rows, [](const ComparisonRow& row) { return row.difference.has_value(); });
  const std::vector<const ComparisonRow*> shown = worth_showing(rows, compared ? options.baseline : "");
  const auto differs = [](const ComparisonRow& row) { return row.difference.has_value(); };
  const auto shown_that_differ = std::ranges::count_if(shown, [&](const ComparisonRow* row) { return differs(*row); });
  const auto all_that_differ = std::ranges::count_if(rows, differs);
  return means_text(shown, grouping, options, apart, beside, rows.size() - shown.size()) +
         differences_text(shown, grouping, options, apart,
                          static_cast<std::size_t>(all_that_differ - shown_that_differ));
}

std::string analysis_text(const Analysis& analysis) {
  constexpr std::size_t kFindings = 7;
  std::string text;
  for (const std::string& finding : findings(analysis, kFindings)) {
    std::string lines = wrapped(printable(finding), 2, kTextWidth);
    lines.front() = '-';
    text += lines;
  }
  if (!text.empty()) text += '\n';
  MeansBeside beside{.head = std::string(traits_of(analysis.layer_measure).noun)};
  for (const ComparisonRow& row : analysis.beside) {
    beside.means[{row.key.policy, row.key.capacity_request}] = row.distribution.mean;
  }
  text += comparison_text(analysis.comparison, Grouping{}, analysis.options, analysis.apart, beside);
  for (const auto& section :
       {draws_text, prediction_text, curve_text, steps_text, regret_text, overlap_text, heads_text, stability_text,
        span_excess_text, span_label_text, span_depth_text, rank_text}) {
    text += section(analysis);
  }
  return text;
}

DataTable comparison_numbers(const std::vector<ComparisonRow>& rows, const AnalysisOptions& options) {
  Numbers numbers;
  add_comparison(rows, options, numbers);
  return numbers.take();
}

DataTable analysis_numbers(const Analysis& analysis) {
  Numbers numbers;
  add_comparison(analysis.comparison, analysis.options, numbers);
  AnalysisOptions of_layers = analysis.options;
  of_layers.measure = analysis.layer_measure;
  add_comparison(analysis.beside, of_layers, numbers);
  const std::string measure(traits_of(analysis.options.measure).name);
  for (const Prediction& prediction : analysis.loss_predictions.predictions) {
    Numbers::Key key{"prediction", "", std::string(traits_of(Measure::kl).name), prediction.predictor.name()};
    numbers.add(key, "Spearman", prediction.all);
    numbers.add(key, "Spearman at the same prompt and capacity", prediction.mean, prediction.interval);
    numbers.add(key, "smallest Spearman", prediction.smallest);
    numbers.add(key, "groups", prediction.groups);
    numbers.add(key, "prompts", prediction.prompts);
    for (const auto& [capacity, mean] : prediction.of_capacity) {
      key.capacity_request = capacity;
      numbers.add(key, "Spearman at the same prompt and capacity", mean);
    }
  }
  for (const CapacityCurve& curve : analysis.curves) {
    const Numbers::Key key{"capacity", curve.policy, "", measure};
    if (curve.area) numbers.add(key, "mean over log2 kept", *curve.area);
    if (analysis.options.goal) numbers.add(key, "goal", *analysis.options.goal);
    if (curve.kept_for_goal)
      numbers.add(key, curve.reached_at_smallest ? "most kept for goal" : "kept for goal", *curve.kept_for_goal);
  }
  for (const DrawSummary& summary : analysis.draws) {
    Numbers::Key key{"draws", summary.policy, "", measure};
    key.capacity_request = summary.capacity_request;
    numbers.add(key, "draws", summary.draws);
    numbers.add(key, "mean", summary.mean);
    numbers.add(key, "standard deviation", summary.deviation);
    numbers.add(key, "smallest", summary.smallest);
    numbers.add(key, "largest", summary.largest);
  }
  for (const StepEffect& effect : analysis.step_effects) {
    Numbers::Key key{"step", effect.changed, effect.reference, fmt::format("{}: {}", effect.step, effect.change)};
    if (effect.layer >= 0 && !analysis.beside.empty()) {
      key.detail += fmt::format(", {}", traits_of(analysis.layer_measure).name);
    }
    key.capacity_request = effect.capacity_request;
    key.layer = effect.layer;
    numbers.add(key, effect.difference);
  }
  for (const ComparisonRow& row : analysis.regret) {
    Numbers::Key key{"regret", row.key.policy, analysis.oracle, measure};
    key.capacity_request = row.key.capacity_request;
    numbers.add(key, *row.difference);
  }
  add_retention(analysis, numbers);
  return numbers.take();
}

}  // namespace kvreplay
