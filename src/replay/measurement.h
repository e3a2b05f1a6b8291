// What kept sets do to a layer's output.
#pragma once

#include <span>
#include <vector>

#include "base/buffer.h"
#include "replay/evaluation.h"
#include "replay/eviction.h"
#include "replay/result.h"

namespace kvreplay {

/// What one layer's kept sets do.
struct LayerMeasures {
  LayerNumbers numbers;            ///< but for rank agreement, which is not measured here
  float output_error = 0;          ///< of the full outputs as the trace stores them: see LayerResult
  std::vector<float> change = {};  ///< see LayerResult
};

/// Measures what several settings leave of a layer's cache against the same full outputs: head by head, then slice by
/// slice of the output projection. Settings whose residencies are all equal are measured once. What passes the
/// projection is summed in float32 over heads and dimensions, and its squares in double.
class LayerMeasurement {
 public:
  /// The trace and the residencies must outlive it. `spans` are those whose recall is measured.
  /// `keeps_changes`: also give what is added to the residual stream, where the layer has an output projection.
  /// `over_time`: of every setting whether it has a schedule, and so what it does is measured over time; empty: none.
  /// `outputs`: of every setting the evicted outputs, as in LayerResult, where residencies do not tell them, or null;
  /// empty: of none.
  LayerMeasurement(const CapturedRun& trace, int layer, const Eviction& eviction, std::span<const Span> spans,
                   const std::vector<const LayerResidencies*>& settings, bool keeps_changes = false,
                   const std::vector<const Matrix*>& outputs = {}, const std::vector<bool>& over_time = {});

  /// Measures one KV head. Heads may be measured by different threads at once. Throws Error, naming the query, where
  /// attention leaves float32's range.
  void measure_head(int kv_head);

  /// How many panels of outputs there are to lay out, and how many slices to project.
  int panels() const;
  int slices() const;

  /// Once all heads are measured: puts some of the outputs side by side, as project_slice() multiplies them. Panels may
  /// be laid out by different threads at once.
  void lay_out_panel(int panel);

  /// Once all panels are laid out: adds one slice to the layer error. Slices may be projected by different threads at
  /// once.
  void project_slice(int slice);

  /// Once all slices are projected: the measures of every setting. Throws Error where an output leaves float32's range.
  std::vector<LayerMeasures> take();

  /// The most bytes that an object of this class takes per setting, and all that measure_head() and project_slice()
  /// take while they run excepted.
  static Index memory_per_setting(const ModelInfo& model, Index queries, Index spans, bool keeps_changes = false,
                                  bool over_time = false);

  /// What comes to that once: the last panel may be nearly empty. The full cache is measured as one more setting.
  static Index memory(const ModelInfo& model);

 private:
  // What is summed over the channels of a projected row x: of a difference, or of a full output y.
  struct Sums {
    double squares = 0;             // Σ x²
    double with_full = 0;           // Σ x·y; this and the rest only where a norm with weight w follows
    double weighted_squares = 0;    // Σ w²x²
    double weighted_with_full = 0;  // Σ w²x·y
  };

  // What the norm behind the projection makes of y + d: w·((y + d)/after), which is w·y/before + w·(d/after +
  // factor·y).
  struct Rescaling {
    double after = 1;
    double factor = 0;  // 1/after − 1/before
  };

  const RmsNorm& output_norm() const;
  Rescaling rescaling_of(const Sums& full, const Sums& difference) const;
  double change_behind_norm(const Sums& full, const Sums& difference) const;
  std::vector<float> change_of(std::size_t kind, const std::vector<Sums>& sums) const;
  void measure_spans(std::span<const Span> spans);
  void measure_survival(std::size_t kind, std::size_t span, int first, int end);
  void note_evictions(const Residency& residency, std::span<StepOutcome> steps) const;
  void measure_steps(std::size_t kind);
  const Residency& residency_of(std::size_t kind, int query_head) const;

  const CapturedRun& trace_;
  int layer_;
  Eviction eviction_;
  std::vector<const LayerResidencies*> distinct_;
  std::vector<const Matrix*> evicted_;  // [kind]: evicted outputs that are given, or null
  std::vector<std::size_t> kind_;       // [setting]: which of the distinct ones
  Matrix outputs_;                      // [E, H · D], then the differences of every kind below each other
  bool keeps_changes_ = false;
  Matrix projected_;                   // the same through the projection, [.., C], where changes are kept
  Buffer panels_;                      // the same, transposed: [panel][H · D][kPanel], where there is a projection
  std::vector<LayerNumbers> numbers_;  // [kind]
  std::vector<std::vector<StepOutcome>> steps_;  // [kind]: [H, E], or empty where nothing is measured over time
  std::vector<double> output_errors_;            // [KV head]: summed over the group and the queries
  std::vector<std::vector<Sums>> sums_;          // [slice][row of outputs_]
};

/// All of the above, by so many threads.
std::vector<LayerMeasures> measure_layer(const CapturedRun& trace, int layer, const Eviction& eviction,
                                         std::span<const Span> spans,
                                         const std::vector<const LayerResidencies*>& settings, int threads,
                                         const std::vector<bool>& over_time = {});

}  // namespace kvreplay
