#include "notebooks-export/plots/dot_plot.h"

#include <algorithm>

namespace kvreplay {

std::vector<std::string> spread(const std::vector<std::string>& capacities, std::size_t most) {
  if (capacities.size() <= most) return capacities;
  std::vector<std::string> chosen;
  for (std::size_t i = 0; i < most; ++i) {
    chosen.push_back(capacities[i * (capacities.size() - 1) / (most - 1)]);
  }
  return chosen;
}

void draw_dots(Figure& figure, const FigureStyle& style, const DotPlot& plot) {
  Json& spec = figure.spec;
  const std::size_t fit = style.characters_in(0.42 * style.width());
  const auto rows = std::max<double>(static_cast<double>(plot.capacities.size()),
                                     static_cast<double>(FigureStyle::most_lines(plot.subjects, fit)));
  Json row = Json::parse(R"json({
    "y": {"type": "nominal", "axis": {"title": null, "grid": true, "tickBand": "extent", "domain": false}},
    "yOffset": {"field": "capacity", "type": "nominal"},
    "color": {"field": "capacity", "type": "nominal", "legend": {"title": "capacity", "direction": "horizontal"}}
  })json");
  row["color"]["legend"]["labelExpr"] = kCapacityLabels;
  row["y"]["field"] = plot.subject;
  row["y"]["sort"] = plot.subjects;
  row["y"]["axis"]["labelExpr"] = style.label_expression(plot.subjects, fit);
  row["y"]["axis"]["labelLineHeight"] = style.line();
  row["yOffset"]["sort"] = plot.capacities;
  row["color"]["scale"] = capacity_colours(plot.capacities);
  row["color"]["sort"] = plot.capacities;
  if (plot.capacities.size() == 1) row.erase("yOffset");
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "layer": [
      {"mark": {"type": "rule", "color": "#888888"},
       "encoding": {"x": {"datum": 0, "type": "quantitative"}}},
      {"mark": {"type": "rule"},
       "encoding": {"x": {"field": "low", "type": "quantitative", "axis": {"tickCount": 6}}, "x2": {"field": "high"}}},
      {"mark": {"type": "point", "filled": false},
       "encoding": {
         "x": {"field": "difference", "type": "quantitative"},
         "fill": {"value": "white"},
         "shape": {"field": "capacity", "type": "nominal"},
         "tooltip": [
           {"field": "capacity"},
           {"field": "difference", "type": "quantitative", "format": "+.4f"},
           {"field": "low", "type": "quantitative", "format": "+.4f"},
           {"field": "high", "type": "quantitative", "format": "+.4f"},
           {"field": "sure", "title": "interval excludes 0, corrected"}
         ]
       }}
    ]
  })json"));
  for (const std::size_t layer : {1, 2}) spec["layer"][layer]["encoding"].update(row);
  spec["width"] = style.width();
  rows_of(spec, plot.subject, plot.subjects.size(),
          std::max(1.15 * style.font() * rows + 0.4 * style.font(), 1.6 * style.font()));
  for (const std::size_t layer : {1, 2}) spec["layer"][layer]["encoding"]["x"]["title"] = plot.title;
  Json& dots = spec["layer"][2]["encoding"];
  Json filled = row["color"];
  filled["test"] = "datum.sure === 'yes'";
  dots["fill"]["condition"] = std::move(filled);
  dots["shape"]["legend"] = row["color"]["legend"];
  dots["shape"]["scale"] = capacity_shapes(plot.capacities);
  dots["tooltip"].insert(dots["tooltip"].begin(), Json{{"field", plot.subject}});
  if (!has_numbers(figure.table, "low")) spec["layer"].erase(1);
}

}  // namespace kvreplay
