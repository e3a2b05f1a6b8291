// How far the heads of a layer keep the same.
#include <fmt/format.h>

#include "notebooks-export/figure_style.h"
#include "notebooks-export/plots/layer_lines.h"

namespace kvreplay {
namespace {

Figure draw(const Analysis& analysis, const FigureStyle& style) {
  Figure figure;
  figure.name = "head-overlap";
  figure.question = "Do the heads of a layer keep the same positions?";
  // Within a group where sets are per query head, since that is what sharing a set would cost; else between KV heads.
  bool within = false;
  for (const HeadOverlap& row : analysis.head_overlaps) within = within || row.within_group;
  figure.table = DataTable({"policy", "capacity", "layer", "heads", "jaccard"});
  for (const HeadOverlap& row : analysis.head_overlaps) {
    if (row.layer < 0 || !style.shows(row.policy) || row.within_group != within) continue;
    figure.table.add({row.policy, row.capacity_request, static_cast<double>(row.layer),
                      std::string(within ? "query heads of one KV head" : "KV heads of a layer"),
                      rounded(row.jaccard)});
  }
  if (figure.table.empty()) return figure;
  const std::string capacity = style.middle_capacity(distinct(figure.table, "capacity"));
  figure.caption = fmt::format(
      "Jaccard overlap |a ∩ b| / |a ∪ b| of the sets that two {} keep, mean over pairs, traces and eviction positions, "
      "at "
      "a capacity of {}: 1 where all keep the same.{}",
      within ? "query heads of one KV head" : "KV heads of a layer", capacity_text(capacity), style.shown_text());
  figure.spec = style.spec(figure.question, figure.caption);
  draw_layer_lines(figure, style, "jaccard", "Jaccard overlap between heads");
  return figure;
}

const FigureRegistration registration({.name = "head-overlap",
                                       .question = "Do the heads of a layer keep the same positions?",
                                       .needs = "kept sets (--kept) of policies whose heads keep sets of their own",
                                       .order = 140,
                                       .draw = draw});

}  // namespace
}  // namespace kvreplay
