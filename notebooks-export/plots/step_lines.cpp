#include "notebooks-export/plots/step_lines.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace kvreplay {
namespace {

constexpr std::size_t kMostRows = 20'000;

std::size_t place_of(const DataTable& table, const std::string& column) {
  return static_cast<std::size_t>(std::ranges::find(table.columns(), column) - table.columns().begin());
}

}  // namespace

std::string add_time_courses(Figure& figure, const FigureStyle& style, std::span<const TimeCourse> courses,
                             Measure measure) {
  std::vector<const TimeCourse*> shown;
  std::vector<std::string> capacities;
  std::size_t rows = 0;
  for (const TimeCourse& course : courses) {
    if (course.measure != measure || !style.shows(course.policy)) continue;
    shown.push_back(&course);
    capacities.push_back(course.capacity_request);
    rows += course.points.size();
  }
  std::string thinned;
  if (rows > kMostRows) {
    const std::string capacity = style.middle_capacity(capacities);
    std::erase_if(shown, [&](const TimeCourse* course) { return course->capacity_request != capacity; });
    thinned = " Drawn is one capacity only.";
  }
  figure.table = DataTable({"policy", "capacity", "step", "last_step", "mean", "low", "high"});
  for (const TimeCourse* course : shown) {
    for (const TimeCourse::Point& point : course->points) {
      figure.table.add({course->policy, course->capacity_request, static_cast<double>(point.first_step),
                        static_cast<double>(point.last_step), rounded(point.mean), rounded(point.low),
                        rounded(point.high)});
    }
  }
  return thinned;
}

std::string steps_thinned(const DataTable& table) {
  double most = 1;
  for (const std::vector<Cell>& row : table.rows()) {
    most = std::max(
        most, std::get<double>(row[place_of(table, "last_step")]) - std::get<double>(row[place_of(table, "step")]) + 1);
  }
  return most > 1 ? fmt::format(" Thinned: a point is the mean of {} steps.", most) : "";
}

void draw_step_lines(Figure& figure, const FigureStyle& style, const std::string& title) {
  const std::vector<std::string> policies = style.shown_of(distinct(figure.table, "policy"));
  const std::vector<std::string> capacities = distinct(figure.table, "capacity");
  Json& spec = figure.spec;
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "encoding": {
      "x": {"field": "step", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "tokens since the eviction of the prompt", "format": "d", "tickMinStep": 1,
                     "labelOverlap": "greedy"}},
      "y": {"type": "quantitative", "scale": {"zero": false}}
    },
    "layer": [
      {"mark": {"type": "area", "fillOpacity": 0.08, "strokeOpacity": 0, "aria": false, "tooltip": null},
       "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}},
      {"mark": {"type": "line"}, "encoding": {"y": {"field": "mean", "type": "quantitative"}}},
      {"mark": {"type": "point", "fillOpacity": 0, "strokeOpacity": 0},
       "encoding": {
         "y": {"field": "mean", "type": "quantitative"},
         "tooltip": [
           {"field": "policy"}, {"field": "step", "type": "quantitative", "format": "d", "title": "from step"},
           {"field": "last_step", "type": "quantitative", "format": "d", "title": "to step"},
           {"field": "mean", "type": "quantitative", "format": ".4~f"}
         ]
       }}
    ]
  })json"));
  spec["width"] = style.width();
  spec["height"] = 0.5 * style.width();
  Json& encoding = spec["encoding"];
  encoding["x"]["axis"]["labelFlush"] = 2 * style.font();
  const bool has_bands = place_of(figure.table, "low") < figure.table.columns().size();
  const bool logarithmic = spans_magnitudes(
      figure.table, has_bands ? std::vector<std::string>{"mean", "low", "high"} : std::vector<std::string>{"mean"});
  if (logarithmic) {
    encoding["y"]["scale"] = {{"type", "log"}, {"nice", false}};
    encoding["y"]["axis"] = {{"format", "~g"}, {"tickCount", 5}, {"labelOverlap", "greedy"}};
  }
  encoding["color"] = style.colour(policies);
  spec["layer"][1]["encoding"]["strokeDash"] = style.dash(policies);
  spec["layer"][2]["mark"]["size"] = 0.25 * style.font() * style.font();
  for (Json& layer : spec["layer"]) layer["encoding"]["y"]["title"] = logarithmic ? title + " (log scale)" : title;
  if (has_bands) {
    for (const char* end : {"low", "high"}) {
      spec["layer"][2]["encoding"]["tooltip"].push_back({{"field", end}, {"type", "quantitative"}, {"format", ".4~f"}});
    }
  } else {
    spec["layer"].erase(spec["layer"].begin());
  }
  style.choose(spec, "capacity", capacities, style.middle_capacity(capacities));
  filterable(spec, {"policy", "shown_capacity"});
}

}  // namespace kvreplay
