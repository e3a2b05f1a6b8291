// What the queries of a model are like before rotation, over several traces of it.
#pragma once

#include <string>

#include "hdf5/hdf5.h"
#include "policy/head.h"
#include "policy/run_identity.h"

namespace kvreplay {

/// Magnitudes of `rows` [n, D] before or after rotation, which leaves them: of a pair of dimensions that turns its
/// length, of one that does not its absolute value. [n, F], pairs first.
Eigen::MatrixXd frequency_magnitudes(const RotaryTable& rotary, const Matrix& rows);

/// A file that `kvreplay query-statistics` wrote (docs/results-format.md). Functions throw Error, also where the file
/// lacks what they read.
class QueryStatistics {
 public:
  explicit QueryStatistics(const std::string& path);

  /// Throws Error where they are of a model of another shape, or by name of another model.
  void check(const HeadShape& shape) const;
  void check_run(const RunIdentity& run) const;

  /// Throws Error where mean magnitudes are missing, as in files of earlier versions.
  void check_magnitudes(const HeadShape& shape) const;

  /// Of a query head of a group, whose layer check() was asked for.
  Eigen::VectorXd mean(const HeadShape& shape, int member) const;        ///< [D]
  Eigen::MatrixXd covariance(const HeadShape& shape, int member) const;  ///< [D, D]
  Eigen::VectorXd magnitude(const HeadShape& shape, int member) const;   ///< [F], mean of frequency_magnitudes

 private:
  void read(const std::string& what, const HeadShape& shape, int member, hdf5::Shape count, float* out) const;

  std::string path_;
  hdf5::File file_;
  std::string model_;  // by name; empty: the file is older and does not say
};

}  // namespace kvreplay
