// Reads kvtrace files, one head at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "trace/captured_run.h"

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
class TraceReader final : public CapturedRun {
 public:
  /// Throws Error, naming file, path inside it and reason, unless the file is a complete kvtrace of a version this
  /// reader knows whose shapes agree with each other.
  explicit TraceReader(const std::filesystem::path& path);
  ~TraceReader() override;
  TraceReader(TraceReader&&) noexcept;
  TraceReader& operator=(TraceReader&&) noexcept;

  const std::filesystem::path& path() const;

  std::string name() const override { return path().string(); }
  /// trace_digest().
  std::string digest() const override;
  const TraceInfo& info() const override;
  Matrix read(int layer, HeadTensor tensor, int head, Index first, Index count) const override;
  void read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const override;

  /// Asks the system to bring one head's tensor into memory, so that read_rows() does not wait for the disk; returns at
  /// once. Does nothing where only HDF5 finds the bytes, as of filtered tensors.
  void prefetch(int layer, HeadTensor tensor, int head) const override;

  bool reads_directly(int layer, HeadTensor tensor) const override;
  bool reads_projection_directly(int layer) const override;
  DType element_type() const override;
  bool has_output_projection(int layer) const override;
  Matrix read_output_projection(int layer, int head) const override;
  void read_projection_rows(int layer, Index first_row, Index count, float* out) const override;
  /// The stored digest where there is one; else it is computed, which reads the whole projection.
  std::string projection_digest(int layer) const override;
  bool has_attention_mass(int layer) const override;
  std::vector<float> read_attention_mass(int layer, int head) const override;

  /// How positions turn the layer's keys and queries; null where the file does not say. It lives as long as the reader.
  const RotaryTable* rotary(int layer) const;

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
