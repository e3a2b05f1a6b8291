// The model's loss against what a replay measures: a panel per capacity and measure, a point per policy and prompt.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/dot_plot.h"

namespace kvreplay {
namespace {

constexpr std::size_t kCapacities = 4;

// The measure that ranks best and the layer error; where that is the best, the next one.
std::vector<const Prediction*> shown_of(const std::vector<Prediction>& predictions) {
  std::vector<const Prediction*> shown;
  for (const Prediction& each : predictions) {
    if (shown.empty() && !std::isnan(each.all)) shown.push_back(&each);
  }
  if (shown.empty()) return shown;
  const Predictor layer_error{Measure::layer_error, false};
  const auto is_other = [&](const Prediction& each) { return &each != shown.front() && !std::isnan(each.all); };
  const Prediction* beside = nullptr;
  for (const Prediction& each : predictions) {
    if (is_other(each) && (beside == nullptr || each.predictor == layer_error)) beside = &each;
  }
  if (beside != nullptr) shown.push_back(beside);
  return shown;
}

std::string panel_title(const Prediction& prediction, const std::string& capacity) {
  const auto found = prediction.of_capacity.find(capacity);
  return found == prediction.of_capacity.end()
             ? capacity_text(capacity)
             : fmt::format("{}: Spearman {:.2f}", capacity_text(capacity), found->second);
}

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const LossPredictions& loss = analysis.loss_predictions;
  Figure figure;
  figure.name = "loss-prediction";
  figure.question = "Do offline measures predict what the model loses?";
  const std::vector<const Prediction*> shown = shown_of(loss.predictions);
  std::vector<std::string> having;
  for (const std::string& capacity : style.capacities()) {
    if (std::ranges::find(loss.settings, capacity, &PredictedLoss::capacity_request) != loss.settings.end()) {
      having.push_back(capacity);
    }
  }
  const std::vector<std::string> capacities = spread(having, kCapacities);
  struct Range {
    double least = std::numeric_limits<double>::infinity();
    double most = -std::numeric_limits<double>::infinity();
  };
  std::vector<Range> ranges;  // of each measure
  int without = 0;            // settings without a loss, which have no place on a logarithmic axis
  figure.table = DataTable({"measure", "policy", "capacity", "trace", "evict_at", "offline", "kl"});
  for (const Prediction* prediction : shown) {
    const auto which =
        static_cast<std::size_t>(std::ranges::find(loss.predictors, prediction->predictor) - loss.predictors.begin());
    Range& range = ranges.emplace_back();
    for (const PredictedLoss& setting : loss.settings) {
      if (!style.shows(setting.policy) || std::isnan(setting.offline[which]) ||
          std::ranges::find(capacities, setting.capacity_request) == capacities.end()) {
        continue;
      }
      figure.table.add({prediction->predictor.noun(), setting.policy, setting.capacity_request, setting.trace,
                        static_cast<double>(setting.eviction_position), setting.offline[which], setting.loss});
      if (prediction == shown.front() && !(setting.loss > 0)) ++without;
      range.least = std::min(range.least, setting.offline[which]);
      range.most = std::max(range.most, setting.offline[which]);
    }
  }
  if (figure.table.empty()) return figure;
  const std::vector<std::string> policies = style.shown_of(distinct(figure.table, "policy"));
  figure.caption = fmt::format(
      "KL divergence of the next token's distribution from the full cache's, mean over evaluation queries, against the "
      "{}: of {} measures that which ranks most like it{}. A point per policy and prompt, a row per capacity; above it "
      "Spearman's correlation among the policies of a prompt, mean over prompts: 1 is the same order.{}{}{}",
      shown.front()->predictor.noun(), loss.predictions.size(),
      shown.size() < 2 ? "" : fmt::format(", and against the {}", shown.back()->predictor.noun()),
      without == 0 ? ""
                   : fmt::format(" Not drawn {} {} without a loss.", without == 1 ? "is" : "are",
                                 without == 1 ? "1 point" : fmt::format("{} points", without)),
      capacities_left_out(having, capacities), style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  const std::size_t columns = shown.size() * capacities.size() == 1 ? 1 : 2;
  const double width = (style.width() - 6) / static_cast<double>(columns) - 5.2 * style.font();
  spec["columns"] = columns;
  spec["concat"] = Json::array();
  for (const std::string& capacity : capacities) {
    for (std::size_t i = 0; i < shown.size(); ++i) {
      const std::string noun = shown[i]->predictor.noun();
      Json panel = Json::parse(R"json({
        "mark": {"type": "point"},
        "encoding": {
          "x": {"field": "offline", "type": "quantitative", "scale": {"zero": false},
                "axis": {"labelOverlap": "greedy", "tickCount": 4, "format": "~g"}},
          "y": {"field": "kl", "type": "quantitative", "scale": {"type": "log", "nice": false},
                "axis": {"labelOverlap": "greedy", "tickCount": 4, "format": "~g"}},
          "tooltip": [
            {"field": "policy"}, {"field": "capacity"}, {"field": "trace"},
            {"field": "offline", "type": "quantitative", "format": ".4f"},
            {"field": "kl", "type": "quantitative", "format": ".4f", "title": "KL divergence"}
          ]
        }
      })json");
      panel["title"] = {{"text", panel_title(*shown[i], capacity)},
                        {"fontSize", style.font()},
                        {"fontWeight", "normal"},
                        {"offset", 0.4 * style.font()}};
      panel["transform"] = {{{"filter", fmt::format("datum.measure === {} && datum.capacity === {} && datum.kl > 0",
                                                    Json(noun).dump(), Json(capacity).dump())}}};
      panel["width"] = width;
      panel["height"] = columns == 1 ? 0.5 * style.width() : 0.7 * width;
      Json& encoding = panel["encoding"];
      encoding["x"]["title"] = noun;
      if (spans_magnitudes(ranges[i].least, ranges[i].most)) {
        encoding["x"]["scale"] = {{"type", "log"}, {"nice", false}};
      }
      encoding["x"]["scale"]["padding"] = style.font();
      encoding["y"]["scale"]["padding"] = style.font();
      encoding["y"]["title"] = "KL (nats, log scale)";
      encoding["color"] = style.colour(policies);
      encoding["shape"] = style.shape(policies);
      spec["concat"].push_back(std::move(panel));
    }
  }
  filterable(spec, {"policy"});
  return figure;
}

const FigureRegistration registration({.name = "loss-prediction",
                                       .question = "Do offline measures predict what the model loses?",
                                       .needs = "the model's own loss under four policies or more, which `live` "
                                                "measures, beside what a replay does",
                                       .order = 25,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
