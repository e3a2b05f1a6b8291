// Reads kvtrace files, one head at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "trace/trace.h"

namespace kvreplay {

/// How a tensor is stored, for `inspect`.
struct StoredTensor {
  std::string path;  ///< such as /layers/0/keys
  std::vector<Index> shape;
  DType type = DType::float32;
  Index stored_bytes = 0;  ///< on disk, after filters
  std::string storage;     ///< "contiguous", "chunked", or "chunked, " and the filters' names
  std::string xxh64;       ///< the stored digest, or empty
};

/// An open kvtrace file. All metadata is read and validated when it is opened; tensors are read on request.
/// Every member may be called from several threads at once.
class TraceReader {
 public:
  /// Throws Error, naming file, path inside it and reason, unless the file is a complete kvtrace of a version this
  /// reader knows whose shapes agree with each other.
  explicit TraceReader(const std::filesystem::path& path);
  ~TraceReader();
  TraceReader(TraceReader&&) noexcept;
  TraceReader& operator=(TraceReader&&) noexcept;

  const std::filesystem::path& path() const;
  const TraceInfo& info() const;

  /// Rows [first, first + count) of one head's tensor: [count, Dk or Dv]. Keys and values are those that the layer
  /// reads, wherever in the file they stand. `head` is a KV head for keys and values, a query head for queries and
  /// outputs; a row is a position for keys and values, an index into query_positions otherwise. Throws Error on damage,
  /// and on NaN or infinity, naming layer, head and position.
  Matrix read(int layer, HeadTensor tensor, int head, Index first, Index count) const;

  /// The same into the caller's memory: [count, Dk or Dv] at `out`, row-major.
  void read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const;

  /// Asks the system to bring one head's tensor into memory, so that read_rows() does not wait for the disk; returns at
  /// once. Does nothing where only HDF5 finds the bytes, as of filtered tensors.
  void prefetch(int layer, HeadTensor tensor, int head) const;

  /// Whether any rows are read without unpacking more than them. If not, whole heads come cheapest.
  bool reads_directly(int layer, HeadTensor tensor) const;

  /// The same of the output projection, which the layer must have: if not, many rows at a time come cheapest.
  bool reads_projection_directly(int layer) const;

  /// How the keys of the first layer that attends are stored.
  DType element_type() const;

  bool has_output_projection(int layer) const;

  /// How positions turn the layer's keys and queries; null where the file does not say. It lives as long as the reader.
  const RotaryTable* rotary(int layer) const;

  /// The columns of the layer's output projection that query head `head` is multiplied by: [C, Dv].
  /// Throws Error as read() does, and if the trace has none.
  Matrix read_output_projection(int layer, int head) const;

  /// Rows [first_row, first_row + count) of the layer's output projection with the columns of all query heads:
  /// [count, H·Dv] into the caller's memory at `out`, row-major. They lie together in the file, a head's columns do
  /// not. Throws Error as read() does, and if the trace has none.
  void read_projection_rows(int layer, Index first_row, Index count, float* out) const;

  bool has_attention_mass(int layer) const;

  /// For each prompt position, the attention that it received from all causal prompt queries of a query head: [P].
  /// Throws Error as read() does, and if the trace has none.
  std::vector<float> read_attention_mass(int layer, int head) const;

  /// What the outputs of a query head are multiplied by before the projection: [Q, output_gate_dim of the layer].
  /// Throws Error as read() does, and if the layer has none.
  Matrix read_output_gate(int layer, int head) const;

  /// Every dataset under /layers that belongs to the format, in layer order.
  std::vector<StoredTensor> stored_tensors() const;

  /// The XXH64 digest (16 hexadecimal digits) of a dataset's raw little-endian bytes as they are in the file now.
  std::string compute_xxh64(const std::string& dataset_path) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay
