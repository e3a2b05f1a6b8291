// Means over a grid of settings that may have holes: balanced, so that what is compared is averaged over the same
// others.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "analysis/step_effects.h"

namespace kvreplay {

/// What a grid has at one value of each of its axes.
struct GridCell {
  std::vector<double> at;  ///< as many as there are axes
  double mean = 0;         ///< over the settings
  Interval interval;       ///< of a single setting; else NaN
  int settings = 0;        ///< the same number in every cell
};

/// The settings of one method at one capacity over some of its numeric parameters. Each cell is the mean over the same
/// settings of all other parameters, or one setting: those others count that have the largest set of cells, and what
/// others have beside or in part is left out.
struct ParameterGrid {
  std::vector<GridCell> cells;      ///< ascending in `at`
  std::vector<std::string> others;  ///< "window=32" of each that is averaged over; one empty text where all is on axes
  std::vector<const ParameterPoint*> points;  ///< those that count
  std::size_t left_out = 0;                   ///< settings that do not count
};

/// `points` are of one method and capacity, and have all the parameters that `axes` names. Of several others with
/// different cells, equally many, those that come first count.
ParameterGrid parameter_grid(std::span<const ParameterPoint* const> points, std::span<const std::string> axes);

/// The two parameters whose grid tells the most: its cells times the share of the cells of a full grid that these are,
/// so that a full grid goes before a somewhat larger one with gaps. Of those that tell as much the ones declared first;
/// none where no grid has two values of each.
std::vector<std::string> widest_pair(std::span<const ParameterPoint* const> points);

}  // namespace kvreplay
