#include "analysis/findings.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

namespace kvreplay {
namespace {

// Three digits, but no more decimals than tables show.
double as_in_tables(double number) {
  constexpr double kDecimals = 1e4;
  constexpr double kLeast = 1e-3;  // of less, tables show a single digit or none
  return std::abs(number) < kLeast ? number : std::round(kDecimals * number) / kDecimals;
}

std::string number_text(double number) { return fmt::format("{:.3g}", as_in_tables(number)); }

// Positions, which are counts and means of counts.
double tenths(double number) { return std::round(10 * number) / 10; }

std::string signed_text(double number) { return fmt::format("{:+.3g}", as_in_tables(number)); }

std::string signed_percent_text(double share) {
  const double percent = 100 * share;
  if (std::abs(percent) >= 1000) return fmt::format("{:+.0f} %", percent);
  return fmt::format("{:+.3g} %", std::abs(percent) < 1 ? percent : tenths(percent));
}

std::string interval_text(const Interval& interval) {
  if (std::isnan(interval.low)) return "";
  return fmt::format(" [{}, {}]", signed_text(interval.low), signed_text(interval.high));
}

std::string percent_text(double share) { return fmt::format("{:.3g} %", 100 * share); }

// The plain p value, and where that differs the one corrected for the comparisons beside it.
std::string p_text(double p, double adjusted) {
  const auto text = [](double number) { return number < 0.001 ? "< 0.001" : fmt::format("= {:.2g}", number); };
  if (p == adjusted) return fmt::format("p {}", text(p));
  return fmt::format("p {}, corrected {}", text(p), adjusted < 0.001 ? text(adjusted) : text(adjusted).substr(2));
}

std::string p_text(const PairedDifference& difference) { return p_text(difference.p_value, difference.adjusted); }

// "a, b and c"
std::string enumeration(const std::vector<std::string>& items) {
  if (items.size() < 2) return items.empty() ? "" : items.front();
  return fmt::format("{} and {}", fmt::join(items.begin(), items.end() - 1, ", "), items.back());
}

// What findings speak of: no oracles, nothing that keeps everything, be it for want of positions to evict, and nothing
// that had nothing to choose.
bool is_candidate(const ComparisonRow& row) {
  return !row.oracle && row.key.capacity_request != kAllPositions && row.kept_share < 1 && !row.nothing_to_choose;
}

// Equal but for rounding.
bool same(double a, double b) { return std::abs(a - b) <= 1e-6 * std::max(std::abs(a), std::abs(b)) + 1e-12; }

std::string counted(std::size_t count, std::string_view noun, std::string_view nouns) {
  return fmt::format("{} {}", count, count == 1 ? noun : nouns);
}

class Findings {
 public:
  explicit Findings(const Analysis& analysis)
      : analysis_(analysis),
        measure_(traits_of(analysis.options.measure)),
        level_(1 - analysis.options.bootstrap.confidence) {
    std::vector<std::vector<const ComparisonRow*>> of_capacity;  // best first
    for (const ComparisonRow& row : analysis.comparison) {
      rows_[row.key.setting()] = &row;
      if (!is_candidate(row) || is_apart(row.key.setting())) continue;
      policies_.insert(row.key.policy);
      const std::string& capacity = row.key.capacity_request;
      if (of_capacity.empty() || of_capacity.back().front()->key.capacity_request != capacity)
        of_capacity.emplace_back();
      of_capacity.back().push_back(&row);
    }
    for (const std::vector<const ComparisonRow*>& rows : of_capacity) add_best(rows);
  }

  std::vector<SettingKey> best_settings() const {
    std::vector<SettingKey> settings;
    for (const std::vector<const ComparisonRow*>& winners : best_) {
      for (const ComparisonRow* row : winners) settings.push_back(row->key.setting());
    }
    return settings;
  }

