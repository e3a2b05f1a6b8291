// How sure a mean is: circular block bootstrap over evaluation queries, which are neighbours in time and so not
// independent of each other.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace kvreplay {

/// Both ends NaN where nothing can be said, as of a single query.
struct Interval {
  double low = std::numeric_limits<double>::quiet_NaN();
  double high = std::numeric_limits<double>::quiet_NaN();
};

/// What is drawn anew.
enum class Resampling {
  queries,  ///< blocks of neighbouring queries within each trace: an answer about these traces
  traces,   ///< whole traces, and within them blocks of queries: an answer about traces like these; needs two at least
};

struct BootstrapOptions {
  int resamples = 10000;
  std::uint64_t seed = 0;
  double confidence = 0.95;
  int block = 0;  ///< queries per block; 0: by the data, per trace (Politis and White 2004, corrected 2009)
  Resampling resampling = Resampling::queries;
};

/// The mean over traces of each trace's mean, with its bootstrap distribution.
struct MeanEstimate {
  double mean = 0;
  Interval interval;
  double p_value = std::numeric_limits<double>::quiet_NaN();  ///< of the mean being 0, two-sided, at least 1/(n + 1)
  int block = 0;                                              ///< the longest block that was used
};

/// `series` has a number per evaluation query for each trace, in the order of their positions. Traces weigh the same,
/// whatever their numbers of queries. The same bits for the same input and options, whatever the number of threads.
MeanEstimate bootstrap_mean(std::span<const std::vector<double>> series, const BootstrapOptions& options);

/// The block length that the data ask for, at least 1.
int block_length(std::span<const double> series);

/// p values corrected for their number, so that the chance of one false finding among all of them stays below the level
/// (Holm 1979). NaN stays NaN and does not count.
std::vector<double> holm(std::vector<double> p_values);

}  // namespace kvreplay
