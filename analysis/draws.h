// What chance alone changes: policies that differ in nothing but the draw that their seeds number.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "analysis/comparison.h"

namespace kvreplay {

/// Several draws of one policy at one capacity, by the means of a comparison.
struct DrawSummary {
  std::string policy;  ///< the spec without what numbers the draw: "vase(recent=32)"
  std::string capacity_request;
  int draws = 0;         ///< at least two
  double mean = 0;       ///< of the draws' means
  double deviation = 0;  ///< their standard deviation, over draws − 1
  double smallest = 0;
  double largest = 0;
};

/// Of every policy that `rows`, a comparison by policy and capacity, has several draws of, in their order.
std::vector<DrawSummary> draw_summaries(std::span<const ComparisonRow> rows);

/// A spec without the parameters that number a draw; a text that is no spec as it is.
std::string without_draw(const std::string& spec);

}  // namespace kvreplay
