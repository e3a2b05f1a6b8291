// Everything that analysis says about a set of results: what `analyze` prints and `report` draws.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "analysis/capacity_curve.h"
#include "analysis/comparison.h"
#include "analysis/draws.h"
#include "analysis/importance.h"
#include "analysis/prediction.h"
#include "analysis/result_set.h"
#include "analysis/retention.h"
#include "analysis/step_effects.h"
#include "analysis/time_course.h"

namespace kvreplay {

struct AnalysisOptions {
  Measure measure = Measure::layer_error;
  /// A policy's spec, or a method's name that one policy has; empty: see default_baseline().
  std::string baseline;
  std::optional<double> goal;  ///< none: the baseline's mean at its middle capacity
  BootstrapOptions bootstrap;
  int raster_bins = 512;
  int step_bins = 128;
  bool details = true;  ///< also what no terminal shows: by_layer, by_head, rasters, what is over time, and importance
};

/// What one trace is.
struct TraceOverview {
  std::string trace;
  std::string model;
  int num_layers = 0;
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int prompt_length = 0;
  std::vector<int> eviction_positions;        ///< ascending: those that means are over
  std::vector<int> other_eviction_positions;  ///< ascending: those that means leave out, see ResultSet::comparable()
  int evaluation_queries = 0;                 ///< of the first of those that means are over
  std::vector<Span> spans;
  std::vector<std::string> token_pieces;  ///< [T] where the trace was found, else empty
};

struct Analysis {
  AnalysisOptions options;  ///< with what was decided where nothing was asked for; the baseline may stay empty
  /// What is told apart by layers: the measure, or where that is of the whole model, the layer error.
  Measure layer_measure = Measure::layer_error;
  std::vector<TraceOverview> traces;
  std::vector<SettingKey> settings;
  /// Those at whose capacity most others are of other traces or eviction positions: their means stand beside the
  /// others' and cannot be compared with them, and no finding ranks them.
  std::vector<SettingKey> apart;
  std::vector<ComparisonRow> comparison;  ///< by policy and capacity
  std::vector<ComparisonRow> beside;      ///< the same of `layer_measure`, where that is another: without a baseline
  std::vector<ComparisonRow> by_layer;    ///< `layer_measure` by policy, capacity and layer
  std::vector<ComparisonRow> by_head;     ///< head error by policy, capacity, layer and head; intervals in closed form
  std::vector<DrawSummary> draws;         ///< of policies that differ in their seeds alone
  std::vector<CapacityCurve> curves;
  std::vector<StepEffect> step_effects;  ///< those of single layers are of `layer_measure`
  std::vector<ParameterPoint> parameter_points;
  std::vector<PolicyOverlap> overlaps;
  std::vector<SpanRecall> span_recalls;
  std::vector<SpanExcess> span_excesses;  ///< against what chance keeps
  std::vector<RankAgreement> rank_agreements;
  std::vector<ComparisonRow> regret;  ///< against the best oracle, by policy and capacity: those with a difference
  std::string oracle;                 ///< which one; empty: none was replayed
  LossPredictions loss_predictions;   ///< whether offline measures tell what the model loses
  std::vector<HeadOverlap> head_overlaps;
  std::vector<Stability> stabilities;
  std::vector<KeptRaster> rasters;
  std::vector<TimeCourse> time_courses;  ///< layer error, cached positions and late hits; none without a schedule
  std::vector<SpanSurvival> span_survivals;
  std::vector<ResidencyRaster> residency_rasters;
  std::vector<ImportanceMap> importance;  ///< of the restkv setting's worst head, where the trace was found
  std::vector<std::string> notes;  ///< what could not be computed and what it takes; what whoever reads has to know
};

/// What it is computed from.
struct AnalysisInput {
  ResultSet results;
  RetentionSet kept;
  std::vector<TraceReader> traces;  ///< those of the results that were found, for token text and importance
};

/// The measure where none is asked for: the KL divergence where the model ran on over all that is kept, else the layer
/// error; with `of_layers` nothing of the whole model. `notes` receives what one may wonder about.
Measure default_measure(const ResultSet& results, bool of_layers, std::vector<std::string>& notes);

/// The baseline where none is asked for, oracles and what keeps everything apart: of each method the setting nearest to
/// its defaults; of these that of the usual baseline, else the one with the middle mean at the first capacity. Empty
/// where there are no two policies.
std::string default_baseline(const ResultSet& results, Measure measure);

/// Computes all of it. What files lack is left out, and told in notes where one may wonder. Throws as its parts do.
Analysis analyze(const AnalysisInput& input, AnalysisOptions options);

}  // namespace kvreplay
