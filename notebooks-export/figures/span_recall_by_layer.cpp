// Layer × depth heat maps: in which layers annotated spans survive.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/span_cells.h"

namespace kvreplay {
namespace {

constexpr std::size_t kMostRows = 20'000;

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "span-recall-by-layer";
  figure.question = "In which layers does what matters survive?";
  std::vector<SpanCell> cells = span_cells(analysis, style, true);
  const std::vector<std::string> policies = policies_of(style, cells);
  std::erase_if(cells,
                [&](const SpanCell& cell) { return std::ranges::find(policies, cell.policy) == policies.end(); });
  std::vector<std::string> capacities;
  for (const std::string& capacity : style.capacities()) {
    if (std::ranges::find(cells, capacity, &SpanCell::capacity_request) != cells.end()) capacities.push_back(capacity);
  }
  const std::string capacity = style.middle_capacity(capacities);
  std::string thinned;
  if (cells.size() > kMostRows) {
    std::erase_if(cells, [&](const SpanCell& cell) { return cell.capacity_request != capacity; });
    capacities = {capacity};
    thinned = " Shown is one capacity only: there are too many layers for this table.";
  }
  figure.table = DataTable({"policy", "capacity", "layer", "depth", "recall", "spans"});
  std::set<int> layers;
  for (const SpanCell& cell : cells) {
    figure.table.add({cell.policy, cell.capacity_request, static_cast<double>(cell.layer), cell.depth, cell.recall,
                      static_cast<double>(cell.spans)});
    layers.insert(cell.layer);
  }
  if (layers.size() < 2) figure.table = DataTable({});
  if (figure.table.empty()) return figure;
  figure.caption = fmt::format(
      "Share of an annotated span's positions that is kept in each layer, by where in the prompt the span begins, at a "
      "capacity of {}; mean over spans and query heads.{}{}",
      capacity_text(capacity), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  figure.spec["transform"] = Json::parse(R"json([
    {"calculate": "datum.layer - 0.5", "as": "left"},
    {"calculate": "datum.layer + 0.5", "as": "right"}
  ])json");
  Json panel = Json::parse(R"json({
    "mark": {"type": "rect", "aria": false},
    "encoding": {
      "x": {"field": "left", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "layer", "grid": false, "format": "d"}},
      "x2": {"field": "right"},
      "tooltip": [
        {"field": "policy"}, {"field": "capacity"}, {"field": "layer", "type": "quantitative", "format": "d"},
        {"field": "depth"}, {"field": "recall", "type": "quantitative", "format": ".1%"},
        {"field": "spans", "type": "quantitative", "format": "d"}
      ]
    }
  })json");
  panel["encoding"]["x"]["axis"]["values"] = integer_ticks(last_of(figure.table, "layer"));
  draw_span_panels(figure, style, policies, depths_of(cells), std::move(panel));
  style.choose(figure.spec, "capacity", capacities, capacity);
  filterable(figure.spec, {"policy", "shown_capacity"});
  return figure;
}

const FigureRegistration registration({.name = "span-recall-by-layer",
                                       .question = "In which layers does what matters survive?",
                                       .needs = "traces with annotated spans (capture --spans), of several layers",
                                       .order = 190,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
