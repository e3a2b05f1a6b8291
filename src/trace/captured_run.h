// A captured run as replays see it: in a file, or in memory.
#pragma once

#include <string>
#include <vector>

#include "trace/trace.h"

namespace kvreplay {

/// Gives the tensors of a run, one head at a time: TraceReader those of a file, a live run those that it holds. Every
/// member may be called from several threads at once.
class CapturedRun {
 public:
  virtual ~CapturedRun() = default;

  /// Where the run is from, as messages begin: "run.h5".
  virtual std::string name() const = 0;

  /// What tells runs apart whatever they are called.
  virtual std::string digest() const = 0;

  virtual const TraceInfo& info() const = 0;

  /// Rows [first, first + count) of one head's tensor: [count, Dk or Dv]. Keys and values are those that the layer
  /// reads, wherever they stand. `head` is a KV head for keys and values, a query head for queries and outputs; a row
  /// is a position for keys and values, an index into query_positions otherwise. Throws Error on damage, and on NaN or
  /// infinity, naming layer, head and position.
  virtual Matrix read(int layer, HeadTensor tensor, int head, Index first, Index count) const = 0;

  /// The same into the caller's memory: [count, Dk or Dv] at `out`, row-major.
  virtual void read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const = 0;

  /// Asks for one head's tensor to be in memory soon, so that read_rows() does not wait; returns at once.
  virtual void prefetch(int layer, HeadTensor tensor, int head) const = 0;

  /// Whether any rows are read without unpacking more than them. If not, whole heads come cheapest.
  virtual bool reads_directly(int layer, HeadTensor tensor) const = 0;

  /// The same of the output projection, which the layer must have: if not, many rows at a time come cheapest.
  virtual bool reads_projection_directly(int layer) const = 0;

  /// How the keys of the first layer that attends are stored.
  virtual DType element_type() const = 0;

  virtual bool has_output_projection(int layer) const = 0;

  /// The columns of the layer's output projection that query head `head` is multiplied by: [C, Dv].
  /// Throws Error as read() does, and if there is none.
  virtual Matrix read_output_projection(int layer, int head) const = 0;

  /// Rows [first_row, first_row + count) of the layer's output projection with the columns of all query heads:
  /// [count, H·Dv] into the caller's memory at `out`, row-major. They lie together, a head's columns do not. Throws
  /// Error as read() does, and if there is none.
  virtual void read_projection_rows(int layer, Index first_row, Index count, float* out) const = 0;

  /// What tells output projections of layers apart whatever run they are of: equal where all their elements are stored
  /// alike. Empty where nobody knows. Throws Error as read() does, and if there is none.
  virtual std::string projection_digest(int /*layer*/) const { return ""; }

  virtual bool has_attention_mass(int layer) const = 0;

  /// For each prompt position, the attention that it received from all causal prompt queries of a query head: [P].
  /// Throws Error as read() does, and if there is none.
  virtual std::vector<float> read_attention_mass(int layer, int head) const = 0;
};

}  // namespace kvreplay
