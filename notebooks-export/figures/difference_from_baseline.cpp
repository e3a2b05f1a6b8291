// Paired differences from the baseline, a row per policy.
#include <fmt/format.h>

#include <algorithm>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/dot_plot.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  constexpr std::size_t kCapacities = 4;
  const std::string& baseline = analysis.options.baseline;
  const std::string measure(traits_of(analysis.options.measure).noun);
  const std::string level = fmt::format("{:g} %", 100 * analysis.options.bootstrap.confidence);
  Figure figure;
  figure.name = "difference-from-baseline";
  figure.question = fmt::format("Which policies differ from {}, and how sure is that?", baseline);
  figure.table = DataTable(
      {"policy", "capacity", "difference", "low", "high", "relative", "wins", "p_value", "adjusted", "pairs", "sure"});
  const std::vector<std::string> capacities = spread(style.capacities(), kCapacities);
  std::vector<std::string> policies;
  for (const std::string& policy : style.policies()) {
    for (const ComparisonRow& row : analysis.comparison) {
      if (row.key.policy != policy || !row.difference ||
          std::ranges::find(capacities, row.key.capacity_request) == capacities.end()) {
        continue;
      }
      const PairedDifference& paired = *row.difference;
      const bool sure = paired.adjusted < 1 - analysis.options.bootstrap.confidence;
      figure.table.add({policy, row.key.capacity_request, paired.mean, paired.interval.low, paired.interval.high,
                        paired.relative, paired.wins, paired.p_value, paired.adjusted,
                        static_cast<double>(paired.pairs), std::string(sure ? "yes" : "no")});
      if (policies.empty() || policies.back() != policy) policies.push_back(policy);
    }
  }
  if (figure.table.empty()) return figure;
  figure.caption = fmt::format(
      "Difference in {} from {}, paired on {}; {} is better. {} Filled: sure at {} after correction for the number of "
      "comparisons (Holm).{}{}",
      measure, baseline, paired_on(analysis.options.measure),
      traits_of(analysis.options.measure).lower_is_better ? "left" : "right", about_intervals(analysis), level,
      capacities_left_out(style.capacities(), capacities), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_dots(figure, style,
            {.subject = "policy",
             .subjects = policies,
             .capacities = capacities,
             .title = fmt::format("difference in {}", measure)});
  filterable(figure.spec, {"policy", "capacity"});
  return figure;
}

const FigureRegistration registration({.name = "difference-from-baseline",
                                       .question = "Which policies differ from the baseline, and how sure is that?",
                                       .needs = "a baseline that was replayed on the same traces (--baseline)",
                                       .order = 20,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
