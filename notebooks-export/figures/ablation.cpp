// What each step of a method contributes: a dot plot of one change at a time.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/dot_plot.h"

namespace kvreplay {
namespace {

constexpr std::size_t kCapacities = 4;
constexpr std::size_t kMostChanges = 24;

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  Figure figure;
  figure.name = "ablation";
  std::set<std::string> references;
  std::map<std::string, double> largest;  // of each label
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer < 0) references.insert(effect.reference);
  }
  const auto label_of = [&](const StepEffect& effect) {
    return references.size() == 1 ? effect.change : fmt::format("{}: {}", effect.reference, effect.change);
  };
  std::vector<std::string> labels;
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer >= 0) continue;
    const std::string label = label_of(effect);
    if (!largest.contains(label)) labels.push_back(label);
    largest[label] = std::max(largest[label], std::abs(effect.difference.mean));
  }
  figure.table = DataTable({"change", "reference", "changed", "step", "capacity", "difference", "low", "high",
                            "relative", "p_value", "adjusted", "sure"});
  std::string left_out;
  if (labels.size() > kMostChanges && !style.asked()) {
    std::vector<std::string> by_size = labels;
    std::ranges::stable_sort(by_size, [&](const auto& a, const auto& b) { return largest[a] > largest[b]; });
    left_out = fmt::format(" Shown are the {} changes of {} with the largest effects.", kMostChanges, labels.size());
    figure.left_out.assign(by_size.begin() + kMostChanges, by_size.end());
    std::erase_if(labels, [&](const std::string& label) {
      return std::ranges::find(figure.left_out, label) != figure.left_out.end();
    });
  }
  std::vector<std::string> having;
  for (const std::string& capacity : style.capacities()) {
    const auto has = [&](const StepEffect& effect) { return effect.layer < 0 && effect.capacity_request == capacity; };
    if (std::ranges::any_of(analysis.step_effects, has)) having.push_back(capacity);
  }
  const std::vector<std::string> shown = spread(having, kCapacities);
  for (const std::string& label : labels) {
    for (const StepEffect& effect : analysis.step_effects) {
      if (effect.layer >= 0 || label_of(effect) != label ||
          std::ranges::find(shown, effect.capacity_request) == shown.end()) {
        continue;
      }
      const PairedDifference& paired = effect.difference;
      figure.table.add({label, effect.reference, effect.changed, effect.step, effect.capacity_request, paired.mean,
                        paired.interval.low, paired.interval.high, paired.relative, paired.p_value, paired.adjusted,
                        std::string(paired.adjusted < 1 - analysis.options.bootstrap.confidence ? "yes" : "no")});
    }
  }
  if (figure.table.empty()) return figure;
  const std::string reference = references.size() == 1 ? *references.begin() : "a method";
  figure.question = fmt::format("What does each step of {} contribute?", reference);
  figure.caption = fmt::format(
      "Change in {} where one thing about {} is changed and everything else stays: {} of 0, the change does harm. "
      "Paired on {}. {} Filled: sure after correction for the number of changes (Holm).{}{}",
      measure, reference, traits_of(analysis.options.measure).lower_is_better ? "right" : "left",
      paired_on(analysis.options.measure), about_intervals(analysis), left_out, capacities_left_out(having, shown));
  figure.spec = style.spec(figure.question, figure.caption);
  draw_dots(figure, style,
            {.subject = "change",
             .subjects = distinct(figure.table, "change"),
             .capacities = shown,
             .title = fmt::format("difference in {}", measure)});
  filterable(figure.spec, {"capacity"});
  return figure;
}

const FigureRegistration registration({.name = "ablation",
                                       .question = "What does each step of a method contribute?",
                                       .needs = "settings of one method that differ in one thing, such as "
                                                "restkv(temporal={ema,mean})",
                                       .order = 80,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