  std::string best() const {
    if (best_.empty()) {
      const auto keeps_all = [](const ComparisonRow& row) { return row.kept_share >= 1; };
      return !analysis_.comparison.empty() && std::ranges::all_of(analysis_.comparison, keeps_all)
                 ? "Nothing is evicted: at these capacities every policy keeps the whole prompt."
                 : "";
    }
    if (policies_.size() < 2) return "";
    std::vector<std::pair<std::string, std::vector<std::string>>> places;
    for (const std::vector<const ComparisonRow*>& winners : best_) {
      const ComparisonRow& row = *winners.front();
      const std::string who = names_of(winners);
      auto found = std::ranges::find(places, who, &std::pair<std::string, std::vector<std::string>>::first);
      if (found == places.end()) found = places.insert(places.end(), {who, {}});
      found->second.push_back(fmt::format("{} at {}", number_text(row.distribution.mean), row.key.capacity_request));
    }
    const char* extreme = measure_.lower_is_better ? "smallest" : "largest";
    constexpr std::size_t kListed = 6;
    if (places.size() == 1) {
      auto& [policy, where] = places.front();
      const bool several = best_.front().size() > 1;
      const std::string scope = where.size() == 1   ? ""
                                : where.size() == 2 ? " at both capacities"
                                                    : fmt::format(" at all {} capacities", where.size());
      if (where.size() > kListed) where = {where.front(), where.back()};
      return fmt::format("{} {} the {} {}{}: {}.{}", policy, several ? "have" : "has", extreme, measure_.noun, scope,
                         enumeration(where), not_counted());
    }
    std::vector<std::string> parts;
    for (auto& [policy, where] : places) {
      if (parts.size() == kListed) break;
      if (where.size() > kListed) where = {where.front(), "…", where.back()};
      parts.push_back(fmt::format("{} ({})", policy, fmt::join(where, ", ")));
    }
    return fmt::format("Which policy has the {} {} depends on the capacity: {}.{}", extreme, measure_.noun,
                       enumeration(parts), not_counted());
  }

  std::string against_baseline() const {
    const std::string& baseline = analysis_.options.baseline;
    const ComparisonRow* most = nullptr;
    const ComparisonRow* nearest = nullptr;
    std::size_t compared = 0;
    std::size_t better = 0;
    std::size_t worse = 0;
    std::size_t unequal = 0;
    for (const ComparisonRow& row : analysis_.comparison) {
      if (!is_candidate(row) || !row.difference || std::isnan(row.difference->p_value)) continue;
      const ComparisonRow* reference = baseline_of(row);
      if (reference == nullptr) continue;
      // A difference that goes with the budgets may be theirs.
      if (gain(row) > 0 ? row.stores_more_than(*reference) : reference->stores_more_than(row)) {
        ++unequal;
        continue;
      }
      ++compared;
      if (nearest == nullptr || gain(row) > gain(*nearest)) nearest = &row;
      if (row.difference->adjusted >= level_) continue;
      ++(gain(row) > 0 ? better : worse);
      if (gain(row) > 0 && (most == nullptr || gain(row) > gain(*most))) most = &row;
    }
    if (compared == 0) return "";
    std::string count =
        compared == 1
            ? ""
            : fmt::format(" Of {} comparisons, {} surely better and {} surely worse{}.", compared,
                          better == 1 ? "1 is" : fmt::format("{} are", better), worse,
                          level_ > 0.0499 && level_ < 0.0501 ? "" : fmt::format(" at {:.4g} %", 100 * (1 - level_)));
    if (unequal > 0) {
      count += fmt::format(" Not counted {} {} in which the better one also stores more.", unequal == 1 ? "is" : "are",
                           unequal);
    }
    if (most == nullptr && worse == compared) {
      return fmt::format("All others are surely worse than {}; the nearest to it is {} at {}: {}{}, {}.{}", baseline,
                         nearest->key.policy, nearest->key.capacity_request, signed_text(nearest->difference->mean),
                         interval_text(nearest->difference->interval), p_text(*nearest->difference),
                         unequal > 0 ? count : "");
    }
    if (most == nullptr) {
      const bool surely_worse = gain(*nearest) < 0 && nearest->difference->adjusted < level_;
      return fmt::format("No policy is surely better than {}; the nearest to it{} {} at {}{}: {}{}, {}.{}", baseline,
                         surely_worse ? "," : " is", nearest->key.policy, nearest->key.capacity_request,
                         surely_worse ? ", is surely worse" : "", signed_text(nearest->difference->mean),
                         interval_text(nearest->difference->interval), p_text(*nearest->difference), count);
    }
    const PairedDifference& difference = *most->difference;
    // The largest gain may be one that is not sure.
    const std::string among = gain(*nearest) > gain(*most) ? fmt::format("Of what is surely better than {}", baseline)
                                                           : fmt::format("Against {}", baseline);
    return fmt::format("{}, {} gains most at capacity {}: {}{}{}, better in {} of the pairs, {}.{}", among,
                       most->key.policy, most->key.capacity_request, signed_text(difference.mean),
                       interval_text(difference.interval),
                       std::isnan(difference.relative) ? "" : " or " + signed_percent_text(difference.relative),
                       percent_text(difference.wins), p_text(difference), count);
  }

