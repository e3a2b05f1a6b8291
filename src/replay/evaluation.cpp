#include "replay/evaluation.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "policy/softmax.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

// Evaluation queries are taken in blocks of this many, so that memory does not grow with their number.
constexpr int kQueryBlock = 64;

constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Softmax attention of each row of `logits` [e, T] over the positions in `cached` alone: [e, D]. Every row must see at
// least one of them; a query always sees itself.
Matrix attend(const Matrix& logits, const Matrix& values, const std::vector<int>& cached) {
  Matrix weights(logits.rows(), static_cast<Index>(cached.size()));
  Matrix cached_values(static_cast<Index>(cached.size()), values.cols());
  for (std::size_t i = 0; i < cached.size(); ++i) {
    weights.col(static_cast<Index>(i)) = logits.col(cached[i]);
    cached_values.row(static_cast<Index>(i)) = values.row(cached[i]);
  }
  Matrix outputs(logits.rows(), values.cols());
  for (Index row = 0; row < weights.rows(); ++row) {
    auto weight = weights.row(row).array();
    weight = (weight - weight.maxCoeff()).exp();
    weight /= weight.sum();
  }
  outputs.noalias() = weights * cached_values;
  return outputs;
}

float relative_error(const Eigen::RowVectorXf& difference, const Eigen::RowVectorXf& reference) {
  const float norm = reference.norm();
  if (norm > 0) return difference.norm() / norm;
  return difference.norm() > 0 ? 1.0f : 0.0f;
}

float cosine(const Eigen::RowVectorXf& a, const Eigen::RowVectorXf& b) {
  const float norms = a.norm() * b.norm();
  if (norms > 0) return a.dot(b) / norms;
  return a.norm() > 0 || b.norm() > 0 ? 0.0f : 1.0f;
}

}  // namespace

EvaluationQueries evaluation_queries(const TraceInfo& info, int eviction_position) {
  const std::span<const int> positions = info.query_positions;
  const Index first = std::ranges::lower_bound(positions, eviction_position) - positions.begin();
  return {first, positions.subspan(static_cast<std::size_t>(first))};
}

HeadEvaluation::HeadEvaluation(const TraceReader& trace, int layer, int kv_head, int eviction_position)
    : trace_(trace),
      shape_(head_shape(trace.info(), layer, kv_head, eviction_position)),
      queries_(evaluation_queries(trace.info(), eviction_position)),
      keys_(trace.read(layer, HeadTensor::keys, kv_head, 0, queries_.positions.back() + 1)),
      values_(trace.read(layer, HeadTensor::values, kv_head, 0, queries_.positions.back() + 1)) {}

std::vector<HeadMeasures> HeadEvaluation::measure(int member, std::span<const std::vector<int>* const> kept_sets,
                                                  Eigen::Ref<Matrix> outputs,
                                                  std::span<Eigen::Ref<Matrix>> differences) const {
  const int tokens = static_cast<int>(keys_.rows());
  const Matrix queries =
      trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member), queries_.first, queries_.count());
  std::vector<int> everything(static_cast<std::size_t>(tokens));
  std::iota(everything.begin(), everything.end(), 0);
  std::vector<std::vector<int>> cached;
  for (const std::vector<int>* kept : kept_sets) {
    cached.push_back(*kept);
    for (int position = shape_.prompt_length; position < tokens; ++position) cached.back().push_back(position);
  }
  std::vector<HeadMeasures> measures(kept_sets.size());

  for (int first = 0; first < queries_.count(); first += kQueryBlock) {
    const int rows = std::min(kQueryBlock, queries_.count() - first);
    Matrix logits = queries.middleRows(first, rows) * keys_.transpose();
    scale_logits(logits, shape_.softmax_scale, shape_.attn_logit_softcapping);
    Matrix attention(rows, tokens);
    for (int row = 0; row < rows; ++row) {
      const int position = queries_.positions[static_cast<std::size_t>(first + row)];
      logits.row(row).head(first_visible(position, shape_.sliding_window)).setConstant(kMasked);
      logits.row(row).tail(tokens - 1 - position).setConstant(kMasked);
      attention.row(row) = (logits.row(row).array() - logits.row(row).maxCoeff()).exp();
    }
    outputs.middleRows(first, rows) = attend(logits, values_, everything);
    for (int row = 0; row < rows; ++row) {
      if (outputs.row(first + row).allFinite() && attention.row(row).allFinite()) continue;
      throw Error(
          fmt::format("{}: layer {}, query head {}: the attention of the query at position {} exceeds float32's range",
                      trace_.path().string(), shape_.layer, shape_.query_head(member),
                      queries_.positions[static_cast<std::size_t>(first + row)]));
    }
    const auto mass_on = [&attention](int row, const std::vector<int>& positions) {
      double mass = 0;
      for (const int position : positions) mass += static_cast<double>(attention(row, position));
      return mass;
    };
    for (std::size_t set = 0; set < kept_sets.size(); ++set) {
      const Matrix evicted = attend(logits, values_, cached[set]);
      for (int row = 0; row < rows; ++row) {
        const Eigen::RowVectorXf full = outputs.row(first + row);
        const Eigen::RowVectorXf difference = evicted.row(row) - full;
        differences[set].row(first + row) = difference;
        measures[set].head_error.push_back(relative_error(difference, full));
        measures[set].cosine.push_back(cosine(evicted.row(row), full));
        measures[set].attention_recall.push_back(
            static_cast<float>(mass_on(row, cached[set]) / mass_on(row, everything)));
      }
    }
  }
  return measures;
}

}  // namespace kvreplay
