// Lines against the positions that were kept, one per policy, with intervals.
#pragma once

#include <string>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

/// Draws `column`, `low` and `high` of a figure's table against its column `kept`.
void draw_capacity_lines(Figure& figure, const FigureStyle& style, const std::string& column, const std::string& title);

}  // namespace kvreplay