  std::string goal() const {
    // Rank agreement does not depend on the capacity.
    if (!analysis_.options.goal || measure_.per == MeasureTraits::Per::head) return "";
    std::vector<const CapacityCurve*> reached;
    std::size_t all = 0;
    bool any_apart = false;
    for (const CapacityCurve& curve : analysis_.curves) {
      if (curve.oracle || curve.points.size() < 2 || !policies_.contains(curve.policy)) continue;
      const auto apart = [&](const CapacityPoint& point) { return is_apart({curve.policy, point.capacity_request}); };
      if (std::ranges::any_of(curve.points, apart)) {
        any_apart = true;
        continue;
      }
      ++all;
      if (curve.kept_for_goal) reached.push_back(&curve);
    }
    if (all < 2) return "";
    // Of a policy with one capacity nobody knows where it reaches the goal, though it may do so there.
    const std::string among = all == policies_.size() ? ""
                                                      : fmt::format("of the {} policies with several {}capacities", all,
                                                                    any_apart ? "comparable " : "");
    const std::string goal = fmt::format(
        "a{} {} of {}", std::string_view("aeiou").find(measure_.noun.front()) == std::string_view::npos ? "" : "n",
        measure_.noun, number_text(*analysis_.options.goal));
    if (reached.empty()) {
      return among.empty() ? fmt::format("No policy reaches {} at these capacities.", goal)
                           : fmt::format("None {} reaches {} at these.", among, goal);
    }
    std::ranges::stable_sort(
        reached, {}, [](const CapacityCurve* curve) { return *curve->kept_for_goal * curve->sets_per_kv_head; });
    std::vector<std::string> parts;
    constexpr std::size_t kListed = 4;
    for (const CapacityCurve* curve : reached) {
      if (parts.size() == kListed) break;
      parts.push_back(fmt::format(
          "{}{} {}{:.0f}{}", curve->policy, parts.empty() ? " keeps" : "", curve->reached_at_smallest ? "at most " : "",
          *curve->kept_for_goal,
          curve->sets_per_kv_head > 1 ? fmt::format(" in each of {:.3g} sets", curve->sets_per_kv_head) : ""));
    }
    const std::size_t rest = all - reached.size();
    std::string others;
    if (rest > 0) {
      others = fmt::format("; {} {}{} not reach it at these capacities", rest,
                           among.empty() ? fmt::format("of {} policies ", all) : "", rest == 1 ? "does" : "do");
    }
    return fmt::format("For {}{}, {} positions{}.", goal, among.empty() ? "" : ", " + among, enumeration(parts),
                       others);
  }

  std::string step() const {
    const StepEffect* most = nullptr;
    std::size_t compared = 0;
    for (const StepEffect& effect : analysis_.step_effects) {
      if (effect.layer >= 0 || std::isnan(effect.difference.p_value) ||
          is_oracle({effect.changed, effect.capacity_request}))
        continue;
      ++compared;
      if (effect.difference.adjusted >= level_ || std::isnan(effect.difference.relative)) continue;
      if (most == nullptr || std::abs(effect.difference.relative) > std::abs(most->difference.relative)) most = &effect;
    }
    if (compared == 0) return "";
    if (most == nullptr) {
      return compared == 1 ? "The single change to a method that there is makes no sure difference."
                           : fmt::format("None of {} single changes to a method makes a sure difference.", compared);
    }
    return fmt::format("Of single changes to {}, {} ({}) changes the {} most: {} at {}{}, {}.", most->reference,
                       most->change, most->step, measure_.noun, signed_percent_text(most->difference.relative),
                       most->capacity_request, interval_text(most->difference.interval), p_text(most->difference));
  }

