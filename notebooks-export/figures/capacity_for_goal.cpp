// How many positions a policy needs to reach a goal.
#include <fmt/format.h>

#include <string_view>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  Figure figure;
  figure.name = "capacity-for-goal";
  if (!analysis.options.goal) return figure;
  const std::string goal = fmt::format("{:.3g}", *analysis.options.goal);
  figure.question = fmt::format("How many positions does each policy need for {} {} of {}?",
                                std::string_view("aeiou").find(measure.front()) == std::string_view::npos ? "a" : "an",
                                measure, goal);
  figure.table = DataTable({"policy", "kept", "bound"});
  std::vector<std::string> policies;  // as the curves are, best first, unless another order was asked for
  std::vector<std::string> replayed;
  std::string never;
  for (const CapacityCurve& curve : analysis.curves) {
    if (!style.shows(curve.policy) || curve.points.size() < 2) continue;
    if (!curve.kept_for_goal) {
      never += (never.empty() ? "" : ", ") + curve.policy;
      continue;
    }
    figure.table.add(
        {curve.policy, rounded(*curve.kept_for_goal), std::string(curve.reached_at_smallest ? "at most" : "about")});
    policies.push_back(curve.policy);
    for (const CapacityPoint& point : curve.points) replayed.push_back(point.capacity_request);
  }
  if (style.asked()) policies = style.shown_of(policies);
  if (figure.table.empty()) return figure;
  figure.caption = fmt::format(
      "Positions per head at which the mean {} reaches {}, read off between the capacities that were replayed, where "
      "ticks stand (log "
      "scale). Hollow: the smallest capacity already reaches it, and less may do.{}{}",
      measure, goal, never.empty() ? "" : fmt::format(" Not reached by {}.", never), style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  const std::size_t fit = style.characters_in(0.45 * style.width());
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "encoding": {
      "y": {"field": "policy", "type": "nominal",
            "axis": {"title": null, "grid": true, "ticks": false, "domain": false}},
      "x": {"field": "kept", "type": "quantitative", "scale": {"type": "log", "base": 2},
            "axis": {"title": "positions per head (log scale)"}}
    },
    "layer": [
      {"mark": {"type": "point", "filled": false},
       "encoding": {
         "fillOpacity": {"condition": {"test": "datum.bound === 'about'", "value": 1}, "value": 0},
         "tooltip": [{"field": "policy"}, {"field": "bound"},
                     {"field": "kept", "type": "quantitative", "format": ".0f", "title": "positions"}]}},
      {"mark": {"type": "text", "align": "left", "aria": false},
       "encoding": {"text": {"field": "kept", "type": "quantitative", "format": ".0f"}}}
    ]
  })json"));
  spec["width"] = style.width();
  rows_of(spec, "policy", policies.size(),
          std::max(2 * style.font(),
                   style.line() * static_cast<double>(FigureStyle::most_lines(policies, fit)) + 0.4 * style.font()));
  spec["encoding"]["x"]["scale"]["padding"] = 3 * style.font();
  style.set_capacity_ticks(spec["encoding"]["x"]["axis"], replayed);
  spec["encoding"]["y"]["sort"] = policies;
  spec["encoding"]["y"]["axis"]["labelExpr"] = style.label_expression(policies, fit);
  spec["encoding"]["y"]["axis"]["labelLineHeight"] = style.line();
  Json& points = spec["layer"][0]["encoding"];
  points["color"] = style.colour(policies);
  points["color"]["legend"] = nullptr;
  points["fill"] = points["color"];
  spec["layer"][1]["mark"]["dx"] = 0.7 * style.font();
  filterable(spec, {"policy"});
  return figure;
}

const FigureRegistration registration({.name = "capacity-for-goal",
                                       .question = "How many positions does each policy need for the same error?",
                                       .needs = "policies that reach the goal within the capacities replayed (--goal)",
                                       .order = 60,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
