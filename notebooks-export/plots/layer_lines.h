// Lines over the layers of a model, one per policy, at one capacity.
#pragma once

#include <string>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

/// Draws `column` of a figure's table against its column `layer`.
void draw_layer_lines(Figure& figure, const FigureStyle& style, const std::string& column, const std::string& title);

/// How many layers a table with a numeric column `layer` tells apart.
std::size_t layers_in(const DataTable& table);

}  // namespace kvreplay
