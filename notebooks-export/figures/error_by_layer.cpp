// A line per policy over the layers.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/layer_lines.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.layer_measure).noun);
  Figure figure;
  figure.name = "error-by-layer";
  figure.question = fmt::format("In which layers is the {} {}?", measure,
                                traits_of(analysis.layer_measure).lower_is_better ? "made" : "lost");
  figure.table = DataTable({"policy", "capacity", "layer", "mean", "low", "high"});
  for (const ComparisonRow& row : analysis.by_layer) {
    if (!style.shows(row.key.policy) || row.key.capacity_request == kAllPositions) continue;
    figure.table.add({row.key.policy, row.key.capacity_request, static_cast<double>(row.key.layer),
                      rounded(row.distribution.mean), rounded(row.interval.low), rounded(row.interval.high)});
  }
  if (layers_in(figure.table) < 2) figure.table = DataTable({});
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format("The {} of each layer at a capacity of {}. {}{}", measure, capacity_text(capacity),
                               about_means(analysis, "heads and evaluation queries"), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_layer_lines(figure, style, "mean", axis_title(analysis.layer_measure));
  return figure;
}

const FigureRegistration registration({.name = "error-by-layer",
                                       .question = "In which layers is the error made?",
                                       .needs = "what a replay measures, in two layers or more",
                                       .order = 30,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
