// What each step of a method does: pairs of settings that differ in one thing, with everything else equal. The offline
// counterpart of a paper's ablation tables.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "analysis/comparison.h"

namespace kvreplay {

/// A setting against the reference setting of its method, paired on trace, eviction position, layer, head and query.
struct StepEffect {
  std::string reference;  ///< canonical spec: of the method's settings the nearest to its defaults, of several that
                          ///< from which most others differ in one thing, then the first
  std::string changed;    ///< canonical spec
  std::string step;       ///< "indicator", "temporal smoothing", "spatial smoothing", "observation window", …; the
                          ///< parameter's name where no step is known for it
  std::string change;     ///< "temporal: ema → mean"; "method: restkv → attention"
  std::string capacity_request;
  int layer = -1;  ///< −1: all layers
  PairedDifference difference;
};

/// Of every method with several settings, and of methods that are another one without a step (attention is ReST-KV
/// without its indicator) where all parameters that both have are the same: a row per change and capacity over all
/// layers, then the same per layer. Not where one of the two had nothing to choose. p values are corrected over the
/// rows of a capacity: those of all layers, and those per layer.
std::vector<StepEffect> step_effects(const ResultSet& results, Measure measure, const BootstrapOptions& bootstrap);

/// A setting of a method as a point in the space of its numeric parameters, for curves and heat maps.
struct ParameterPoint {
  std::string policy;
  std::string method;  ///< with what is the same for all its points and not the default: "restkv(window=16)"
  std::string capacity_request;
  std::vector<std::pair<std::string, double>> parameters;  ///< those that vary, in order of declaration
  double mean = 0;
  Interval interval;
};

/// Of every method with settings that differ in numeric parameters, where there was something to choose. `rows`: a
/// comparison by policy and capacity.
std::vector<ParameterPoint> parameter_points(std::span<const ComparisonRow> rows);

}  // namespace kvreplay
