// Layer × head heat maps of the head error.
#include <fmt/format.h>

#include <algorithm>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/head_maps.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "error-by-head";
  figure.question = "Which heads lose most?";
  std::vector<HeadValue> values;
  for (const ComparisonRow& row : analysis.by_head) {
    if (!style.shows(row.key.policy)) continue;
    values.push_back({row.key.policy, row.key.capacity_request, row.key.layer, row.key.head, row.distribution.mean});
  }
  const std::vector<std::string> policies = mapped_policies(style, values);
  std::erase_if(values, [&](const HeadValue& value) {
    return value.capacity_request == kAllPositions || std::ranges::find(policies, value.policy) == policies.end();
  });
  const std::string thinned = add_head_cells(figure, values);
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption =
      fmt::format("Head error ‖ô−o‖/‖o‖ of each layer and query head at a capacity of {}. {}{}{}",
                  capacity_text(capacity), about_means(analysis, "evaluation queries"), thinned, style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_head_maps(figure, style, policies, sequential_scale(), "head error (relative to the full output)", ".2f");
  return figure;
}

const FigureRegistration registration(
    {.name = "error-by-head", .question = "Which heads lose most?", .needs = "head errors", .order = 40, .draw = draw});

}  // namespace
}  // namespace kvreplay
