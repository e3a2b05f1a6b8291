// Survival curves: how much of annotated spans is still cached, over the tokens that come.
#include <fmt/format.h>

#include <algorithm>

#include "base/printable.h"
#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/step_lines.h"

namespace kvreplay {
namespace {

constexpr const char* kQuestion = "How long does what matters stay in the cache?";
constexpr std::size_t kMostRows = 20'000;
constexpr const char* kAllSpans = "all spans";

std::string span_text(const SpanSurvival& survival, bool several_traces) {
  if (survival.trace.empty()) return kAllSpans;
  return fmt::format("{} at {}{}", survival.label.empty() ? "span" : survival.label, survival.start,
                     several_traces ? fmt::format(" in {}", survival.trace) : "");
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "span-survival";
  figure.question = kQuestion;
  std::vector<const SpanSurvival*> shown;
  std::vector<std::string> traces;
  std::vector<std::string> capacities;
  for (const SpanSurvival& survival : analysis.span_survivals) {
    if (!style.shows(survival.policy)) continue;
    shown.push_back(&survival);
    capacities.push_back(survival.capacity_request);
    if (!survival.trace.empty() && std::ranges::find(traces, survival.trace) == traces.end()) {
      traces.push_back(survival.trace);
    }
  }
  const auto rows = [&shown]() {
    std::size_t sum = 0;
    for (const SpanSurvival* survival : shown) sum += survival->points.size();
    return sum;
  };
  // As much to choose from as fits: the mean over all spans at least.
  std::string thinned;
  if (rows() > kMostRows) {
    std::erase_if(shown, [](const SpanSurvival* survival) { return !survival->trace.empty(); });
    thinned += " Single spans are left out.";
  }
  if (rows() > kMostRows) {
    const std::string capacity = style.middle_capacity(capacities);
    std::erase_if(shown, [&](const SpanSurvival* survival) { return survival->capacity_request != capacity; });
    thinned += " Drawn is one capacity only.";
  }
  figure.table = DataTable({"policy", "capacity", "span", "step", "last_step", "mean"});
  for (const SpanSurvival* survival : shown) {
    for (const SpanSurvival::Point& point : survival->points) {
      figure.table.add({survival->policy, survival->capacity_request, span_text(*survival, traces.size() > 1),
                        static_cast<double>(point.first_step), static_cast<double>(point.last_step),
                        rounded(point.share)});
    }
  }
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Share of the positions of annotated spans that the query of each token still sees, at a capacity of {}: mean "
      "over layers, heads and spans.{}{}{}",
      capacity_text(capacity), steps_thinned(figure.table), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_step_lines(figure, style, axis_title(Measure::span_survival));
  style.choose(figure.spec, "span", distinct(figure.table, "span"), kAllSpans);
  return figure;
}

const FigureRegistration registration(
    {.name = "span-survival",
     .question = kQuestion,
     .needs = "policies with a schedule on traces with annotated spans (capture --spans)",
     .order = 195,
     .draw = draw,
     .over_time = true});

}  // namespace
}  // namespace kvreplay
