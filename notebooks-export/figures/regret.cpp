// How much more error than the oracle: a line per policy.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/capacity_lines.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  Figure figure;
  figure.name = "regret";
  const bool lower = traits_of(analysis.options.measure).lower_is_better;
  figure.question = lower ? fmt::format("How much of the {} could a better choice of positions avoid?", measure)
                          : fmt::format("How much {} could a better choice of positions gain?", measure);
  figure.table = DataTable({"policy", "capacity", "kept", "regret", "low", "high"});
  for (const ComparisonRow& row : analysis.regret) {
    if (!style.shows(row.key.policy) || !row.difference || row.key.capacity_request == kAllPositions) continue;
    figure.table.add({row.key.policy, row.key.capacity_request, rounded(row.kept), row.difference->mean,
                      row.difference->interval.low, row.difference->interval.high});
  }
  if (figure.table.empty()) return figure;
  figure.caption = fmt::format(
      "Regret: {} of a policy less that of {}, which looks at the queries that come after the eviction; 0 is as good "
      "as "
      "the oracle. {} {}{}",
      measure, analysis.oracle, about_means(analysis, averaged_over(analysis.options.measure)),
      about_intervals(analysis), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_capacity_lines(figure, style, "regret", fmt::format("{} less the oracle's", measure));
  return figure;
}

const FigureRegistration registration({.name = "regret",
                                       .question = "How much of the error could a better choice of positions avoid?",
                                       .needs = "an oracle among the policies (--policy oracle-reconstruction)",
                                       .order = 70,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
