// Where in the prompt each policy keeps: a raster with the annotated spans.
#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "base/printable.h"
#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

constexpr std::size_t kMostRows = 20'000;
constexpr std::size_t kMostText = 60;  // of the tokens of a cell
constexpr int kMostBins = 128;

const TraceOverview* overview_of(const Analysis& analysis, const std::string& trace) {
  const auto found = std::ranges::find(analysis.traces, trace, &TraceOverview::trace);
  return found == analysis.traces.end() ? nullptr : &*found;
}

// The beginning of the tokens [start, end), for the pointer to show.
std::string text_of(const TraceOverview* trace, int start, int end) {
  std::string text;
  if (trace == nullptr) return text;
  for (int i = start; i < end && i < static_cast<int>(trace->token_pieces.size()); ++i) {
    const std::string piece = printable(trace->token_pieces[static_cast<std::size_t>(i)]);
    if (!text.empty() && text.size() + piece.size() > kMostText) return text + "…";
    text += piece;
  }
  return text;
}

struct Choice {
  std::vector<std::string> capacities, traces, layers;

  static bool has(const std::vector<std::string>& texts, const std::string& text) {
    return std::ranges::find(texts, text) != texts.end();
  }
};

std::string layer_text(int layer) { return layer < 0 ? "all" : fmt::format("{}", layer); }

