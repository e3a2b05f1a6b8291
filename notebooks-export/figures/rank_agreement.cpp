// How far a policy ranks positions as the oracle does.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/layer_lines.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "rank-agreement";
  figure.question = "Do the policies rank positions as the oracle does?";
  figure.table = DataTable({"policy", "capacity", "layer", "spearman", "kendall"});
  for (const RankAgreement& row : analysis.rank_agreements) {
    if (row.layer < 0 || !style.shows(row.policy)) continue;
    figure.table.add({row.policy, row.capacity_request, static_cast<double>(row.layer), rounded(row.spearman),
                      rounded(row.kendall)});
  }
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Spearman's rank correlation between a policy's scores and the oracle's importance of each position, at a "
      "capacity "
      "of {}: 1 is the same order, 0 none. Means over traces, eviction positions and query heads. The table has "
      "Kendall's τ_b too.{}",
      capacity_text(capacity), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_layer_lines(figure, style, "spearman", "Spearman's rank correlation");
  return figure;
}

const FigureRegistration registration({.name = "rank-agreement",
                                       .question = "Do the policies rank positions as the oracle does?",
                                       .needs = "rank agreement, which `replay --rank-agreement` measures",
                                       .order = 130,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
