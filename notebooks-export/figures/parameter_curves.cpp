// What each numeric parameter changes: a panel per parameter, a line per capacity.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/dot_plot.h"

namespace kvreplay {
namespace {

constexpr std::size_t kCapacities = 4;
constexpr std::size_t kMostPanels = 8;
constexpr std::size_t kMostLines = 40;  // of single settings, behind the mean

// The settings that differ in one parameter alone: by what they agree in.
using Group = std::map<double, const ParameterPoint*>;

struct Panel {
  std::string method;
  std::string parameter;
  std::set<double> values;
  std::map<std::string, std::set<double>> values_at;            // by capacity: not all may be there at all of them
  std::map<std::pair<std::string, std::string>, Group> groups;  // by capacity, and what all other parameters are
  bool has_lines = false;                                       // of single settings, behind a mean
  bool has_intervals = false;                                   // of a setting that is the only one
};

// So that all values of a line are averaged over the same other parameters.
bool is_whole(const Panel& panel, const std::string& capacity, const Group& group) {
  const std::size_t values = panel.values_at.at(capacity).size();
  return values > 1 && group.size() == values;
}

std::string others_of(const ParameterPoint& point, const std::string& parameter) {
  std::string text;
  for (const auto& [name, value] : point.parameters) {
    if (name != parameter) text += fmt::format("{}{}={}", text.empty() ? "" : ", ", name, value);
  }
  return text;
}

std::vector<Panel> panels_of(const std::vector<ParameterPoint>& points, const std::vector<std::string>& capacities) {
  std::vector<Panel> panels;
  for (const ParameterPoint& point : points) {
    if (std::ranges::find(capacities, point.capacity_request) == capacities.end()) continue;
    for (const auto& [name, value] : point.parameters) {
      const auto is_of = [&point, &parameter = name](const Panel& panel) {
        return panel.method == point.method && panel.parameter == parameter;
      };
      auto found = std::ranges::find_if(panels, is_of);
      if (found == panels.end())
        found = panels.insert(
            panels.end(),
            Panel{.method = point.method, .parameter = name, .values = {}, .values_at = {}, .groups = {}});
      found->values.insert(value);
      found->values_at[point.capacity_request].insert(value);
      found->groups[{point.capacity_request, others_of(point, name)}][value] = &point;
    }
  }
  std::erase_if(panels, [](const Panel& panel) {
    return panel.values.size() < 2 || std::ranges::none_of(panel.groups, [&](const auto& entry) {
             return is_whole(panel, entry.first.first, entry.second);
           });
  });
  return panels;
}

// The capacities at which a parameter was varied, ascending.
std::vector<std::string> varied_at(const Analysis& analysis, const FigureStyle& style) {
  std::vector<std::string> capacities;
  for (const std::string& capacity : style.capacities()) {
    if (!panels_of(analysis.parameter_points, {capacity}).empty()) capacities.push_back(capacity);
  }
  return capacities;
}

// How many settings at these capacities are in no line, since what differs from them in one parameter alone does not
// have all its values.
std::size_t in_no_line(const std::vector<ParameterPoint>& points, const std::vector<std::string>& capacities,
                       const std::vector<Panel>& panels) {
  std::set<const ParameterPoint*> drawn;
  for (const Panel& panel : panels) {
    for (const auto& [key, group] : panel.groups) {
      if (!is_whole(panel, key.first, group)) continue;
      for (const auto& [value, point] : group) drawn.insert(point);
    }
  }
  return static_cast<std::size_t>(std::ranges::count_if(points, [&](const ParameterPoint& point) {
    return std::ranges::find(capacities, point.capacity_request) != capacities.end() && !drawn.contains(&point);
  }));
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.options.measure).noun);
  Figure figure;
  figure.name = "parameter-curves";
  const std::vector<std::string> varied = varied_at(analysis, style);
  const std::vector<std::string> capacities = spread(varied, kCapacities);
  std::vector<Panel> panels = panels_of(analysis.parameter_points, capacities);
  const std::size_t uncounted = in_no_line(analysis.parameter_points, capacities, panels);
  std::string left_out;
  if (panels.size() > kMostPanels && !style.asked()) {
    left_out = fmt::format(" Shown are the first {} of {} parameters.", kMostPanels, panels.size());
    for (std::size_t i = kMostPanels; i < panels.size(); ++i) {
      figure.left_out.push_back(fmt::format("{}: {}", panels[i].method, panels[i].parameter));
    }
    panels.resize(kMostPanels);
  }
  figure.table = DataTable({"method", "parameter", "value", "capacity", "others", "mean", "low", "high"});
  bool averaged = false;
  bool thinned = false;
  for (Panel& panel : panels) {
    struct Sum {
      double sum = 0;
      int count = 0;
      Interval interval;
    };
    std::map<std::pair<std::string, double>, Sum> sums;
    std::map<std::string, std::size_t> lines;  // of each capacity
    for (const auto& [key, group] : panel.groups) {
      if (!is_whole(panel, key.first, group)) continue;
      ++lines[key.first];
      for (const auto& [value, point] : group) {
        Sum& sum = sums[{key.first, value}];
        sum.sum += point->mean;
        ++sum.count;
        sum.interval = point->interval;
      }
    }
    for (const auto& [key, sum] : sums) {
      const bool single = sum.count == 1;
      averaged = averaged || !single;
      panel.has_intervals = panel.has_intervals || single;
      figure.table.add({panel.method, panel.parameter, key.second, key.first, std::string("mean"),
                        rounded(sum.sum / sum.count), single ? sum.interval.low : std::nan(""),
                        single ? sum.interval.high : std::nan("")});
    }
    std::map<std::string, std::size_t> drawn;
    for (const auto& [key, group] : panel.groups) {
      if (!is_whole(panel, key.first, group) || lines[key.first] < 2) continue;
      if (++drawn[key.first] > kMostLines) {
        thinned = true;
        continue;
      }
      panel.has_lines = true;
      for (const auto& [value, point] : group) {
        figure.table.add({panel.method, panel.parameter, value, key.first, key.second, rounded(point->mean),
                          std::nan(""), std::nan("")});
      }
    }
  }
  if (figure.table.empty()) return figure;
  const bool bars = std::ranges::any_of(panels, &Panel::has_intervals);
  std::set<std::string> methods;
  for (const Panel& panel : panels) methods.insert(panel.method);
  figure.question = methods.size() == 1 ? fmt::format("What do the parameters of {} change?", *methods.begin())
                                        : "What do the parameters of each method change?";
  figure.caption = fmt::format(
      "The {} against each parameter that was varied.{}{}{} {}{}{}{}{}", measure,
      averaged ? " Thick: mean over those settings of the other parameters that have all values; thin: each of these."
               : "",
      uncounted > 0 ? fmt::format(" {} of the settings {} in no line: others that differ in one parameter alone do not "
                                  "have all its values.",
                                  uncounted, uncounted == 1 ? "is" : "are")
                    : "",
      bars ? fmt::format(" {}", about_intervals(analysis)) : "",
      about_means(analysis, averaged_over(analysis.options.measure)), left_out, capacities_left_out(varied, capacities),
      thinned ? fmt::format(" Of the thin lines, {} per capacity are drawn.", kMostLines) : "",
      panels.size() > 1 ? " The panels share the vertical scale." : "");
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  const std::size_t columns = panels.size() == 1 ? 1 : 2;
  const double width = (style.width() - 6) / static_cast<double>(columns) - 5.2 * style.font();
  spec["columns"] = columns;
  spec["concat"] = Json::array();
  const Json legend = {{"title", "capacity"}, {"direction", "horizontal"}, {"labelExpr", kCapacityLabels}};
  for (const Panel& panel : panels) {
    Json drawn = Json::parse(R"json({
      "encoding": {
        "x": {"field": "value", "type": "quantitative", "axis": {"labelOverlap": "greedy", "labelExpr": "format(datum.value, '~g')", "grid": false}},
        "color": {"field": "capacity", "type": "nominal"}
      },
      "layer": [
        {"transform": [{"filter": "datum.others === 'mean'"}],
         "mark": {"type": "line"},
         "encoding": {"y": {"field": "mean", "type": "quantitative", "scale": {"zero": false}}}},
        {"transform": [{"filter": "datum.others === 'mean'"}],
         "mark": {"type": "point"},
         "encoding": {
           "y": {"field": "mean", "type": "quantitative"},
           "shape": {"field": "capacity", "type": "nominal"},
           "tooltip": [
             {"field": "parameter"}, {"field": "value", "type": "quantitative"}, {"field": "capacity"},
             {"field": "mean", "type": "quantitative", "format": ".4f"}
           ]}}
      ]
    })json");
    drawn["encoding"]["color"]["legend"] = legend;
    drawn["layer"][1]["encoding"]["shape"]["legend"] = legend;
    drawn["layer"][1]["encoding"]["shape"]["scale"] = capacity_shapes(capacities);
    Json& layers = drawn["layer"];
    if (panel.has_intervals) {
      layers.insert(layers.begin(), Json::parse(R"json({
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule"},
        "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
      })json"));
    }
    if (panel.has_lines) {
      Json lines = Json::parse(R"json({
        "transform": [{"filter": "datum.others !== 'mean'"}],
        "mark": {"type": "line", "opacity": 0.35},
        "encoding": {"y": {"field": "mean", "type": "quantitative"}, "detail": {"field": "others", "type": "nominal"}}
      })json");
      lines["mark"]["strokeWidth"] = style.font() / 14;
      layers.insert(layers.begin(), std::move(lines));
    }
    drawn["transform"] = {{{"filter", fmt::format("datum.method === {} && datum.parameter === {}",
                                                  Json(panel.method).dump(), Json(panel.parameter).dump())}}};
    drawn["width"] = width;
    drawn["height"] = columns == 1 ? 0.5 * style.width() : 0.8 * width;
    Json& x = drawn["encoding"]["x"];
    x["axis"]["values"] = panel.values;
    x["axis"]["title"] = methods.size() == 1 ? panel.parameter : fmt::format("{}: {}", panel.method, panel.parameter);
    const double least = *panel.values.begin();
    const double most = *panel.values.rbegin();
    constexpr double kLogFrom = 20;  // a ratio of which equal steps would crowd the small values
    if (least > 0 && most / least >= kLogFrom) {
      x["scale"] = {{"type", "log"}, {"nice", false}};
    } else {
      x["scale"] = {{"zero", false}, {"nice", false}};
    }
    x["scale"]["padding"] = 0.7 * style.font();
    drawn["encoding"]["color"]["scale"] = capacity_colours(capacities);
    const std::string title = panels.size() == 1 ? axis_title(analysis.options.measure) : measure;
    for (Json& layer : drawn["layer"]) layer["encoding"]["y"]["title"] = title;
    spec["concat"].push_back(std::move(drawn));
  }
  spec["resolve"]["scale"]["y"] = "shared";
  filterable(spec, {"capacity"});
  return figure;
}

const FigureRegistration registration({.name = "parameter-curves",
                                       .question = "What do the parameters of each method change?",
                                       .needs = "settings of a method that differ in a number, such as "
                                                "restkv(alpha={0.1:0.9:0.2})",
                                       .order = 100,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
