// Importance over time and position for one head: what temporal and spatial smoothing do to scores.
#pragma once

#include <string>
#include <vector>

#include "trace/reader.h"

namespace kvreplay {

/// The scores of one query head (before heads share them) as the policy's steps make them, in bins over the positions
/// held before the observation window. A bin holds the mean of its positions.
struct ImportanceMap {
  int layer = 0;
  int head = 0;        ///< query head
  std::string policy;  ///< canonical spec
  int capacity = 0;
  std::vector<int> query_positions;  ///< [window]
  int bin_width = 1;                 ///< positions per bin; the last bin may be shorter
  int first_position = 0;            ///< where the first bin begins: the first position that the layer still holds
  int positions = 0;                 ///< held before the observation window
  /// [window][bins]: the score that the spec gives with the attention of each query alone.
  std::vector<std::vector<float>> raw;
  /// [window][bins]: the score with the window's queries up to each one, smoothed in time as if the window ended there:
  /// with temporal=ema the moving average after each query. Of the queries' scores with metric=before, of their
  /// attention, which is then scored, with metric=after. The last row is what the policy smooths in space.
  std::vector<std::vector<float>> temporal;
  std::vector<float> spatial;  ///< [bins]: the policy's scores: the last row smoothed in space, position by position
  int width = 1;               ///< of the spatial window, in positions
  int shift = 0;               ///< of the adaptive window
};

/// `spec` is of a method whose ranking has stages; its budget and selection make no difference here. `capacity` is what
/// smoothing over positions may look at. Reads the head's tensors in pieces; takes memory for few numbers per position,
/// whatever the window. Throws Error where the trace lacks what it needs, UsageError for a spec of another method, a
/// head that the trace does not have, or a capacity below the window.
ImportanceMap importance_map(const TraceReader& trace, int layer, int head, const std::string& spec, int capacity,
                             int eviction_position, int most_bins);

}  // namespace kvreplay
