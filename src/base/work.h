// How much the process has read and calculated, for progress and for the roofline.
#pragma once

#include <cstdint>

namespace kvreplay {

/// Amounts of work.
struct Work {
  double bytes = 0;         ///< of tensors, as they are stored
  double operations = 0;    ///< of products: a multiplication and an addition count as two
  double exponentials = 0;  ///< of softmax
};

/// Adds to what this process has done; from any thread, once per block and not per element.
void count_bytes(std::int64_t bytes);
void count_operations(std::int64_t operations);
void count_exponentials(std::int64_t exponentials);

/// All that was counted since the process began.
Work work_done();

}  // namespace kvreplay
