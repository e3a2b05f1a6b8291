// How sure a mean is: circular block bootstrap over evaluation queries, which are neighbours in time and so not
// independent of each other. docs/analysis.md gives the formulas.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
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
  /// 0: none are drawn, and intervals are symmetric, from the standard error that infinitely many would have.
  int resamples = 10000;
  std::uint64_t seed = 0;
  double confidence = 0.95;
  int block = 0;  ///< queries per block; 0: by the data (Politis and White 2004, corrected 2009)
  Resampling resampling = Resampling::queries;
};

/// Numbers of neighbouring queries, in the order of their positions, from which blocks are drawn.
struct Series {
  std::vector<double> values;  ///< at least one
  double weight = 1;           ///< of its mean in the mean of its trace: those of a trace add up to 1
  int trace = 0;               ///< which trace; those of a trace stand together
};

/// The mean over traces of each trace's mean, with its bootstrap distribution.
struct MeanEstimate {
  double mean = 0;
  double standard_error = std::numeric_limits<double>::quiet_NaN();
  Interval interval;
  double p_value = std::numeric_limits<double>::quiet_NaN();  ///< of the mean being 0, two-sided
  int block = 0;                                              ///< the longest block that was used
};

/// Traces weigh the same, whatever their numbers of queries. The same bits for the same input and options, whatever the
/// number of threads.
MeanEstimate bootstrap_mean(std::span<const Series> series, const BootstrapOptions& options);

/// The block length that the data ask for, at least 1.
int block_length(std::span<const double> series);

/// p values corrected for their number, so that the chance of one false finding among all of them stays below the level
/// (Holm 1979). NaN stays NaN and does not count.
std::vector<double> holm(std::vector<double> p_values);

/// The same within families: those of p values with equal texts. What one family asks says nothing of another's chance
/// to err, so that a p value does not depend on how many other questions stand beside it.
std::vector<double> holm_within(const std::vector<double>& p_values, const std::vector<std::string>& families);

}  // namespace kvreplay
