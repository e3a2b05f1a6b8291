// How many positions are cached over the tokens that come.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/step_lines.h"

namespace kvreplay {
namespace {

constexpr const char* kQuestion = "How large is the cache while tokens come?";

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "cache-size-over-steps";
  figure.question = kQuestion;
  const std::string thinned = add_time_courses(figure, style, analysis.time_courses, Measure::cache_size);
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Positions that the query of each token sees, its own included, at a capacity of {}: mean over layers, heads, "
      "traces and eviction positions. Bands hold half of the layers and traces.{}{}{}",
      capacity_text(capacity), steps_thinned(figure.table), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_step_lines(figure, style, axis_title(Measure::cache_size));
  return figure;
}

const FigureRegistration registration({.name = "cache-size-over-steps",
                                       .question = kQuestion,
                                       .needs = "policies with a schedule, such as snapkv+every(64)",
                                       .order = 192,
                                       .draw = draw,
                                       .over_time = true});

}  // namespace
}  // namespace kvreplay
