// What a policy would keep if it were asked again later.
#include <fmt/format.h>

#include <map>
#include <set>
#include <tuple>

#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "stability";
  figure.question = "Does a policy still want later what it kept before?";
  std::map<std::string, int> first;  // eviction position of each trace
  for (const Stability& row : analysis.stabilities) {
    const auto [found, is_new] = first.try_emplace(row.trace, row.from);
    if (!is_new) found->second = std::min(found->second, row.from);
  }
  struct Means {
    Mean jaccard;
    Mean returned;
  };
  std::map<std::tuple<std::string, std::string, int>, Means> means;
  for (const Stability& row : analysis.stabilities) {
    if (row.layer >= 0 || row.from != first[row.trace] || !style.shows(row.policy)) continue;
    auto& [jaccard, returned] = means[{row.policy, row.capacity_request, row.to}];
    jaccard.add(row.jaccard);
    returned.add(row.returned);
  }
  figure.table = DataTable({"policy", "capacity", "evict_at", "what", "share", "traces"});
  const std::string kept = "overlap with what was kept first";
  const std::string back = "evicted first, wanted later";
  for (const auto& [key, of_key] : means) {
    const auto& [policy, capacity, to] = key;
    for (const auto& [what, value] : {std::pair{kept, of_key.jaccard}, {back, of_key.returned}}) {
      figure.table.add({policy, capacity, static_cast<double>(to), what, rounded(value.value()),
                        static_cast<double>(value.count())});
    }
  }
  if (figure.table.empty()) return figure;
  const std::vector<std::string> policies = style.shown_of(distinct(figure.table, "policy"));
  std::vector<std::string> capacities;
  const std::vector<std::string> having = distinct(figure.table, "capacity");
  for (const std::string& capacity : style.capacities()) {
    if (std::ranges::find(having, capacity) != having.end()) capacities.push_back(capacity);
  }
  const std::string capacity = style.middle_capacity(capacities);
  std::set<int> positions;
  for (const auto& [trace, position] : first) positions.insert(position);
  figure.caption = fmt::format(
      "Kept sets of evictions at later positions against those of the first ({}), at a capacity of {}. Above: Jaccard "
      "overlap, of the positions before the first eviction. Below: share of what a later eviction keeps of them that "
      "the first had already evicted, and that a cache cannot get back. Means over traces, layers and heads.{}",
      positions.size() == 1 ? fmt::format("position {}", *positions.begin())
                            : fmt::format("position {} to {}", *positions.begin(), *positions.rbegin()),
      capacity_text(capacity), style.shown_text());
  Json& spec = figure.spec = style.spec(figure.question, figure.caption);
  spec.update(Json::parse(R"json({
    "transform": [],
    "vconcat": []
  })json"));
  for (const std::string& what : {kept, back}) {
    Json panel = Json::parse(R"json({
      "encoding": {
        "x": {"field": "evict_at", "type": "quantitative", "scale": {"zero": false, "nice": false},
              "axis": {"title": null, "format": "d", "tickMinStep": 1}},
        "y": {"field": "share", "type": "quantitative", "axis": {"format": ".1f", "tickCount": 5}}
      },
      "layer": [
        {"mark": {"type": "line"}, "encoding": {}},
        {"mark": {"type": "point"},
         "encoding": {"tooltip": [
           {"field": "policy"}, {"field": "evict_at", "type": "quantitative", "title": "evicted at", "format": "d"},
           {"field": "what"}, {"field": "share", "type": "quantitative", "format": ".3f"}
         ]}}
      ]
    })json");
    panel["transform"] = {{{"filter", fmt::format("datum.what === '{}'", what)}}};
    panel["width"] = style.width() - 5.5 * style.font();
    panel["height"] = 0.32 * style.width();
    Json& encoding = panel["encoding"];
    encoding["x"]["scale"]["padding"] = style.font();
    encoding["y"]["axis"]["title"] = what == kept ? "Jaccard overlap" : "share wanted back";
    encoding["color"] = style.colour(policies);
    panel["layer"][0]["encoding"]["strokeDash"] = style.dash(policies);
    panel["layer"][1]["encoding"]["shape"] = style.shape(policies);
    if (what == back) encoding["x"]["axis"]["title"] = "eviction position (tokens)";
    spec["vconcat"].push_back(std::move(panel));
  }
  style.choose(spec, "capacity", capacities, capacity);
  filterable(spec, {"policy", "shown_capacity"});
  return figure;
}

const FigureRegistration registration({.name = "stability",
                                       .question = "Does a policy still want later what it kept before?",
                                       .needs = "kept sets (--kept) of several eviction positions (replay --evict-at)",
                                       .order = 150,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
