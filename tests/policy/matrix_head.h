// A head whose tensors a test writes down.
#pragma once

#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "policy/policy.h"

namespace kvreplay::test {

/// Numbers drawn from a normal distribution.
inline Matrix normal(Index rows, Index cols, unsigned seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw(0, scale);
  Matrix matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = draw(generator);
  return matrix;
}

/// One KV head and its query heads, held in memory. A test sets what its policy looks at.
class MatrixHead : public HeadSource {
 public:
  /// A single-layer model with one KV head. All queries are at hand once `queries` holds a matrix per query head.
  MatrixHead(Matrix keys, Matrix values, int group_size = 1) : keys_(std::move(keys)), values_(std::move(values)) {
    shape_.group_size = group_size;
    shape_.head_dim = static_cast<int>(keys_.cols());
    shape_.prompt_length = shape_.next_position = static_cast<int>(keys_.rows());
    shape_.positions = entries_ = {0, shape_.prompt_length};
    positions_.resize(static_cast<std::size_t>(shape_.prompt_length));
    std::iota(positions_.begin(), positions_.end(), 0);
  }

  /// A head of which a policy looks at the values alone, or at the keys alone: [P, D].
  static MatrixHead of_values(const Matrix& values) { return {Matrix::Zero(values.rows(), values.cols()), values}; }
  static MatrixHead of_keys(const Matrix& keys) { return {keys, Matrix::Zero(keys.rows(), keys.cols())}; }

  /// Attends in this way instead of with a scale of 1, to all that came before, and with nothing to bend logits.
  void attend_with(double softmax_scale, int sliding_window = 0, double softcapping = 0) {
    attend_with(
        {.softmax_scale = softmax_scale, .attn_logit_softcapping = softcapping, .sliding_window = sliding_window});
  }
  void attend_with(const AttentionRule& rule) {
    shape_.rule = rule;
    const int first = first_held_position(shape_.next_position, shape_.rule);
    shape_.positions = {first, shape_.next_position - first};
  }

  std::vector<Matrix> member_queries;      ///< [group][P, D]; empty: nothing is known of attention
  std::vector<Matrix> member_projections;  ///< [group][C, D]; empty: the model has none

  const HeadShape& shape() const override { return shape_; }
  const CachePositions& entries() const override { return entries_; }
  void read_keys(Index first, Index count, float* rows) const override {
    Eigen::Map<Matrix>(rows, count, keys_.cols()) = keys_.middleRows(first, count);
  }
  void read_values(Index first, Index count, float* rows) const override {
    Eigen::Map<Matrix>(rows, count, values_.cols()) = values_.middleRows(first, count);
  }
  std::span<const int> query_positions() const override {
    return member_queries.empty() ? std::span<const int>() : std::span<const int>(positions_);
  }
  Matrix queries(int member, Index first, Index count) const override {
    return member_queries.at(static_cast<std::size_t>(member)).middleRows(first, count);
  }
  bool has_output_projection() const override { return !member_projections.empty(); }
  Matrix output_projection(int member) const override {
    return member_projections.at(static_cast<std::size_t>(member));
  }
  std::optional<std::vector<float>> attention_mass(int /*member*/) const override { return std::nullopt; }

 private:
  HeadShape shape_;
  CachePositions entries_;
  Matrix keys_;
  Matrix values_;
  std::vector<int> positions_;
};

/// The scores [R] that a policy's ranking gives the rows, asked for all of them.
inline std::vector<float> scores_of(const Ranking& ranking, const HeadSource& source, int member = 0) {
  const Head head(source);
  std::vector<float> scores(static_cast<std::size_t>(head.rows()));
  ranking.score(head, member, scores);
  ranking.smooth(head, member, head.rows(), scores);
  return scores;
}

inline std::vector<float> scores_of(const std::string& spec, const HeadSource& source, int member = 0) {
  return scores_of(*make_policy(spec).ranking(), source, member);
}

/// The rows that a policy with scores keeps for a query head that shares with no other.
inline std::vector<int> kept_by(const std::string& spec, const HeadSource& source, int capacity, int member = 0) {
  const Policy policy = make_policy(spec);
  const Head head(source);
  std::vector<float> scores(static_cast<std::size_t>(head.rows()));
  policy.ranking()->score(head, member, scores);
  policy.ranking()->smooth(head, member, capacity, scores);
  policy.ranking()->refine(head, {&member, 1}, capacity, scores);
  const Protection protection = policy.protection().held_by(head.shape());
  return policy.selection ? policy.selection->select(scores, protection, capacity)
                          : select_top(scores, protection, capacity);
}

}  // namespace kvreplay::test
