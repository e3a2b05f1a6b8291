// What caches go through while tokens come: measures, spans and positions over the steps of results with a schedule.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "analysis/result_set.h"
#include "analysis/retention.h"

namespace kvreplay {

/// Steps that stand together: the first is that of the first token after the eviction, 1. At most `most` ranges of
/// equal width; the last may be shorter.
struct StepBins {
  int steps = 0;
  int width = 1;

  int count() const { return (steps + width - 1) / width; }
  int first_step(int bin) const { return bin * width + 1; }
  int last_step(int bin) const;
  int bin_of(int step) const { return (step - 1) / width; }
  static StepBins of(int steps, int most);
};

/// A measure of one setting over steps.
struct TimeCourse {
  /// Over some neighbouring steps.
  struct Point {
    int first_step = 0;
    int last_step = 0;
    double mean = 0;
    double low = 0;   ///< below which is a quarter of what layers and traces give, each the mean over these steps,
    double high = 0;  ///< and above which are as many
  };

  std::string policy;
  std::string capacity_request;
  Measure measure = {};
  std::vector<Point> points;  ///< of the steps that have numbers
};

/// Of measures per query of a layer, or per query and head, in the order given; of settings with a schedule, and of
/// layer errors, where there is such a setting, of all but those that keep everything. Every trace and eviction weighs
/// the same, and there every layer and head. None where nothing was measured over time.
std::vector<TimeCourse> time_courses(const ResultSet& results, std::span<const Measure> measures, int most_bins);

/// Which share of an annotated span is still cached over steps: means over layers, query heads and these steps.
struct SpanSurvival {
  struct Point {
    int first_step = 0;
    int last_step = 0;
    double share = 0;
  };

  std::string policy;
  std::string capacity_request;
  std::string trace;  ///< empty: mean over all spans of all traces, every trace weighing the same
  std::string label;  ///< empty: the same
  int start = 0;      ///< where the span begins
  std::vector<Point> points;
};

/// The mean over all spans, then every span, by setting. None of spans that no layer held.
std::vector<SpanSurvival> span_survivals(const ResultSet& results, int most_bins);

/// Which positions are cached when: of one setting in one trace.
struct ResidencyRaster {
  std::string trace;
  std::string policy;
  std::string capacity_request;
  int eviction_position = 0;
  StepBins steps;
  RasterBins positions;  ///< of all tokens up to the last step's
  /// [step bin][position bin]: of the positions of the cell that had come, over its evaluation queries, heads and
  /// layers, the share that was cached. NaN where none had come.
  std::vector<float> share;

  float at(int step_bin, int position_bin) const {
    return share[static_cast<std::size_t>(step_bin * positions.count() + position_bin)];
  }
};

/// Of settings with a schedule that have kept sets, over the layers that held the whole prompt: what a sliding window
/// leaves behind is nothing that a policy did.
std::vector<ResidencyRaster> residency_rasters(const ResultSet& results, const RetentionSet& kept, int most_step_bins,
                                               int most_position_bins);

}  // namespace kvreplay
