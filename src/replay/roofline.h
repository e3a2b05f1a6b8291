// What the machine can do at best, and what replay makes of it.
#pragma once

#include <string>
#include <vector>

#include "trace/reader.h"

namespace kvreplay {

/// Rates that nothing here exceeds, measured on this machine with OpenMP's present number of threads.
struct Ceilings {
  double products = 0;  ///< operations per second of float32 products in the cache: the larger of the two below
  double products_by_kernel = 0;  ///< by the kernel that replay and captures use
  double products_by_eigen = 0;   ///< by Eigen, as this build was compiled, so that no kernel is its own measure
  double exponentials = 0;        ///< per second, of logits in the cache
  double memory = 0;              ///< bytes per second that are read from memory
  double file_by_one_thread = 0;  ///< bytes per second of the trace's file, in blocks of 1 MiB, as dd copies them
  double file = 0;                ///< the same by all threads
};

/// Measures them. The file is read once before, so that it is read from the system's cache where that holds it.
Ceilings measure_ceilings(const TraceReader& trace);

/// A part of a replay, per layer.
struct Stage {
  std::string name;
  int settings = 0;         ///< policies × capacities
  double seconds = 0;       ///< the median of the layers and runs
  double bytes = 0;         ///< of tensors
  double operations = 0;    ///< of products: a multiplication and an addition count as two
  double exponentials = 0;  ///< of softmax

  /// The least time that the ceilings allow: that of reading, products and exponentials one after the other, since the
  /// same cores do all of them, copying from the system's cache included.
  double floor(const Ceilings& ceilings) const;
};

/// Measures the parts of a replay on a trace: reading it; ranking and selecting for SnapKV and for ReST-KV without and
/// with the output projection, a kept set per query head at `capacity` as the authors' code has; a hundred settings of
/// ReST-KV at four capacities, once over smoothing in time and space and once over smoothing in time alone; and
/// measuring what eviction does. `runs` times each over all layers. Throws Error where the trace has too short a prompt
/// or too few queries.
std::vector<Stage> measure_stages(const TraceReader& trace, int capacity, int runs);

}  // namespace kvreplay
