// A matrix: how far policies keep the same positions.
#include <fmt/format.h>

#include <algorithm>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

constexpr std::size_t kMostRows = 20'000;

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "policy-overlap";
  figure.question = "Do the policies keep the same positions?";
  std::vector<std::string> present;
  for (const PolicyOverlap& row : analysis.overlaps) {
    for (const std::string& policy : {row.policy, row.other}) {
      if (std::ranges::find(present, policy) == present.end()) present.push_back(policy);
    }
  }
  const std::vector<std::string> policies = style.shown_of(present);
  const auto number = [&](const std::string& policy) {
    return static_cast<std::size_t>(std::ranges::find(policies, policy) - policies.begin()) + 1;
  };
  std::vector<const PolicyOverlap*> rows;
  for (const PolicyOverlap& row : analysis.overlaps) {
    if (number(row.policy) <= policies.size() && number(row.other) <= policies.size()) rows.push_back(&row);
  }
  std::string thinned;
  if (rows.size() > kMostRows) {
    std::erase_if(rows, [](const PolicyOverlap* row) { return row->layer >= 0; });
    thinned = " Single layers are left out: there are too many for this table.";
  }
  figure.table = DataTable({"capacity", "layer", "policy", "other", "row", "column", "jaccard", "containment"});
  std::vector<std::string> labels;
  for (const std::string& policy : policies) labels.push_back(fmt::format("{}  {}", number(policy), policy));
  for (const PolicyOverlap* row : rows) {
    figure.table.add({row->capacity_request, row->layer < 0 ? std::string("all") : fmt::format("{}", row->layer),
                      row->policy, row->other, labels[number(row->policy) - 1], fmt::format("{}", number(row->other)),
                      rounded(row->jaccard), rounded(row->containment)});
  }
  if (policies.size() < 2) figure.table = DataTable({});
  if (figure.table.empty()) return figure;
  const std::vector<std::string> capacities = distinct(figure.table, "capacity");
  const std::vector<std::string> layers = distinct(figure.table, "layer");
  const std::string capacity = style.middle_capacity(capacities);
  figure.caption = fmt::format(
      "Jaccard overlap |a ∩ b| / |a ∪ b| of the kept sets of two policies at a capacity of {}, all layers: 1 where "
      "both "
      "keep the same. Means over traces, eviction positions, layers and query heads. Columns are numbered like the "
      "rows.{}{}",
      capacity_text(capacity), thinned, style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  const std::size_t fit = style.characters_in(0.45 * style.width());
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "transform": [],
    "encoding": {
      "x": {"field": "column", "type": "nominal",
            "axis": {"title": null, "orient": "top", "labelAngle": 0, "ticks": false, "domain": false}},
      "y": {"field": "row", "type": "nominal", "axis": {"title": null, "ticks": false, "domain": false}}
    },
    "layer": [
      {
        "mark": {"type": "rect"},
        "encoding": {
          "color": {"field": "jaccard", "type": "quantitative", "scale": {"scheme": "cividis", "domain": [0, 1]},
                    "legend": {"title": "Jaccard overlap of kept sets", "direction": "horizontal", "format": ".1f"}},
          "tooltip": [
            {"field": "policy"}, {"field": "other"}, {"field": "capacity"}, {"field": "layer"},
            {"field": "jaccard", "type": "quantitative", "format": ".3f"},
            {"field": "containment", "type": "quantitative", "format": ".3f"}
          ]
        }
      },
      {
        "mark": {"type": "text", "aria": false},
        "encoding": {
          "text": {"field": "jaccard", "type": "quantitative", "format": ".2f"},
          "color": {"condition": {"test": "datum.jaccard > 0.55", "value": "#000000"}, "value": "#ffffff"}
        }
      }
    ]
  })json"));
  spec["width"] = style.width();
  rows_of(spec, "row", labels.size(),
          std::max(1.9 * style.font(),
                   style.line() * static_cast<double>(FigureStyle::most_lines(labels, fit)) + 0.4 * style.font()));
  std::vector<std::string> numbers;
  for (std::size_t i = 1; i <= policies.size(); ++i) numbers.push_back(fmt::format("{}", i));
  spec["encoding"]["x"]["sort"] = numbers;
  spec["encoding"]["y"]["sort"] = labels;
  spec["encoding"]["y"]["axis"]["labelExpr"] = style.label_expression(labels, fit);
  spec["encoding"]["y"]["axis"]["labelLineHeight"] = style.line();
  // Numbers as long as they fit into a cell.
  constexpr double kDigits = 2.2;  // widths of a letter's height: "0.85" and what is around it
  const double cell = (0.97 * style.width() - style.text_width(FigureStyle::longest_line(labels, fit))) /
                      static_cast<double>(policies.size());
  const double size = std::min(style.font(), cell / kDigits);
  if (size < 0.7 * style.font()) {
    spec["layer"].erase(1);
  } else {
    spec["layer"][1]["mark"]["fontSize"] = size;
  }
  style.choose(spec, "capacity", capacities, capacity);
  style.choose(spec, "layer", layers, layers.front());
  filterable(spec, {"policy", "shown_capacity", "shown_layer"});
  return figure;
}

const FigureRegistration registration(
    {.name = "policy-overlap",
     .question = "Do the policies keep the same positions?",
     .needs = "overlaps of two policies or more, which `replay` writes and sweeps do not",
     .order = 120,
     .draw = draw});

}  // namespace
}  // namespace kvreplay
