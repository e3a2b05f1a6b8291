// Lines per policy over the steps of caches that are evicted while tokens come.
#pragma once

#include <span>
#include <string>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

/// Fills the table of `figure` with the courses of a measure: policy, capacity, first and last step, mean, and the ends
/// of its band. Where these are too many rows, of one capacity; returns what a caption says of that.
std::string add_time_courses(Figure& figure, const FigureStyle& style, std::span<const TimeCourse> courses,
                             Measure measure);

/// Draws the columns `mean` and, where it is there, the band `low` to `high` of its table. Numbers that are above 0 and
/// far apart stand on a logarithmic axis.
void draw_step_lines(Figure& figure, const FigureStyle& style, const std::string& title);

/// " Thinned: a point is the mean of 8 steps." for captions; empty where every step has its own.
std::string steps_thinned(const DataTable& table);

}  // namespace kvreplay
