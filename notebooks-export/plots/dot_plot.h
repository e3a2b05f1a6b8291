// A dot plot of differences with their intervals: a row per subject, a dot per capacity.
#pragma once

#include <string>
#include <vector>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

struct DotPlot {
  std::string subject;                  ///< the column that names the rows
  std::vector<std::string> subjects;    ///< from the top
  std::vector<std::string> capacities;  ///< those in the table
  std::string title;                    ///< of the x axis
};

/// At most `most` of the capacities, spread over them, the first and last included.
std::vector<std::string> spread(const std::vector<std::string>& capacities, std::size_t most);

/// Draws the columns `difference`, `low`, `high`, `capacity` and `sure` ("yes" is filled) of the figure's table.
void draw_dots(Figure& figure, const FigureStyle& style, const DotPlot& plot);

}  // namespace kvreplay
