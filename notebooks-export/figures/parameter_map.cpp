// Two parameters against each other: α × β for restkv.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

// The two parameters of a method to map: α and β where both vary, else the first two of which every pair is there.
std::pair<std::string, std::string> pair_of(const std::vector<const ParameterPoint*>& points) {
  std::vector<std::string> names;
  for (const auto& [name, value] : points.front()->parameters) {
    std::set<double> values;
    for (const ParameterPoint* point : points) {
      for (const auto& [other, number] : point->parameters) {
        if (other == name) values.insert(number);
      }
    }
    if (values.size() > 1) names.push_back(name);
  }
  const auto has = [&](const char* name) { return std::ranges::find(names, name) != names.end(); };
  if (has("alpha") && has("beta")) return {"alpha", "beta"};
  if (names.size() >= 2) return {names[0], names[1]};
  return {};
}

double value_of(const ParameterPoint& point, const std::string& name) {
  const auto found = std::ranges::find(point.parameters, name, &std::pair<std::string, double>::first);
  return found == point.parameters.end() ? std::nan("") : found->second;
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  const bool lower = traits_of(analysis.options.measure).lower_is_better;
  Figure figure;
  figure.name = "parameter-map";
  std::vector<std::string> methods;
  std::map<std::string, std::vector<const ParameterPoint*>> of_method;
  for (const ParameterPoint& point : analysis.parameter_points) {
    if (!of_method.contains(point.method)) methods.push_back(point.method);
    of_method[point.method].push_back(&point);
  }
  const auto mapped = std::ranges::find_if(
      methods, [&](const std::string& method) { return !pair_of(of_method[method]).first.empty(); });
  if (mapped == methods.end()) return figure;
  const auto [across, up] = pair_of(of_method[*mapped]);
  struct Sum {
    double sum = 0;
    int count = 0;
  };
  std::map<std::tuple<std::string, double, double>, Sum> sums;
  std::set<double> xs;
  std::set<double> ys;
  for (const ParameterPoint* point : of_method[*mapped]) {
    const double x = value_of(*point, across);
    const double y = value_of(*point, up);
    Sum& sum = sums[{point->capacity_request, x, y}];
    sum.sum += point->mean;
    ++sum.count;
    xs.insert(x);
    ys.insert(y);
  }
  std::map<std::string, double> best;
  int most = 1;
  for (const auto& [key, sum] : sums) {
    const double mean = sum.sum / sum.count;
    const auto [found, is_new] = best.try_emplace(std::get<0>(key), mean);
    if (!is_new) found->second = lower ? std::min(found->second, mean) : std::max(found->second, mean);
    most = std::max(most, sum.count);
  }
  figure.table = DataTable({"method", "capacity", across, up, "mean", "settings", "best"});
  for (const auto& [key, sum] : sums) {
    const auto& [capacity, x, y] = key;
    const double mean = sum.sum / sum.count;
    figure.table.add({*mapped, capacity, x, y, rounded(mean), static_cast<double>(sum.count),
                      std::string(mean == best[capacity] ? "yes" : "no")});
  }
  const std::vector<std::string> having = distinct(figure.table, "capacity");
  std::vector<std::string> capacities;
  for (const std::string& capacity : style.capacities()) {
    if (std::ranges::find(having, capacity) != having.end()) capacities.push_back(capacity);
  }
  const std::string capacity = style.middle_capacity(capacities);
  figure.question = fmt::format("Which {} and {} suit {}?", across, up, *mapped);
  figure.caption = fmt::format(
      "The {} for each {} and {} at a capacity of {}; the outlined one is the best.{} {}", measure, across, up,
      capacity_text(capacity),
      most > 1 ? fmt::format(" A cell is the mean over up to {} settings of the other parameters.", most) : "",
      about_means(analysis, "layers, heads and evaluation queries"));
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
