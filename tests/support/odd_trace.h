// A trace of layers that all differ, written by HDF5 calls alone: what another writer makes of the format's second
// version.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "trace/trace.h"

namespace kvreplay::test {

/// 6 layers of a model with 4 query heads on 2 KV heads of 8 dimensions, hidden size 10; 14 tokens, 9 of them the
/// prompt, 6 captured queries. Outputs are the attention of what the layer reads.
struct OddTrace {
  static constexpr int kSinks = 0;      ///< chunks of 5, sinks, the model's shape
  static constexpr int kGap = 1;        ///< no attention
  static constexpr int kShared = 2;     ///< reads layer 0's cache with 6 query heads, scale 0.2, a window of 4
  static constexpr int kLatent = 3;     ///< 1 KV head of 12, values its first 6 columns; a gate for each dimension
  static constexpr int kTwoWidths = 4;  ///< 3 heads on 1, keys of 5, values of 7; cap; a gate for each head; norms
  static constexpr int kPlain = 5;      ///< as the model says

  OddTrace();

  void write(const std::filesystem::path& path) const;

  /// The same by TraceWriter, which adds digests.
  void write_with_digests(const std::filesystem::path& path) const;

  /// What a reader should find.
  TraceInfo info;
  struct Tensors {
    std::vector<float> keys, values, queries, outputs;  ///< [head, row, dim], of what the layer reads
    std::vector<float> projection;                      ///< [C, H·Dv]
    std::vector<float> gate;                            ///< [H, Q, factors]
  };
  std::vector<Tensors> layers;
};

}  // namespace kvreplay::test
