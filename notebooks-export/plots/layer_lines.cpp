#include "notebooks-export/plots/layer_lines.h"

#include <algorithm>
#include <set>

namespace kvreplay {

void draw_layer_lines(Figure& figure, const FigureStyle& style, const std::string& column, const std::string& title) {
  Json& spec = figure.spec;
  const std::vector<std::string> policies = style.shown_of(distinct(figure.table, "policy"));
  const std::vector<std::string> capacities = distinct(figure.table, "capacity");
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "encoding": {
      "x": {
        "field": "layer", "type": "quantitative",
        "scale": {"nice": false, "zero": false},
        "axis": {"title": "layer", "format": "d"}
      },
      "y": {"type": "quantitative", "scale": {"zero": false}}
    },
    "layer": [
      {"mark": {"type": "line"}, "encoding": {}},
      {
        "mark": {"type": "point"},
        "encoding": {
          "tooltip": [{"field": "policy"}, {"field": "layer", "type": "quantitative", "format": "d"}]
        }
      }
    ]
  })json"));
  spec["width"] = style.width();
  spec["height"] = 0.5 * style.width();
  Json& encoding = spec["encoding"];
  encoding["x"]["axis"]["values"] = integer_ticks(last_of(figure.table, "layer"));
  encoding["x"]["scale"]["padding"] = 0.7 * style.font();
  encoding["y"]["field"] = column;
  encoding["y"]["title"] = title;
  encoding["color"] = style.colour(policies);
  spec["layer"][0]["encoding"]["strokeDash"] = style.dash(policies);
  spec["layer"][1]["mark"]["size"] = 0.25 * style.font() * style.font();
  spec["layer"][1]["encoding"]["shape"] = style.shape(policies);
  spec["layer"][1]["encoding"]["tooltip"].push_back({{"field", column}, {"type", "quantitative"}, {"format", ".4f"}});
  style.choose(spec, "capacity", capacities, style.middle_capacity(capacities));
  filterable(spec, {"policy", "shown_capacity"});
}

std::size_t layers_in(const DataTable& table) {
  const auto& columns = table.columns();
  const auto place = static_cast<std::size_t>(std::ranges::find(columns, "layer") - columns.begin());
  std::set<double> layers;
  for (const std::vector<Cell>& row : table.rows()) layers.insert(std::get<double>(row[place]));
  return layers.size();
}

}  // namespace kvreplay