std::string trace_text(const KeptRaster& raster, bool several_evictions) {
  return several_evictions ? fmt::format("{}, evicted at {}", raster.trace, raster.eviction_position) : raster.trace;
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "kept-positions";
  figure.question = "Where in the prompt does each policy keep?";
  std::set<std::pair<std::string, int>> evictions;
  std::set<std::string> names;
  for (const KeptRaster& raster : analysis.rasters) {
    evictions.emplace(raster.trace, raster.eviction_position);
    names.insert(raster.trace);
  }
  const bool several = evictions.size() > names.size();
  std::vector<const KeptRaster*> rasters;
  std::vector<std::string> present;
  Choice choice;
  const auto note = [](std::vector<std::string>& texts, const std::string& text) {
    if (!Choice::has(texts, text)) texts.push_back(text);
  };
  for (const KeptRaster& raster : analysis.rasters) {
    if (!style.shows(raster.policy) || raster.capacity_request == kAllPositions || raster.share.empty()) continue;
    rasters.push_back(&raster);
    note(present, raster.policy);
    note(choice.capacities, raster.capacity_request);
    note(choice.traces, trace_text(raster, several));
    note(choice.layers, layer_text(raster.layer));
  }
  figure.table = DataTable({"row", "policy", "trace", "capacity", "layer", "start", "last", "kept_share", "text"});
  if (rasters.empty()) return figure;
  const std::vector<std::string> policies = style.shown_of(present);
  const std::string capacity = style.middle_capacity(choice.capacities);
  // As much to choose from as fits: of all layers together at least, of one trace, at one capacity.
  std::string thinned;
  const auto rows = [&]() {
    return choice.capacities.size() * choice.traces.size() * choice.layers.size() * policies.size() *
           static_cast<std::size_t>(kMostBins);
  };
  if (rows() > kMostRows && choice.layers.size() > 1) {
    choice.layers = {Choice::has(choice.layers, "all") ? "all" : choice.layers.front()};
    thinned += " Single layers are left out.";
  }
  if (rows() > kMostRows && choice.traces.size() > 1) {
    figure.left_out.assign(choice.traces.begin() + 1, choice.traces.end());
    choice.traces.resize(1);
    thinned += " Shown is the first trace only.";
  }
  if (rows() > kMostRows && choice.capacities.size() > 1) {
    choice.capacities = {capacity};
    thinned += " Shown is one capacity only.";
  }
  int positions_per_cell = 1;
  std::set<std::tuple<std::string, std::string, std::string>> spanned;
  for (const KeptRaster* raster : rasters) {
    const std::string trace = trace_text(*raster, several);
    const std::string layer = layer_text(raster->layer);
    if (!Choice::has(choice.capacities, raster->capacity_request) || !Choice::has(choice.traces, trace) ||
        !Choice::has(choice.layers, layer)) {
      continue;
    }
    const TraceOverview* overview = overview_of(analysis, raster->trace);
    const int bins = static_cast<int>(raster->share.size());
    const int width = (raster->eviction_position + bins - 1) / bins;
    const int merged = (bins + kMostBins - 1) / kMostBins;
    positions_per_cell = std::max(positions_per_cell, width * merged);
    for (int first = 0; first < bins; first += merged) {
      const int last = std::min(first + merged, bins);
      const int start = first * width;
      const int end = std::min(last * width, raster->eviction_position);
      double kept = 0;
      for (int bin = first; bin < last; ++bin) {
        const int wide = std::min((bin + 1) * width, raster->eviction_position) - bin * width;
        kept += static_cast<double>(raster->share[static_cast<std::size_t>(bin)]) * wide;
      }
      figure.table.add({raster->policy, raster->policy, trace, raster->capacity_request, layer,
                        static_cast<double>(start), static_cast<double>(end - 1), rounded(kept / (end - start)),
                        text_of(overview, start, end)});
    }
    if (overview == nullptr || !spanned.emplace(trace, raster->capacity_request, layer).second) continue;
    for (const Span& span : overview->spans) {
      if (span.start >= raster->eviction_position) continue;
      figure.table.add({std::string("annotated spans"), std::string(), trace, raster->capacity_request, layer,
                        static_cast<double>(span.start),
                        static_cast<double>(std::min(span.end, raster->eviction_position) - 1), std::nan(""),
                        span.label.empty() ? text_of(overview, span.start, span.end) : span.label});
    }
  }
  const bool has_spans =
      !distinct(figure.table, "row").empty() && Choice::has(distinct(figure.table, "row"), "annotated spans");
  figure.caption = fmt::format(
      "Share of the heads (and layers) that keep the positions of a cell, in {}{} at a capacity of {}.{}{}{}{}",
      printable(choice.traces.front()),
      choice.layers.front() == "all" ? "" : fmt::format(", layer {},", choice.layers.front()), capacity_text(capacity),
      has_spans ? " Orange: annotated spans." : "",
      positions_per_cell > 1 ? fmt::format(" Thinned: a cell is {} positions.", positions_per_cell) : "", thinned,
      style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  std::vector<std::string> labels = policies;
  if (has_spans) labels.insert(labels.begin(), "annotated spans");
  const std::size_t fit = style.characters_in(0.35 * style.width());
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "transform": [{"calculate": "datum.last + 1", "as": "end"}],
    "encoding": {
      "x": {"field": "start", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "position in the prompt (tokens)", "grid": false, "format": "d", "labelOverlap": "greedy"}},
      "x2": {"field": "end"},
      "y": {"field": "row", "type": "nominal", "axis": {"title": null, "ticks": false, "domain": false}},
      "tooltip": [
        {"field": "row", "title": "policy"}, {"field": "start", "type": "quantitative", "format": "d"},
        {"field": "last", "type": "quantitative", "format": "d"},
        {"field": "kept_share", "type": "quantitative", "format": ".1%", "title": "kept"}, {"field": "text"}
      ]
    },
    "layer": [
      {"transform": [{"filter": "datum.policy"}],
       "mark": {"type": "rect", "aria": false, "x2Offset": 0.4},
       "encoding": {
         "color": {"field": "kept_share", "type": "quantitative", "scale": {"scheme": "cividis", "domain": [0, 1]},
                   "legend": {"title": "share of heads that keep", "direction": "horizontal", "format": ".0%"}}
       }}
    ]
  })json"));
  if (has_spans) {
    spec["layer"].push_back(Json::parse(R"json({
      "transform": [{"filter": "!datum.policy"}],
      "mark": {"type": "rect", "color": "#e69f00", "stroke": "#e69f00"}
    })json"));
    // A hair over all rows, to see what is kept of a span.
    Json band = Json::parse(R"json({
      "transform": [{"filter": "!datum.policy"}],
      "mark": {"type": "rect", "fillOpacity": 0, "stroke": "#e69f00", "tooltip": null},
      "encoding": {"y": {"value": 0}, "y2": {"value": "height"}, "tooltip": null}
    })json");
    band["mark"]["strokeWidth"] = style.font() / 14;
    spec["layer"].push_back(std::move(band));
  }
  spec["width"] = style.width();
  rows_of(spec, "row", labels.size(),
          std::max(2 * style.font(),
                   style.line() * static_cast<double>(FigureStyle::most_lines(labels, fit)) + 0.4 * style.font()));
  Json& y = spec["encoding"]["y"];
  y["sort"] = labels;
  y["axis"]["labelExpr"] = style.label_expression(labels, fit);
  y["axis"]["labelLineHeight"] = style.line();
  style.choose(spec, "capacity", choice.capacities, capacity);
  style.choose(spec, "trace", distinct(figure.table, "trace"), distinct(figure.table, "trace").front());
  style.choose(spec, "layer", choice.layers, choice.layers.front());
  filterable(spec, {"policy", "shown_capacity", "shown_layer"});
  return figure;
}

const FigureRegistration registration({.name = "kept-positions",
                                       .question = "Where in the prompt does each policy keep?",
                                       .needs = "kept sets (--kept), which `replay --kept` writes",
                                       .order = 160,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
