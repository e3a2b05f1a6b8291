// A line per policy: the measure against the positions that were kept.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/capacity_lines.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "error-against-capacity";
  const std::string measure(traits_of(analysis.options.measure).noun);
  figure.question = fmt::format("What {} does each policy have at each capacity?", measure);
  figure.table = DataTable({"policy", "capacity", "kept", "kept_share", "mean", "low", "high"});
  bool partial = false;
  for (const CapacityCurve& curve : analysis.curves) {
    if (!style.shows(curve.policy)) continue;
    partial = partial || curve.partial;
    for (const CapacityPoint& point : curve.points) {
      figure.table.add({curve.policy, point.capacity_request, rounded(point.kept), rounded(point.kept_share),
                        point.mean, point.interval.low, point.interval.high});
    }
  }
  if (figure.table.empty()) return figure;
  figure.caption =
      fmt::format("The {} against the positions that a head keeps. {}{} {}{}", measure,
                  about_means(analysis, averaged_over(analysis.options.measure)),
                  partial ? " Traces and eviction positions that lack one of a policy's capacities are left out." : "",
                  about_intervals(analysis), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_capacity_lines(figure, style, "mean", axis_title(analysis.options.measure));
  return figure;
}

const FigureRegistration registration({.name = "error-against-capacity",
                                       .question = "What error does each policy make at each capacity?",
                                       .needs = "policies that were replayed at a capacity",
                                       .order = 10,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
