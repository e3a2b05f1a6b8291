// Whether what a replay measures tells what the model loses: how far offline measures rank settings as the KL
// divergence of a live run does. docs/analysis.md says how.
#pragma once

#include <limits>
#include <map>
#include <string>
#include <vector>

#include "analysis/bootstrap.h"
#include "analysis/result_set.h"

namespace kvreplay {

/// An offline measure as one number of a result: the mean of its numbers (of some, the root of the mean square, as
/// everywhere), or that of their squares.
struct Predictor {
  Measure measure = Measure::layer_error;
  bool squared = false;
  bool late = false;  ///< over late_layers() alone

  std::string name() const;  ///< in tables: "layer_error", "layer_error squared", "residual_error late"
  std::string noun() const;  ///< in sentences: "layer error", "squared layer error"

  bool operator==(const Predictor&) const = default;
};

/// A setting where it was replayed and the model ran on: what offline measures say, and what the model loses.
struct PredictedLoss {
  std::string trace;
  int eviction_position = 0;
  std::string policy;
  std::string capacity_request;
  double loss = 0;              ///< KL divergence in nats, mean over evaluation queries
  std::vector<double> offline;  ///< of each predictor; NaN where it was not measured
};

/// How far a predictor ranks settings as the model's loss does: Spearman's correlation, 1 where what it calls worse
/// loses more throughout. NaN where there are too few settings, or where one of the two ranks none before another.
struct Prediction {
  Predictor predictor;
  double all = std::numeric_limits<double>::quiet_NaN();  ///< over all settings, capacities and prompts together
  /// Among the policies of the same prompt and capacity: every prompt weighs the same, and in it every capacity.
  double mean = std::numeric_limits<double>::quiet_NaN();
  Interval interval;  ///< of `mean`, prompts being drawn; NaN of a single prompt
  double smallest = std::numeric_limits<double>::quiet_NaN();
  int groups = 0;                             ///< prompts and capacities with kFewestPredicted policies
  int prompts = 0;                            ///< those of the groups
  std::map<std::string, double> of_capacity;  ///< the mean over the prompts that have a group at a capacity
};

/// Of fewer settings no correlation is taken.
constexpr int kFewestPredicted = 4;

struct LossPredictions {
  std::vector<Predictor> predictors;    ///< those that are measured, as measures() has them
  std::vector<PredictedLoss> settings;  ///< in the order of the results
  std::vector<Prediction> predictions;  ///< of those that say anything here, best mean first
};

/// Of the results whose model ran on, without oracles and what keeps everything. Of errors there are two predictors,
/// their mean and that of their squares; of those whose means are roots of mean squares, that of all and of late
/// layers. Empty where no model ran on, or nothing else was measured. Only `bootstrap`'s resamples, seed and confidence
/// count: what is drawn are prompts, each with its mean.
LossPredictions loss_predictions(const ResultSet& results, const BootstrapOptions& bootstrap);

}  // namespace kvreplay
