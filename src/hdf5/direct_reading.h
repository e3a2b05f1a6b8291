// Reading datasets past HDF5, without its lock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "hdf5/hdf5.h"

namespace kvreplay::hdf5 {

/// Where the chunks of a dataset without filters lie in the file. HDF5 is asked when they are first needed.
struct Dataset::Chunks {
  Chunks(Shape extents, const Shape& dataset) : shape(std::move(extents)) {
    for (std::size_t i = 0; i < shape.size(); ++i) counts.push_back((dataset[i] - 1) / shape[i] + 1);
  }

  /// Whether finding them all takes less than what reading without the lock gains.
  bool worth_finding(std::size_t element_size) const;

  const Shape shape;                 // of a chunk; those at the edge are stored whole as well
  Shape counts;                      // chunks along each axis
  std::vector<std::int64_t> places;  // of each chunk's first byte, row-major; empty until `known`
  std::atomic<bool> known = false;
};

}  // namespace kvreplay::hdf5