  // Whether the layer error tells what the model loses, and what does so best.
  std::string prediction() const {
    const std::vector<Prediction>& all = analysis_.loss_predictions.predictions;
    const auto found = std::ranges::find(all, Predictor{}, &Prediction::predictor);
    if (found == all.end()) return "";
    const Prediction& layer_error = *found;
    if (std::isnan(layer_error.mean)) {
      if (std::isnan(layer_error.all)) return "";
      return fmt::format(
          "Over all settings the {} follows the model's loss with Spearman {:.2f}; at the same prompt and capacity "
          "there are too few policies to say ({} are needed).",
          layer_error.predictor.noun(), layer_error.all, kFewestPredicted);
    }
    const auto with = [](const Prediction& each) {
      const std::string interval =
          std::isnan(each.interval.low) ? "" : fmt::format(" [{:.2f}, {:.2f}]", each.interval.low, each.interval.high);
      return fmt::format("{:.2f}{}", each.mean, interval);
    };
    const auto at_worst = [](const Prediction& each) {
      return each.groups < 2 ? "" : fmt::format(" ({:.2f} at worst)", each.smallest);
    };
    const Prediction& best = all.front();
    const auto others = std::ranges::count_if(all, [](const Prediction& each) { return !std::isnan(each.mean); }) - 1;
    return fmt::format(
        "The {} predicts the loss here with Spearman {} at the same prompt and capacity{}{}.{}",
        layer_error.predictor.noun(), with(layer_error), at_worst(layer_error),
        others < 1 ? ""
        : best.mean > layer_error.mean
            ? fmt::format("; {}the {} does {}, with {}{}", others == 1 ? "" : fmt::format("of {} others ", others),
                          best.predictor.noun(), others == 1 ? "better" : "best", with(best), at_worst(best))
            : "; nothing else that was measured does better",
        layer_error.prompts < 2 ? " How sure that is, a single prompt does not say." : "");
  }

  std::string regret() const {
    const ComparisonRow* most = nullptr;
    for (const ComparisonRow& row : analysis_.regret) {
      const bool is_best = std::ranges::any_of(
          best_, [&row](const std::vector<const ComparisonRow*>& winners) { return winners.front()->key == row.key; });
      if (is_best && gain(row) < 0 && (most == nullptr || gain(row) < gain(*most))) most = &row;
    }
    if (most == nullptr) return "";
    const PairedDifference& difference = *most->difference;
    return fmt::format(
        "What could still be gained is largest at capacity {}: the {} of {} is {}, that of the best "
        "policy, {}, {}.",
        most->key.capacity_request, measure_.noun, analysis_.oracle, number_text(difference.reference),
        most->key.policy, number_text(difference.reference + difference.mean));
  }

  std::string spans() const {
    // At the middle capacity.
    if (best_.empty()) return "";
    const std::string& capacity = best_[best_.size() / 2].front()->key.capacity_request;
    const SpanExcess* most = nullptr;
    const SpanExcess* sure = nullptr;
    std::size_t policies = 0;
    for (const SpanExcess& excess : analysis_.span_excesses) {
      if (excess.capacity_request != capacity || excess.oracle || excess.nothing_to_choose ||
          !policies_.contains(excess.policy) || is_apart({excess.policy, capacity})) {
        continue;
      }
      ++policies;
      if (most == nullptr || excess.mean > most->mean) most = &excess;
      if (excess.mean > 0 && excess.adjusted < level_ && (sure == nullptr || excess.mean > sure->mean)) sure = &excess;
    }
    if (policies < 2) return "";
    if (sure == nullptr) {
      return fmt::format(
          "No policy surely keeps more of the annotated spans than of the whole prompt at capacity {}; the "
          "largest difference is that of {}: {} of their positions and {} of all{}.",
          capacity, most->policy, percent_text(most->recall), percent_text(most->kept_share),
          std::isnan(most->p_value) ? "" : fmt::format(" ({})", p_text(most->p_value, most->adjusted)));
    }
    return fmt::format(
        "{} surely keeps more of the annotated spans than of the whole prompt at capacity {}: {} of their positions "
        "and {} of all, {:+.3g} points [{:+.3g}, {:+.3g}], {}.",
        sure->policy, capacity, percent_text(sure->recall), percent_text(sure->kept_share), 100 * sure->mean,
        100 * sure->interval.low, 100 * sure->interval.high, p_text(sure->p_value, sure->adjusted));
  }

