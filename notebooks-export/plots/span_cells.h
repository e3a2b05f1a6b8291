// What survives of annotated spans, by the depth at which they lie.
#pragma once

#include <string>
#include <vector>

#include "notebooks-export/figure_style.h"

namespace kvreplay {

/// The mean recall of the spans in a range of depths.
struct SpanCell {
  std::string policy;
  std::string capacity_request;
  int layer = -1;
  std::string depth;  ///< "20–30 %"
  double recall = 0;
  double kept_share = 0;  ///< of the prompt, which chance keeps of every span
  int spans = 0;          ///< of all traces and eviction positions
};

/// Means over spans, traces and eviction positions, of the policies that the style shows; `per_layer`: of single
/// layers, else of all layers together.
std::vector<SpanCell> span_cells(const Analysis& analysis, const FigureStyle& style, bool per_layer);

/// The ranges of depths from the first to the last that there are, the beginning of the prompt first.
std::vector<std::string> depths_of(const std::vector<SpanCell>& cells);

/// Lays `spec`, a drawing of one policy with the depths on its y axis, out as a panel per policy: as many side by side
/// as their names leave room for. Colours are the share that was kept.
void draw_span_panels(Figure& figure, const FigureStyle& style, const std::vector<std::string>& policies,
                      const std::vector<std::string>& depths, Json panel);

/// The policies that get a panel each: those with spans.
std::vector<std::string> policies_of(const FigureStyle& style, const std::vector<SpanCell>& cells);

}  // namespace kvreplay
