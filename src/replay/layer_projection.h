// A layer's output projection as distances see it, computed once for all heads.
#pragma once

#include <vector>

#include "base/buffer.h"
#include "policy/projection.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// How many slices of kProjectionSlice rows a layer's output projection has.
int projection_slices(const ModelInfo& model);

/// The projection factors of a layer's query heads. Rows of the projection hold all heads, so they are read slice by
/// slice for all heads at once, and each slice only once.
class LayerProjection {
 public:
  /// The reader must outlive it, and the layer have an output projection.
  LayerProjection(const CapturedRun& trace, int layer);

  /// Reads one slice. Slices may be read by different threads at once. Throws Error as the run's read() does.
  void read_slice(int slice);

  /// Once all slices are read: computes the factor of one query head. Heads may be computed by different threads at
  /// once.
  void decompose(int query_head);

  /// Once all heads are computed: gives up what only computing them took.
  void finish() { grams_.clear(); }

  /// projection_factor_of the head's part, to the bit.
  const Matrix& factor(int query_head) const { return factors_[static_cast<std::size_t>(query_head)]; }

  /// All of it on the calling thread. Throws Error as read_slice() does.
  void compute();

  /// Bytes that an object of this class takes.
  static Index memory(const ModelInfo& model);

 private:
  const CapturedRun& trace_;
  int layer_;
  std::vector<Buffer> grams_;  // [slice]: of all heads below each other, [H · D, factor_width(D)]
  std::vector<Matrix> factors_;
};

}  // namespace kvreplay
