// Depth × capacity heat maps: what survives of annotated spans.
#include <fmt/format.h>

#include <algorithm>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/span_cells.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "needle-depth";
  figure.question = "Does what matters survive, wherever in the prompt it stands?";
  std::vector<SpanCell> cells = span_cells(analysis, style, false);
  const std::vector<std::string> policies = policies_of(style, cells);
  figure.table = DataTable({"policy", "capacity", "depth", "recall", "kept_share", "spans"});
  for (const SpanCell& cell : cells) {
    if (std::ranges::find(policies, cell.policy) == policies.end()) continue;
    figure.table.add({cell.policy, cell.capacity_request, cell.depth, cell.recall, cell.kept_share,
                      static_cast<double>(cell.spans)});
  }
  if (figure.table.empty()) return figure;
  const std::size_t places =
      policies.size() * distinct(figure.table, "capacity").size() * distinct(figure.table, "depth").size();
  figure.caption = fmt::format(
      "Share of an annotated span's positions that is kept, by where in the prompt it begins (0 % is the beginning); "
      "mean over spans, layers and query heads. Chance keeps the same share of spans as of the prompt, which the table "
      "has beside it.{}{}",
      figure.table.rows().size() < places ? " Empty: no span there, or not replayed." : "", style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  Json panel = Json::parse(R"json({
    "mark": {"type": "rect"},
    "encoding": {
      "x": {"field": "capacity", "type": "nominal", "axis": {"title": "capacity", "labelAngle": -90}},
      "tooltip": [
        {"field": "policy"}, {"field": "capacity"}, {"field": "depth"},
        {"field": "recall", "type": "quantitative", "format": ".1%"},
        {"field": "kept_share", "type": "quantitative", "format": ".1%", "title": "kept of prompt"},
        {"field": "spans", "type": "quantitative", "format": "d"}
      ]
    }
  })json");
  panel["encoding"]["x"]["sort"] = style.capacities();
  panel["encoding"]["x"]["axis"]["labelExpr"] = kCapacityLabels;
  draw_span_panels(figure, style, policies, depths_of(cells), std::move(panel));
  filterable(figure.spec, {"policy", "capacity"});
  return figure;
}

const FigureRegistration registration({.name = "needle-depth",
                                       .question = "Does what matters survive, wherever in the prompt it stands?",
                                       .needs = "traces with annotated spans (capture --spans)",
                                       .order = 180,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
