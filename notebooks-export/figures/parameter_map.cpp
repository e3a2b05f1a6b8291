// Two parameters of a method against each other.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "analysis/parameter_grid.h"
#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

using Points = std::vector<const ParameterPoint*>;

// "; window=32", "; the mean over window=16 and window=32", and what does not count: what cells have in common.
std::string about_others(const ParameterGrid& grid, const std::string& capacity) {
  std::string text;
  if (grid.others.size() == 1 && !grid.others.front().empty()) {
    text = fmt::format(" At a capacity of {} all have {}.", capacity_text(capacity), grid.others.front());
  } else if (grid.others.size() > 1) {
    text = fmt::format(" A cell is the mean over {} settings of the other parameters, the same ones in every cell.",
                       grid.others.size());
  }
  if (grid.left_out > 0) {
    text += fmt::format(" Left out {} {} setting{} of other parameters, which not all cells have.",
                        grid.left_out == 1 ? "is" : "are", grid.left_out, grid.left_out == 1 ? "" : "s");
  }
  return text;
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  const bool lower = traits_of(analysis.options.measure).lower_is_better;
  Figure figure;
  figure.name = "parameter-map";
  std::vector<std::string> methods;
  std::map<std::string, std::map<std::string, Points>> of_method;  // by capacity
  for (const ParameterPoint& point : analysis.parameter_points) {
    if (!of_method.contains(point.method)) methods.push_back(point.method);
    of_method[point.method][point.capacity_request].push_back(&point);
  }
  // The first method with a map, and the pair of parameters of which a capacity has the most cells.
  std::string mapped;
  std::vector<std::string> pair;
  std::size_t most_cells = 0;
  for (const std::string& method : methods) {
    if (!pair.empty()) break;
    for (const auto& [capacity, points] : of_method[method]) {
      const std::vector<std::string> widest = widest_pair(points);
      const std::size_t cells = widest.empty() ? 0 : parameter_grid(points, widest).cells.size();
      if (cells <= most_cells) continue;
      most_cells = cells;
      mapped = method;
      pair = widest;
    }
  }
  if (pair.empty()) return figure;
  const std::string& across = pair[0];
  const std::string& up = pair[1];
  std::map<std::string, ParameterGrid> grids;  // by capacity
  std::set<double> ys;
  figure.table = DataTable({"method", "capacity", across, up, "mean", "settings", "best"});
  for (const auto& [capacity, points] : of_method[mapped]) {
    const ParameterGrid& grid = grids[capacity] = parameter_grid(points, pair);
    const auto mean_of = [lower](const GridCell& cell) { return lower ? cell.mean : -cell.mean; };
    const double best = std::ranges::min_element(grid.cells, {}, mean_of)->mean;
    for (const GridCell& cell : grid.cells) {
      ys.insert(cell.at[1]);
      figure.table.add({mapped, capacity, cell.at[0], cell.at[1], rounded(cell.mean),
                        static_cast<double>(cell.settings), std::string(cell.mean == best ? "yes" : "no")});
    }
  }
  const std::vector<std::string> having = distinct(figure.table, "capacity");
  std::vector<std::string> capacities;
  for (const std::string& capacity : style.capacities()) {
    if (std::ranges::find(having, capacity) != having.end()) capacities.push_back(capacity);
  }
  const std::string capacity = style.middle_capacity(capacities);
  figure.question = fmt::format("Which {} and {} suit {}?", across, up, mapped);
  figure.caption = fmt::format("The {} for each {} and {} at a capacity of {}; the outlined one is the best.{} {}",
                               measure, across, up, capacity_text(capacity), about_others(grids.at(capacity), capacity),
                               about_means(analysis, averaged_over(analysis.options.measure)));
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "encoding": {
      "x": {"type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": "greedy", "format": "~g"}},
      "y": {"type": "ordinal", "sort": "descending", "axis": {"labelOverlap": "greedy", "format": "~g"}}
    },
    "layer": [
      {"mark": {"type": "rect", "aria": false},
       "encoding": {
         "color": {"field": "mean", "type": "quantitative", "legend": {"direction": "horizontal", "format": ".3f"}},
         "tooltip": [
           {"field": "mean", "type": "quantitative", "format": ".4f"},
           {"field": "settings", "type": "quantitative", "format": "d"}, {"field": "capacity"}
         ]}},
      {"transform": [{"filter": "datum.best === 'yes'"}],
       "mark": {"type": "rect", "filled": false, "stroke": "#d55e00"}}
    ]
  })json"));
  constexpr double kMostRows = 16;
  spec["width"] = style.width();
  spec["height"] = std::min(1.9 * style.font() * static_cast<double>(ys.size()), 1.9 * style.font() * kMostRows);
  for (const auto& [axis, name] : {std::pair{"x", across}, {"y", up}}) {
    spec["encoding"][axis]["field"] = name;
    spec["encoding"][axis]["axis"]["title"] = name;
    Json& tooltip = spec["layer"][0]["encoding"]["tooltip"];
    tooltip.insert(tooltip.begin(), Json{{"field", name}, {"type", "quantitative"}});
  }
  spec["layer"][0]["encoding"]["color"]["legend"]["title"] = axis_title(analysis.options.measure);
  spec["layer"][0]["encoding"]["color"]["scale"] = {{"scheme", "cividis"}, {"zero", false}};
  spec["layer"][1]["mark"]["strokeWidth"] = style.font() / 4;
  style.choose(spec, "capacity", capacities, capacity);
  filterable(spec, {"shown_capacity"});
  return figure;
}

const FigureRegistration registration({.name = "parameter-map",
                                       .question = "Which two parameters suit a method?",
                                       .needs = "settings of a method that differ in two numbers, such as "
                                                "restkv(alpha={0.1,0.5},beta={500,2000})",
                                       .order = 110,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
