// Late hits over the tokens that come.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/step_lines.h"

namespace kvreplay {
namespace {

constexpr const char* kQuestion = "How much attention goes to what is gone?";

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "late-hits-over-steps";
  figure.question = kQuestion;
  const std::string thinned = add_time_courses(figure, style, analysis.time_courses, Measure::late_hits);
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Share of the full cache's attention that the query of each token pays to evicted positions, at a capacity of "
      "{}: mean over layers, heads, traces and eviction positions. Bands hold half of the layers and traces.{}{}{}",
      capacity_text(capacity), steps_thinned(figure.table), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_step_lines(figure, style, axis_title(Measure::late_hits));
  return figure;
}

const FigureRegistration registration({.name = "late-hits-over-steps",
                                       .question = kQuestion,
                                       .needs = "policies with a schedule, such as snapkv+every(64)",
                                       .order = 193,
                                       .draw = draw,
                                       .over_time = true});

}  // namespace
}  // namespace kvreplay
