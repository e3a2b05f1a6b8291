// A line per policy over the tokens that come, with a band over the layers.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/step_lines.h"

namespace kvreplay {
namespace {

constexpr const char* kQuestion = "How does the error grow while tokens come?";

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "error-over-steps";
  figure.question = kQuestion;
  const std::string thinned = add_time_courses(figure, style, analysis.time_courses, Measure::layer_error);
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "The layer error of each token's query at a capacity of {}, mean over layers, traces and eviction positions. "
      "Bands hold half of the layers and traces.{}{}{}",
      capacity_text(capacity), steps_thinned(figure.table), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_step_lines(figure, style, axis_title(Measure::layer_error));
  return figure;
}

const FigureRegistration registration({.name = "error-over-steps",
                                       .question = kQuestion,
                                       .needs = "policies with a schedule, such as snapkv+every(64)",
                                       .order = 191,
                                       .draw = draw,
                                       .over_time = true});

}  // namespace
}  // namespace kvreplay
