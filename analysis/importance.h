// Importance over time and position for one head: what temporal and spatial smoothing do to ReST-KV's scores.
#pragma once

#include <string>
#include <vector>

#include "trace/reader.h"

namespace kvreplay {

/// ReST-KV's scores of one query head as its steps make them, in bins over the positions before the observation window.
struct ImportanceMap {
  int layer = 0;
  int head = 0;        ///< query head
  std::string policy;  ///< canonical spec of the restkv setting
  int capacity = 0;
  std::vector<int> query_positions;          ///< [window]
  int bin_width = 1;                         ///< positions per bin
  int positions = 0;                         ///< before the observation window
  std::vector<std::vector<float>> raw;       ///< [window][bins]: reconstruction error of each query alone, mean per bin
  std::vector<std::vector<float>> temporal;  ///< [window][bins]: the moving average after each query
  std::vector<float> spatial;                ///< [bins]: of the last moving average, after the adaptive window
  int width = 1;                             ///< of the adaptive window, in positions
  int shift = 0;
};

/// `spec` is a restkv setting; `capacity` what the adaptive window looks at. Throws Error where the trace lacks what it
/// needs, UsageError for a spec of another method or a head that the trace does not have.
ImportanceMap importance_map(const TraceReader& trace, int layer, int head, const std::string& spec, int capacity,
                             int eviction_position, int most_bins);

}  // namespace kvreplay