 private:
  // How much better a row is than its baseline.
  double gain(const ComparisonRow& row) const {
    return measure_.lower_is_better ? -row.difference->mean : row.difference->mean;
  }

  // Of the candidates of a capacity, best first: the best of those that store no more than most, and what is better and
  // stores more.
  void add_best(const std::vector<const ComparisonRow*>& rows) {
    std::vector<const ComparisonRow*> by_size = rows;
    std::ranges::stable_sort(by_size, {}, [](const ComparisonRow* row) { return row->stored; });
    const ComparisonRow& middle = *by_size[(by_size.size() - 1) / 2];
    std::vector<const ComparisonRow*>& winners = best_.emplace_back();
    for (const ComparisonRow* row : rows) {
      if (row->stores_more_than(middle)) {
        if (winners.empty()) larger_.push_back({row, middle.stored});
        continue;
      }
      if (winners.empty() || same(winners.front()->distribution.mean, row->distribution.mean)) winners.push_back(row);
    }
  }

  // What is better than those that are called best, and why it is not called so.
  std::string not_counted() const {
    if (larger_.empty()) return "";
    constexpr std::size_t kListed = 3;
    std::vector<std::string> names;
    for (const auto& [row, usual] : larger_) {
      if (names.size() == kListed) break;
      names.push_back(fmt::format("{} at {} ({} positions in a KV head, where most store {})", row->key.policy,
                                  row->key.capacity_request, tenths(row->stored), tenths(usual)));
    }
    if (larger_.size() > kListed) names.push_back(counted(larger_.size() - kListed, "other", "others"));
    return fmt::format(" Not counted, since {} more: {}.", larger_.size() == 1 ? "it stores" : "they store",
                       enumeration(names));
  }

  // What a row's difference is from; nothing where that had nothing to choose.
  const ComparisonRow* baseline_of(const ComparisonRow& row) const {
    for (const std::string& capacity : {row.key.capacity_request, std::string(kAllPositions)}) {
      const auto found = rows_.find({analysis_.options.baseline, capacity});
      if (found != rows_.end()) return found->second->nothing_to_choose ? nullptr : found->second;
    }
    return nullptr;
  }

  bool is_oracle(const SettingKey& key) const {
    const auto found = rows_.find(key);
    return found != rows_.end() && found->second->oracle;
  }

  bool is_apart(const SettingKey& key) const { return contains(analysis_.apart, key); }

  // "tova and recent, which are alike here"
  static std::string names_of(const std::vector<const ComparisonRow*>& winners) {
    constexpr std::size_t kListed = 3;
    std::vector<std::string> names;
    for (const ComparisonRow* row : winners) {
      if (names.size() < kListed) names.push_back(row->key.policy);
    }
    if (winners.size() > kListed) names.push_back(counted(winners.size() - kListed, "other", "others"));
    return enumeration(names);
  }

  const Analysis& analysis_;
  const MeasureTraits& measure_;
  double level_;
  std::map<SettingKey, const ComparisonRow*> rows_;
  std::vector<std::vector<const ComparisonRow*>> best_;          // of each capacity: those that are equally good
  std::vector<std::pair<const ComparisonRow*, double>> larger_;  // better than these, and what most store
  std::set<std::string> policies_;
};

}  // namespace

std::vector<SettingKey> best_settings(const Analysis& analysis) { return Findings(analysis).best_settings(); }

std::vector<std::string> findings(const Analysis& analysis, std::size_t most) {
  const Findings found(analysis);
  std::vector<std::string> sentences;
  for (std::string sentence : {found.best(), found.against_baseline(), found.prediction(), found.goal(), found.step(),
                               found.regret(), found.spans()}) {
    if (!sentence.empty() && sentences.size() < most) sentences.push_back(std::move(sentence));
  }
  return sentences;
}

}  // namespace kvreplay
