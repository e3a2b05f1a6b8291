#include "notebooks-export/plots/head_maps.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace kvreplay {
namespace {

// So that a figure of several maps stays well below 2 MB in every format.
constexpr std::size_t kMostCells = 1024;   // of a map
constexpr std::size_t kMostRows = 16'000;  // of all of them

int parts(int whole, int size) { return (whole + size - 1) / size; }

}  // namespace

HeadCells HeadCells::of(int num_layers, int num_heads, std::size_t most) {
  HeadCells cells;
  const auto count = [&]() {
    return static_cast<std::size_t>(parts(num_layers, cells.layers)) *
           static_cast<std::size_t>(parts(num_heads, cells.heads));
  };
  while (count() > std::max<std::size_t>(most, 1)) {
    if (parts(num_layers, cells.layers) >= parts(num_heads, cells.heads)) {
      cells.layers *= 2;
    } else {
      cells.heads *= 2;
    }
  }
  return cells;
}

std::string add_head_cells(Figure& figure, const std::vector<HeadValue>& values) {
  figure.table = DataTable({"policy", "capacity", "layer", "layer_last", "head", "head_last", "value"});
  int num_layers = 0;
  int num_heads = 0;
  for (const HeadValue& value : values) {
    num_layers = std::max(num_layers, value.layer + 1);
    num_heads = std::max(num_heads, value.head + 1);
  }
  if (values.empty()) return "";
  // Order of the values is kept: policies as they come, capacities within.
  std::map<std::pair<std::string, std::string>, std::size_t> place;
  std::vector<std::map<std::pair<int, int>, std::pair<double, int>>> sums;
  std::vector<std::pair<std::string, std::string>> order;
  for (const HeadValue& value : values) {
    const bool is_new = place.try_emplace({value.policy, value.capacity_request}, order.size()).second;
    if (is_new) order.emplace_back(value.policy, value.capacity_request);
  }
  const HeadCells cells = HeadCells::of(num_layers, num_heads, std::min(kMostCells, kMostRows / order.size()));
  sums.resize(order.size());
  for (const HeadValue& value : values) {
    auto& [sum, count] =
        sums[place[{value.policy, value.capacity_request}]][{value.layer / cells.layers, value.head / cells.heads}];
    sum += value.value;
    ++count;
  }
  for (std::size_t i = 0; i < sums.size(); ++i) {
    for (const auto& [cell, sum] : sums[i]) {
      const int layer = cell.first * cells.layers;
      const int head = cell.second * cells.heads;
      figure.table.add({order[i].first, order[i].second, static_cast<double>(layer),
                        static_cast<double>(std::min(layer + cells.layers, num_layers) - 1), static_cast<double>(head),
                        static_cast<double>(std::min(head + cells.heads, num_heads) - 1),
                        rounded(sum.first / sum.second)});
    }
  }
  if (cells.layers == 1 && cells.heads == 1) return "";
  return fmt::format(" Thinned: a cell is the mean of {} layers and {} heads.", cells.layers, cells.heads);
}

std::vector<std::string> mapped_policies(const FigureStyle& style, const std::vector<HeadValue>& values) {
  std::vector<std::string> present;
  for (const HeadValue& value : values) {
    if (std::ranges::find(present, value.policy) == present.end()) present.push_back(value.policy);
  }
  return style.shown_of(present);
}

void draw_head_maps(Figure& figure, const FigureStyle& style, const std::vector<std::string>& policies,
                    const Json& scale, const std::string& title, const std::string& format) {
  Json& spec = figure.spec;
  const double axis = 4.2 * style.font() + 6;
  const std::size_t columns = style.panel_columns(policies, axis);
  const double panel = style.panel_width(columns, axis);
  const std::size_t fit = style.characters_in(panel);
  const std::vector<std::string> capacities = distinct(figure.table, "capacity");
  spec.update(Json::parse(R"json({
    "transform": [
      {"calculate": "datum.layer - 0.5", "as": "left"},
      {"calculate": "datum.layer_last + 0.5", "as": "right"},
      {"calculate": "datum.head - 0.5", "as": "bottom"},
      {"calculate": "datum.head_last + 0.5", "as": "top"}
    ],
    "facet": {"field": "policy", "type": "nominal", "header": {"title": null}},
    "spec": {
      "mark": {"type": "rect", "aria": false},
      "encoding": {
        "x": {"field": "left", "type": "quantitative", "scale": {"nice": false, "zero": false},
              "axis": {"title": "layer", "grid": false, "format": "d"}},
        "x2": {"field": "right"},
        "y": {"field": "bottom", "type": "quantitative", "scale": {"nice": false, "zero": false},
              "axis": {"title": "query head", "grid": false, "format": "d"}},
        "y2": {"field": "top"},
        "color": {"field": "value", "type": "quantitative", "legend": {"direction": "horizontal"}},
        "tooltip": [
          {"field": "policy"}, {"field": "capacity"},
          {"field": "layer", "type": "quantitative", "format": "d"},
          {"field": "head", "type": "quantitative", "format": "d"},
          {"field": "value", "type": "quantitative"}
        ]
      }
    }
  })json"));
  spec["columns"] = columns;
  spec["facet"]["sort"] = policies;
  spec["facet"]["header"]["labelExpr"] = style.label_expression(policies, fit);
  spec["spec"]["width"] = panel;
  spec["spec"]["height"] = columns == 1 ? 0.5 * panel : 0.8 * panel;
  Json& encoding = spec["spec"]["encoding"];
  encoding["x"]["axis"]["values"] = integer_ticks(last_of(figure.table, "layer_last"));
  encoding["y"]["axis"]["values"] = integer_ticks(last_of(figure.table, "head_last"));
  encoding["color"]["scale"] = scale;
  encoding["color"]["legend"]["title"] = title;
  encoding["color"]["legend"]["format"] = format;
  encoding["tooltip"][4]["format"] = format;
  style.choose(spec, "capacity", capacities, style.middle_capacity(capacities));
  filterable(spec, {"policy", "shown_capacity"});
}

}  // namespace kvreplay
