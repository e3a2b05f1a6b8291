#include "policy/query_statistics.h"

#include <fmt/format.h>

#include <utility>

#include "base/error.h"
#include "base/printable.h"

namespace kvreplay {

Eigen::MatrixXd frequency_magnitudes(const RotaryTable& rotary, const Matrix& rows) {
  const auto pairs = static_cast<Index>(rotary.inverse_frequencies.size());
  const Index still = rows.cols() - 2 * pairs;
  Eigen::MatrixXd magnitudes(rows.rows(), pairs + still);
  for (Index pair = 0; pair < pairs; ++pair) {
    const auto [a, b] = rotary.dimensions_of(static_cast<std::size_t>(pair));
    magnitudes.col(pair) =
        (rows.col(a).cast<double>().array().square() + rows.col(b).cast<double>().array().square()).sqrt();
  }
  magnitudes.rightCols(still) = rows.rightCols(still).cast<double>().cwiseAbs();
  return magnitudes;
}

QueryStatistics::QueryStatistics(const std::string& path) : path_(path), file_(hdf5::File::open(path)) {
  if (!file_.has_attribute("/", "format") || file_.read_string("/", "format") != "kvreplay-query-statistics") {
    throw Error(fmt::format("{}: is no file of query statistics; write one with kvreplay query-statistics", path));
  }
  if (file_.has_attribute("/", "model")) model_ = file_.read_string("/", "model");
}

void QueryStatistics::check(const HeadShape& shape) const {
  const Index heads = Index{shape.num_kv_heads} * shape.group_size;
  const std::string place = fmt::format("/layers/{}/mean", shape.layer);
  if (!file_.exists(place)) throw Error(fmt::format("{}: {}: is missing", path_, place));
  if (file_.dataset(place).shape() != hdf5::Shape{heads, shape.head_dim}) {
    throw Error(
        fmt::format("{}: {}: is not of {} query heads of width {}, as this model has; write the statistics of "
                    "traces of this model",
                    path_, place, heads, shape.head_dim));
  }
}

void QueryStatistics::check_run(const RunIdentity& run) const {
  if (model_.empty() || run.model.empty() || model_ == run.model) return;
  throw Error(fmt::format("{}: is of {}, and the trace of {}; write the statistics of traces of this model", path_,
                          printable(model_), printable(run.model)));
}

void QueryStatistics::check_magnitudes(const HeadShape& shape) const {
  const std::string place = fmt::format("/layers/{}/magnitude", shape.layer);
  if (file_.exists(place)) return;
  throw Error(
      fmt::format("{}: {}: is missing, as in files of earlier versions; write it again with kvreplay "
                  "query-statistics",
                  path_, place));
}

void QueryStatistics::read(const std::string& what, const HeadShape& shape, int member, hdf5::Shape count,
                           float* out) const {
  const hdf5::Dataset dataset = file_.dataset(fmt::format("/layers/{}/{}", shape.layer, what));
  if (dataset.float_type() != DType::float32) throw Error(fmt::format("{}: {}: is not float32", path_, dataset.path()));
  hdf5::Shape first(count.size() + 1, 0);
  first.front() = shape.query_head(member);
  count.insert(count.begin(), 1);
  dataset.read_raw(first, count, reinterpret_cast<std::byte*>(out));
}

Eigen::VectorXd QueryStatistics::mean(const HeadShape& shape, int member) const {
  Eigen::VectorXf mean(shape.head_dim);
  read("mean", shape, member, {shape.head_dim}, mean.data());
  return mean.cast<double>();
}

Eigen::MatrixXd QueryStatistics::covariance(const HeadShape& shape, int member) const {
  Matrix covariance(shape.head_dim, shape.head_dim);
  read("covariance", shape, member, {shape.head_dim, shape.head_dim}, covariance.data());
  return covariance.cast<double>();
}

Eigen::VectorXd QueryStatistics::magnitude(const HeadShape& shape, int member) const {
  const Index frequencies = shape.head_dim - static_cast<Index>(shape.rotary->inverse_frequencies.size());
  Eigen::VectorXf magnitude(frequencies);
  read("magnitude", shape, member, {frequencies}, magnitude.data());
  return magnitude.cast<double>();
}

}  // namespace kvreplay
