// Layer × head heat maps of the difference from the baseline.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/head_maps.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  const std::string& baseline = analysis.options.baseline;
  Figure figure;
  figure.name = "difference-by-head";
  figure.question = fmt::format("Which heads gain or lose against {}?", baseline);
  std::map<std::tuple<std::string, int, int>, double> of_baseline;
  for (const ComparisonRow& row : analysis.by_head) {
    if (row.key.policy != baseline) continue;
    of_baseline[{row.key.capacity_request, row.key.layer, row.key.head}] = row.distribution.mean;
  }
  std::vector<HeadValue> values;
  for (const ComparisonRow& row : analysis.by_head) {
    const auto found = of_baseline.find({row.key.capacity_request, row.key.layer, row.key.head});
    if (!style.shows(row.key.policy) || row.key.policy == baseline || found == of_baseline.end()) continue;
    values.push_back(
        {row.key.policy, row.key.capacity_request, row.key.layer, row.key.head, row.distribution.mean - found->second});
  }
  const std::vector<std::string> policies = mapped_policies(style, values);
  std::erase_if(values, [&](const HeadValue& value) {
    return value.capacity_request == kAllPositions || std::ranges::find(policies, value.policy) == policies.end();
  });
  const std::string thinned = add_head_cells(figure, values);
  if (figure.table.empty()) return figure;
  // One outlier would leave everything else pale: the scale ends where 98 % of the cells are, and says so by clamping.
  std::vector<double> sizes;
  for (const std::vector<Cell>& row : figure.table.rows()) sizes.push_back(std::abs(std::get<double>(row.back())));
  std::ranges::sort(sizes);
  const double largest = rounded(sizes[static_cast<std::size_t>(0.98 * static_cast<double>(sizes.size() - 1))]);
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Head error less that of {} at a capacity of {}: blue heads lose less than under {}, orange ones more; colours "
      "end at ±{:.2g}, below which are 98 % of the cells. {}{}{}",
      baseline, capacity_text(capacity), baseline, largest, about_means(analysis, "evaluation queries"), thinned,
      style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  Json scale = diverging_scale(largest);
  scale["clamp"] = true;
  draw_head_maps(figure, style, policies, scale, fmt::format("head error less that of {}", baseline), "+.2f");
  figure.spec["spec"]["encoding"]["color"]["legend"]["values"] = {-largest, 0, largest};
  return figure;
}

const FigureRegistration registration({.name = "difference-by-head",
                                       .question = "Which heads gain or lose against the baseline?",
                                       .needs = "head errors, and a baseline among the policies (--baseline)",
                                       .order = 50,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
