// Heat maps of layer × head, one per policy.
#pragma once

#include <string>
#include <vector>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

/// How many neighbouring layers and heads make a cell, where a map is to have `most` at most.
struct HeadCells {
  int layers = 1;  ///< per cell
  int heads = 1;
  static HeadCells of(int num_layers, int num_heads, std::size_t most);
};

/// One number per policy, capacity, layer and head.
struct HeadValue {
  std::string policy;
  std::string capacity_request;
  int layer = 0;
  int head = 0;
  double value = 0;
};

/// The same in cells: adds to the figure's table, and returns what its caption has to say about it.
std::string add_head_cells(Figure& figure, const std::vector<HeadValue>& values);

/// Draws the maps side by side with one scale of colours, called `title`.
void draw_head_maps(Figure& figure, const FigureStyle& style, const std::vector<std::string>& policies,
                    const Json& scale, const std::string& title, const std::string& format);

/// The policies that get a map each: those with values.
std::vector<std::string> mapped_policies(const FigureStyle& style, const std::vector<HeadValue>& values);

}  // namespace kvreplay
