#include "notebooks-export/plots/span_cells.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "analysis/weighing.h"

namespace kvreplay {
namespace {

constexpr int kDepths = 10;

std::string depth_text(int range) { return fmt::format("{}–{} %", 100 / kDepths * range, 100 / kDepths * (range + 1)); }

}  // namespace

std::vector<SpanCell> span_cells(const Analysis& analysis, const FigureStyle& style, bool per_layer) {
  struct Means {
    Mean recall;
    Mean kept_share;
  };
  std::map<std::tuple<std::string, std::string, int, int>, Means> means;
  for (const SpanRecall& row : analysis.span_recalls) {
    if (!style.shows(row.policy) || row.capacity_request == kAllPositions || (row.layer >= 0) != per_layer) continue;
    const int range = std::clamp(static_cast<int>(row.depth * kDepths), 0, kDepths - 1);
    auto& [recall, kept_share] = means[{row.policy, row.capacity_request, row.layer, range}];
    recall.add(row.recall, row.weight);
    kept_share.add(row.kept_share, row.weight);
  }
  std::vector<SpanCell> cells;
  for (const auto& [key, of_cell] : means) {
    const auto& [policy, capacity, layer, range] = key;
    cells.push_back({policy, capacity, layer, depth_text(range), rounded(of_cell.recall.value()),
                     rounded(of_cell.kept_share.value()), of_cell.recall.count()});
  }
  return cells;
}

std::vector<std::string> depths_of(const std::vector<SpanCell>& cells) {
  const auto is_there = [&](int range) {
    return std::ranges::find(cells, depth_text(range), &SpanCell::depth) != cells.end();
  };
  int first = 0;
  int last = kDepths - 1;
  while (first < last && !is_there(first)) ++first;
  while (first < last && !is_there(last)) --last;
  std::vector<std::string> depths;
  for (int range = first; range <= last; ++range) depths.push_back(depth_text(range));
  return depths;
}

void draw_span_panels(Figure& figure, const FigureStyle& style, const std::vector<std::string>& policies,
                      const std::vector<std::string>& depths, Json panel) {
  const double labels = 8 * style.font();
  const std::size_t columns = style.panel_columns(policies, labels);
  const double width = style.panel_width(columns, labels);
  panel["width"] = width;
  panel["height"] = 1.3 * style.font() * static_cast<double>(std::max<std::size_t>(depths.size(), 3));
  panel["encoding"].update(Json::parse(R"json({
    "y": {"field": "depth", "type": "nominal", "axis": {"title": "depth"}},
    "color": {"field": "recall", "type": "quantitative", "scale": {"scheme": "cividis", "domain": [0, 1]},
              "legend": {"title": "share kept of the spans", "direction": "horizontal", "format": ".0%"}}
  })json"));
  panel["encoding"]["y"]["scale"] = {{"domain", depths}};
  Json& spec = figure.spec;
  spec["facet"] = {{"field", "policy"}, {"type", "nominal"}, {"sort", policies}};
  spec["facet"]["header"] = {{"title", nullptr},
                             {"labelExpr", style.label_expression(policies, style.characters_in(width))}};
  spec["columns"] = columns;
  spec["spec"] = std::move(panel);
}

std::vector<std::string> policies_of(const FigureStyle& style, const std::vector<SpanCell>& cells) {
  std::vector<std::string> present;
  for (const SpanCell& cell : cells) {
    if (std::ranges::find(present, cell.policy) == present.end()) present.push_back(cell.policy);
  }
  return style.shown_of(present);
}

}  // namespace kvreplay
