// What smoothing in time and in space makes of one head's scores.
#include <fmt/format.h>

#include <algorithm>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

constexpr std::size_t kMostMaps = 3;
constexpr int kMostBins = 120;
constexpr std::size_t kMostQueries = 32;

// Neighbouring bins merged to at most kMostBins: their means.
std::vector<double> merged(const std::vector<float>& numbers, int step) {
  std::vector<double> result;
  for (std::size_t first = 0; first < numbers.size(); first += static_cast<std::size_t>(step)) {
    const std::size_t last = std::min(first + static_cast<std::size_t>(step), numbers.size());
    double sum = 0;
    for (std::size_t i = first; i < last; ++i) sum += static_cast<double>(numbers[i]);
    result.push_back(sum / static_cast<double>(last - first));
  }
  return result;
}

// Below which 98 % of the cells of these stages are: a few attention sinks would leave everything else dark.
double usual_largest(const DataTable& table, const std::vector<std::string>& stages) {
  std::vector<double> sizes;
  for (const std::vector<Cell>& row : table.rows()) {
    if (std::ranges::find(stages, std::get<std::string>(row[1])) != stages.end()) {
      sizes.push_back(std::get<double>(row.back()));
    }
  }
  std::ranges::sort(sizes);
  const double largest =
      sizes.empty() ? 0 : sizes[static_cast<std::size_t>(0.98 * static_cast<double>(sizes.size() - 1))];
  return largest > 0 ? rounded(largest) : 1;
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "importance";
  figure.question = "What does smoothing make of a head's scores?";
  figure.table = DataTable({"head", "stage", "query", "query_last", "start", "last", "importance"});
  const std::string raw = "each query alone";
  const std::string temporal = "smoothed in time";
  const std::string spatial = "smoothed in time and space";
  bool thinned = false;
  int cell = 1;
  std::string caption;
  for (std::size_t i = 0; i < std::min(analysis.importance.size(), kMostMaps); ++i) {
    const ImportanceMap& map = analysis.importance[i];
    if (map.query_positions.empty() || map.spatial.empty()) continue;
    const std::string head = fmt::format("layer {}, head {}: {}", map.layer, map.head, map.policy);
    const int step = (static_cast<int>(map.spatial.size()) + kMostBins - 1) / kMostBins;
    const std::size_t queries = map.query_positions.size();
    const std::size_t skip = (queries + kMostQueries - 1) / kMostQueries;
    cell = std::max(cell, step * map.bin_width);
    thinned = thinned || skip > 1;
    const auto add = [&](const std::string& stage, int query, int query_last, const std::vector<float>& numbers) {
      const std::vector<double> cells = merged(numbers, step);
      for (std::size_t bin = 0; bin < cells.size(); ++bin) {
        const int start = static_cast<int>(bin) * step * map.bin_width;
        const int end = std::min(start + step * map.bin_width, map.positions);
        figure.table.add({head, stage, static_cast<double>(query), static_cast<double>(query_last),
                          static_cast<double>(map.first_position + start),
                          static_cast<double>(map.first_position + end - 1), rounded(cells[bin])});
      }
    };
    for (const auto& [stage, numbers] : {std::pair{raw, &map.raw}, {temporal, &map.temporal}}) {
      for (std::size_t q = 0; q < queries; q += skip) {
        add(stage, map.query_positions[q], map.query_positions[std::min(q + skip, queries) - 1], (*numbers)[q]);
      }
    }
    add(spatial, map.query_positions.back(), map.query_positions.back(), map.spatial);
    if (!caption.empty()) continue;
    caption = fmt::format(
        "The importance of each position for layer {}, head {} ({} at a capacity of {}): for each query of the "
        "observation window alone, after its moving average in time, and at last after the adaptive window in space, "
        "which is {} positions wide, shifted by {}.",
        map.layer, map.head, map.policy, map.capacity, map.width, map.shift);
  }
  for (std::size_t i = kMostMaps; i < analysis.importance.size(); ++i) {
    const ImportanceMap& map = analysis.importance[i];
    figure.left_out.push_back(fmt::format("layer {}, head {}: {}", map.layer, map.head, map.policy));
  }
  if (figure.table.empty()) return figure;
  const double largest = usual_largest(figure.table, {raw, temporal});
  figure.caption = caption + fmt::format(" Colours end at {:.2g}, below which are 98 % of the cells.", largest) +
                   (cell > 1 ? fmt::format(" Thinned: a cell is the mean of {} positions.", cell) : "") +
                   (thinned ? " Of the window's queries some are left out." : "") +
                   (figure.left_out.empty()
                        ? ""
                        : fmt::format(" Shown are the first {} of {} heads.", kMostMaps, analysis.importance.size()));
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  spec["transform"] = Json::parse(R"json([
    {"calculate": "datum.last + 1", "as": "end"},
    {"calculate": "datum.query - 0.5", "as": "lower"},
    {"calculate": "datum.query_last + 0.5", "as": "upper"}
  ])json");
  const double width = style.width() - 7 * style.font();
  spec["vconcat"] = Json::array();
  for (const std::string& stage : {raw, temporal}) {
    Json panel = Json::parse(R"json({
      "title": {"fontWeight": "normal", "anchor": "start", "frame": "group"},
      "mark": {"type": "rect", "aria": false, "x2Offset": 0.3, "y2Offset": -0.3},
      "encoding": {
        "x": {"field": "start", "type": "quantitative", "scale": {"nice": false, "zero": false},
              "axis": {"title": null, "labels": false, "grid": false}},
        "x2": {"field": "end"},
        "y": {"field": "lower", "type": "quantitative", "scale": {"nice": false, "zero": false},
              "axis": {"title": "query position", "grid": false, "format": "d", "tickMinStep": 1, "tickCount": 4}},
        "y2": {"field": "upper"},
        "color": {"field": "importance", "type": "quantitative",
                  "scale": {"scheme": "cividis", "type": "pow", "exponent": 0.5, "clamp": true},
                  "legend": {"title": "importance (square-root scale)", "direction": "horizontal", "tickCount": 3}},
        "tooltip": [
          {"field": "stage"}, {"field": "query", "type": "quantitative", "format": "d"},
          {"field": "start", "type": "quantitative", "format": "d"},
          {"field": "last", "type": "quantitative", "format": "d"},
          {"field": "importance", "type": "quantitative", "format": ".4g"}
        ]
      }
    })json");
    panel["encoding"]["color"]["scale"]["domain"] = {0, largest};
    panel["title"]["text"] = stage;
    panel["title"]["fontSize"] = style.font();
    panel["title"]["offset"] = 0.3 * style.font();
    panel["transform"] = {{{"filter", fmt::format("datum.stage === '{}'", stage)}}};
    panel["width"] = width;
    panel["height"] = 0.27 * style.width();
    spec["vconcat"].push_back(std::move(panel));
  }
  Json last = Json::parse(R"json({
    "title": {"fontWeight": "normal", "anchor": "start", "frame": "group"},
    "mark": {"type": "area", "line": true, "interpolate": "step-after", "fillOpacity": 0.25, "color": "#0072B2"},
    "encoding": {
      "x": {"field": "start", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "position in the prompt (tokens)", "grid": false, "format": "d", "labelOverlap": "greedy"}},
      "y": {"field": "importance", "type": "quantitative",
            "axis": {"title": "importance", "grid": false, "tickCount": 3, "format": "~g"}}
    }
  })json");
  last["title"]["text"] = spatial;
  last["title"]["fontSize"] = style.font();
  last["title"]["offset"] = 0.3 * style.font();
  last["transform"] = {{{"filter", fmt::format("datum.stage === '{}'", spatial)}}};
  // A number at the end of the axis ends there, where half of it would stand outside.
  last["encoding"]["x"]["axis"]["labelFlush"] = 2 * style.font();
  last["width"] = width;
  last["height"] = 0.18 * style.width();
  spec["vconcat"].push_back(std::move(last));
  const std::vector<std::string> heads = distinct(figure.table, "head");
  style.choose(spec, "head", heads, heads.front());
  return figure;
}

const FigureRegistration registration({.name = "importance",
                                       .question = "What does smoothing make of a head's scores?",
                                       .needs = "a restkv setting, and its trace (--trace)",
                                       .order = 170,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
