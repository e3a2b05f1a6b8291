// Which positions are cached when: position × step, a panel per policy.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "base/printable.h"
#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

constexpr const char* kQuestion = "Which positions are cached when?";
constexpr std::size_t kMostRows = 20'000;
constexpr std::size_t kMostPanels = 8;
constexpr int kMostPositionBins = 64;
constexpr int kMostStepBins = 32;
constexpr std::size_t kMostText = 60;  // of the tokens of a cell

// The beginning of the tokens [start, end), for the pointer to show.
std::string text_of(const Analysis& analysis, const std::string& trace, int start, int end) {
  std::string text;
  const auto found = std::ranges::find(analysis.traces, trace, &TraceOverview::trace);
  if (found == analysis.traces.end()) return text;
  for (int i = start; i < end && i < static_cast<int>(found->token_pieces.size()); ++i) {
    const std::string piece = printable(found->token_pieces[static_cast<std::size_t>(i)]);
    if (!text.empty() && text.size() + piece.size() > kMostText) return text + "…";
    text += piece;
  }
  return text;
}

// Neighbouring bins that are drawn as one cell.
int merged(int bins, int most) { return (bins + most - 1) / most; }

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "residency-raster";
  figure.question = kQuestion;
  figure.table =
      DataTable({"policy", "trace", "capacity", "start", "last", "step", "last_step", "cached_share", "text"});
  std::vector<const ResidencyRaster*> rasters;
  std::vector<std::string> present;
  std::vector<std::string> capacities;
  std::set<std::pair<std::string, int>> evictions;
  std::set<std::string> traces;
  for (const ResidencyRaster& raster : analysis.residency_rasters) {
    if (!style.shows(raster.policy) || raster.share.empty()) continue;
    rasters.push_back(&raster);
    present.push_back(raster.policy);
    capacities.push_back(raster.capacity_request);
    evictions.emplace(raster.trace, raster.eviction_position);
    traces.insert(raster.trace);
  }
  if (rasters.empty()) return figure;
  const auto trace_text = [&](const ResidencyRaster& raster) {
    return evictions.size() > traces.size() ? fmt::format("{}, evicted at {}", raster.trace, raster.eviction_position)
                                            : raster.trace;
  };
  std::vector<std::string> policies = style.shown_of(present);
  std::string thinned;
  if (policies.size() > kMostPanels && !style.asked()) {
    figure.left_out.assign(policies.begin() + kMostPanels, policies.end());
    policies.resize(kMostPanels);
    thinned += fmt::format(" Shown are the first {} policies.", kMostPanels);
  }
  std::erase_if(rasters, [&](const ResidencyRaster* raster) {
    return std::ranges::find(policies, raster->policy) == policies.end();
  });
  int most_positions = kMostPositionBins;
  int most_steps = kMostStepBins;
  const auto cells = [&]() {
    std::size_t sum = 0;
    for (const ResidencyRaster* raster : rasters) {
      sum += static_cast<std::size_t>(std::min(raster->steps.count(), most_steps) *
                                      std::min(raster->positions.count(), most_positions));
    }
    return sum;
  };
  const std::string capacity = style.middle_capacity(capacities);
  if (cells() > kMostRows && traces.size() + evictions.size() > 2) {
    const std::string first = trace_text(*rasters.front());
    std::erase_if(rasters, [&](const ResidencyRaster* raster) { return trace_text(*raster) != first; });
    thinned += " Drawn is the first trace only.";
  }
  if (cells() > kMostRows) {
    std::erase_if(rasters, [&](const ResidencyRaster* raster) { return raster->capacity_request != capacity; });
    thinned += " Drawn is one capacity only.";
  }
  // Many policies that were asked for have larger cells.
  while (cells() > kMostRows && most_steps > 1) {
    most_steps /= 2;
    most_positions = cells() > kMostRows ? most_positions / 2 : most_positions;
  }
  int positions_per_cell = 1;
  int steps_per_cell = 1;
  std::map<std::tuple<std::string, int, int>, std::string> texts;
  for (const ResidencyRaster* raster : rasters) {
    const int by_position = merged(raster->positions.count(), most_positions);
    const int by_step = merged(raster->steps.count(), most_steps);
    positions_per_cell = std::max(positions_per_cell, by_position * raster->positions.width);
    steps_per_cell = std::max(steps_per_cell, by_step * raster->steps.width);
    for (int step = 0; step < raster->steps.count(); step += by_step) {
      const int last_step = std::min(step + by_step, raster->steps.count()) - 1;
      for (int bin = 0; bin < raster->positions.count(); bin += by_position) {
        const int last_bin = std::min(bin + by_position, raster->positions.count()) - 1;
        double sum = 0;
        int count = 0;
        for (int s = step; s <= last_step; ++s) {
          for (int b = bin; b <= last_bin; ++b) {
            const auto share = static_cast<double>(raster->at(s, b));
            if (std::isnan(share)) continue;
            sum += share;
            ++count;
          }
        }
        if (count == 0) continue;  // of tokens that had not come
        const int start = bin * raster->positions.width;
        const int end = std::min((last_bin + 1) * raster->positions.width, raster->positions.positions);
        const auto [text, is_new] = texts.try_emplace({raster->trace, start, end});
        if (is_new) text->second = text_of(analysis, raster->trace, start, end);
        figure.table.add({raster->policy, trace_text(*raster), raster->capacity_request, static_cast<double>(start),
                          static_cast<double>(end - 1), static_cast<double>(raster->steps.first_step(step)),
                          static_cast<double>(raster->steps.last_step(last_step)), rounded(sum / count), text->second});
      }
    }
  }
  const std::vector<std::string> shown_traces = distinct(figure.table, "trace");
  figure.caption = fmt::format(
      "Share of the heads and layers whose cache holds the positions of a cell when the tokens of a step attend, in {} "
      "at a capacity of {}.{}{}{}",
      printable(shown_traces.front()), capacity_text(capacity),
      positions_per_cell > 1 || steps_per_cell > 1
          ? fmt::format(" Thinned: a cell is {} position{} and {} step{}.", positions_per_cell,
                        positions_per_cell == 1 ? "" : "s", steps_per_cell, steps_per_cell == 1 ? "" : "s")
          : "",
      thinned, style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  spec["transform"] = Json::parse(R"json([
    {"calculate": "datum.last + 1", "as": "end"},
    {"calculate": "datum.last_step + 1", "as": "end_step"}
  ])json");
  const double labels = 5 * style.font();
  const std::size_t columns = style.panel_columns(policies, labels);
  const double width = style.panel_width(columns, labels);
  Json panel = Json::parse(R"json({
    "mark": {"type": "rect", "aria": false, "x2Offset": 0.4, "y2Offset": -0.4},
    "encoding": {
      "x": {"field": "start", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "position (tokens)", "grid": false, "format": "d", "labelOverlap": "greedy",
                     "tickCount": 4}},
      "x2": {"field": "end"},
      "y": {"field": "step", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "step", "grid": false, "format": "d", "tickMinStep": 1, "tickCount": 4}},
      "y2": {"field": "end_step"},
      "color": {"field": "cached_share", "type": "quantitative", "scale": {"scheme": "cividis", "domain": [0, 1]},
                "legend": {"title": "share of caches that hold it", "direction": "horizontal", "format": ".0%"}},
      "tooltip": [
        {"field": "policy"}, {"field": "start", "type": "quantitative", "format": "d"},
        {"field": "last", "type": "quantitative", "format": "d"},
        {"field": "step", "type": "quantitative", "format": "d", "title": "from step"},
        {"field": "last_step", "type": "quantitative", "format": "d", "title": "to step"},
        {"field": "cached_share", "type": "quantitative", "format": ".1%", "title": "cached"}, {"field": "text"}
      ]
    }
  })json");
  panel["width"] = width;
  panel["height"] = std::max(0.5 * width, 8 * style.font());
  panel["encoding"]["x"]["axis"]["labelFlush"] = 2 * style.font();
  spec["facet"] = {{"field", "policy"}, {"type", "nominal"}, {"sort", policies}};
  spec["facet"]["header"] = {{"title", nullptr},
                             {"labelExpr", style.label_expression(policies, style.characters_in(width))}};
  spec["columns"] = columns;
  spec["spec"] = std::move(panel);
  style.choose(spec, "capacity", distinct(figure.table, "capacity"), capacity);
  style.choose(spec, "trace", shown_traces, shown_traces.front());
  filterable(spec, {"policy", "shown_capacity"});
  return figure;
}

const FigureRegistration registration({.name = "residency-raster",
                                       .question = kQuestion,
                                       .needs = "kept sets (--kept) of policies with a schedule",
                                       .order = 194,
                                       .draw = draw,
                                       .over_time = true});

}  // namespace
}  // namespace kvreplay
