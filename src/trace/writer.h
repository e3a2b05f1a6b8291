// Writes kvtrace files that are complete or absent.
#pragma once

#include <filesystem>
#include <memory>
#include <span>

#include "trace/trace.h"

namespace kvreplay {

/// A kvtrace file in the making. It grows under a temporary name and gets its own when finish() succeeds; destroyed
/// before that, it leaves nothing.
class TraceWriter {
 public:
  /// Writes all metadata. Tensors will be stored as `type`, contiguous and with their digest.
  /// Throws Error if the file cannot be created or `info` contradicts itself.
  TraceWriter(const std::filesystem::path& path, TraceInfo info, DType type);
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  /// Writes one layer's tensor whole. `data` is [K, T, D] or [H, Q, D] in row-major order. Throws Error.
  void write(int layer, HeadTensor tensor, std::span<const float> data);

  /// `weight` is [C, H·D], as PyTorch stores the layer's o_proj. Throws Error.
  void write_output_projection(int layer, std::span<const float> weight);

  /// `mass` is [H, P]; always stored as float32. Throws Error.
  void write_attention_mass(int layer, std::span<const float> mass);

  /// Marks the file complete and puts it in its place. Throws Error if a required tensor of a layer was not written,
  /// or if the disk is full.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay
