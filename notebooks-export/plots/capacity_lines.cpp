#include "notebooks-export/plots/capacity_lines.h"

namespace kvreplay {

void draw_capacity_lines(Figure& figure, const FigureStyle& style, const std::string& column,
                         const std::string& title) {
  const std::vector<std::string> policies = style.shown_of(distinct(figure.table, "policy"));
  Json& spec = figure.spec;
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "encoding": {
      "x": {
        "field": "kept", "type": "quantitative",
        "scale": {"type": "log", "base": 2, "nice": false},
        "axis": {"title": "capacity, in positions kept per head (log scale)"}
      }
    },
    "layer": [
      {
        "mark": {"type": "rule"},
        "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
      },
      {
        "mark": {"type": "line"},
        "encoding": {"y": {"type": "quantitative", "scale": {"zero": false}}}
      },
      {
        "mark": {"type": "point"},
        "encoding": {
          "y": {"type": "quantitative"},
          "tooltip": [
            {"field": "policy"}, {"field": "capacity"},
            {"field": "kept", "type": "quantitative", "title": "kept per head", "format": ".1f"},
            {"field": "low", "type": "quantitative", "format": ".4f"},
            {"field": "high", "type": "quantitative", "format": ".4f"}
          ]
        }
      }
    ]
  })json"));
  spec["width"] = style.width();
  spec["height"] = 0.6 * style.width();
  style.set_capacity_ticks(spec["encoding"]["x"]["axis"], distinct(figure.table, "capacity"));
  spec["encoding"]["x"]["scale"]["padding"] = style.font();
  spec["encoding"]["color"] = style.colour(policies);
  // An interval that reaches zero has no place on a logarithmic axis.
  const bool logarithmic = spans_magnitudes(figure.table, {column, "low", "high"});
  for (Json& layer : spec["layer"]) {
    if (logarithmic) layer["encoding"]["y"]["scale"] = {{"type", "log"}, {"nice", false}, {"padding", style.font()}};
  }
  spec["layer"][0]["encoding"]["y"]["title"] = logarithmic ? title + " (log scale)" : title;
  spec["layer"][1]["encoding"]["y"]["field"] = column;
  spec["layer"][1]["encoding"]["strokeDash"] = style.dash(policies);
  Json& points = spec["layer"][2]["encoding"];
  points["y"]["field"] = column;
  points["shape"] = style.shape(policies);
  points["tooltip"].insert(points["tooltip"].begin() + 3,
                           Json{{"field", column}, {"type", "quantitative"}, {"format", ".4f"}});
  if (!has_numbers(figure.table, "low")) spec["layer"].erase(spec["layer"].begin());
  filterable(spec, {"policy"});
}

}  // namespace kvreplay
