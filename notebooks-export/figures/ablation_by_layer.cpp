// Where a change of one step matters: layers × changes.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

constexpr std::size_t kMostChanges = 16;

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string measure(traits_of(analysis.layer_measure).noun);
  Figure figure;
  figure.name = "ablation-by-layer";
  figure.question = "In which layers does each step matter?";
  std::set<std::string> references;
  for (const StepEffect& effect : analysis.step_effects) references.insert(effect.reference);
  std::map<std::string, double> largest;
  std::vector<std::string> labels;
  const auto label_of = [&](const StepEffect& effect) {
    return references.size() == 1 ? effect.change : fmt::format("{}: {}", effect.reference, effect.change);
  };
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer < 0) continue;
    const std::string label = label_of(effect);
    if (!largest.contains(label)) labels.push_back(label);
    largest[label] = std::max(largest[label], std::abs(effect.difference.mean));
  }
  std::string left_out;
  if (labels.size() > kMostChanges && !style.asked()) {
    std::vector<std::string> by_size = labels;
    std::ranges::stable_sort(by_size, [&](const auto& a, const auto& b) { return largest[a] > largest[b]; });
    left_out = fmt::format(" Shown are the {} changes of {} with the largest effects.", kMostChanges, labels.size());
    figure.left_out.assign(by_size.begin() + kMostChanges, by_size.end());
    std::erase_if(labels, [&](const std::string& label) {
      return std::ranges::find(figure.left_out, label) != figure.left_out.end();
    });
  }
  figure.table = DataTable({"change", "capacity", "layer", "difference", "low", "high"});
  std::set<int> layers;
  double scale = 0;
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer < 0 || std::ranges::find(labels, label_of(effect)) == labels.end()) continue;
    figure.table.add({label_of(effect), effect.capacity_request, static_cast<double>(effect.layer),
                      rounded(effect.difference.mean), rounded(effect.difference.interval.low),
                      rounded(effect.difference.interval.high)});
    layers.insert(effect.layer);
    scale = std::max(scale, std::abs(effect.difference.mean));
  }
  if (layers.size() < 2) figure.table = DataTable({});
  if (figure.table.empty()) return figure;
  const std::vector<std::string> capacities = distinct(figure.table, "capacity");
  const std::string capacity = style.middle_capacity(capacities);
  figure.caption = fmt::format(
      "Change in {} where one thing about {} is changed, layer by layer, at a capacity of {}: orange where the change "
      "raises it, blue where it lowers it.{}",
      measure, references.size() == 1 ? *references.begin() : "a method", capacity_text(capacity), left_out);
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  const std::size_t fit = style.characters_in(0.42 * style.width());
  spec.update(Json::parse(R"json({
    "autosize": {"type": "fit-x", "contains": "padding"},
    "transform": [
      {"calculate": "datum.layer - 0.5", "as": "left"},
      {"calculate": "datum.layer + 0.5", "as": "right"}
    ],
    "mark": {"type": "rect"},
    "encoding": {
      "x": {"field": "left", "type": "quantitative", "scale": {"nice": false, "zero": false},
            "axis": {"title": "layer", "grid": false, "format": "d"}},
      "x2": {"field": "right"},
      "y": {"field": "change", "type": "nominal", "axis": {"title": null, "ticks": false, "domain": false}},
      "color": {"field": "difference", "type": "quantitative",
                "legend": {"direction": "horizontal", "format": "+.3f"}},
      "tooltip": [
        {"field": "change"}, {"field": "capacity"}, {"field": "layer", "type": "quantitative", "format": "d"},
        {"field": "difference", "type": "quantitative", "format": "+.4f"},
        {"field": "low", "type": "quantitative", "format": "+.4f"},
        {"field": "high", "type": "quantitative", "format": "+.4f"}
      ]
    }
  })json"));
  spec["width"] = style.width();
  rows_of(spec, "change", labels.size(),
          std::max(2 * style.font(),
                   style.line() * static_cast<double>(FigureStyle::most_lines(labels, fit)) + 0.4 * style.font()));
  Json& encoding = spec["encoding"];
  encoding["x"]["axis"]["values"] = integer_ticks(last_of(figure.table, "layer"));
  encoding["y"]["sort"] = labels;
  encoding["y"]["axis"]["labelExpr"] = style.label_expression(labels, fit);
  encoding["y"]["axis"]["labelLineHeight"] = style.line();
  encoding["color"]["scale"] = diverging_scale(scale);
  encoding["color"]["legend"]["title"] = fmt::format("difference in {}", measure);
  encoding["color"]["legend"]["values"] = {rounded(-scale), 0, rounded(scale)};
  style.choose(spec, "capacity", capacities, capacity);
  filterable(spec, {"shown_capacity"});
  return figure;
}

const FigureRegistration registration(
    {.name = "ablation-by-layer",
     .question = "In which layers does each step matter?",
     .needs = "settings of one method that differ in one thing, replayed over several layers",
     .order = 90,
     .draw = draw});

}  // namespace
}  // namespace kvreplay
