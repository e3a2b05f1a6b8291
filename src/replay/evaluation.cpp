#include "replay/evaluation.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

using kernels::kPanel;

// Positions whose weighted values are summed in float32.
constexpr Index kPositions = 512;

// Below this sum of exponentials, against the full cache's maximum, too few of their bits are left.
constexpr double kFaint = 1e-30;

using DoubleMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

double relative_error(double difference, double reference) {
  if (reference > 0) return difference / reference;
  return difference > 0 ? 1.0 : 0.0;
}

double cosine(const Eigen::RowVectorXd& a, const Eigen::RowVectorXd& b) {
  const double norms = a.norm() * b.norm();
  if (norms > 0) return a.dot(b) / norms;
  return a.norm() > 0 || b.norm() > 0 ? 0.0 : 1.0;
}

}  // namespace

struct HeadEvaluation::Block {
  std::array<std::int32_t, kPanel> positions;
  Index count = 0;                  // queries
  Index columns = 0;                // the same in whole vectors; those beyond repeat the last query
  Buffer weights;                   // [tokens, kPanel] exponentials against each query's maximum
  std::array<double, kPanel> mass;  // of all positions that are summed
  DoubleMatrix sums;                // [columns, width] of their weighted values
};

EvaluationQueries evaluation_queries(const TraceInfo& info, int eviction_position) {
  const std::span<const int> positions = info.query_positions;
  const Index first = std::ranges::lower_bound(positions, eviction_position) - positions.begin();
  return {first, positions.subspan(static_cast<std::size_t>(first))};
}

HeadEvaluation::HeadEvaluation(const TraceReader& trace, int layer, int kv_head, int eviction_position)
    : trace_(trace),
      shape_(head_shape(trace.info(), layer, kv_head, eviction_position)),
      queries_(evaluation_queries(trace.info(), eviction_position)),
      tokens_(queries_.positions.back() + 1),
      width_(kernels::rounded_up(shape_.head_dim, kernels::kLanes)),
      keys_(tokens_ * width_),
      values_(tokens_ * width_) {
  for (const auto& [tensor, rows] : {std::pair{HeadTensor::keys, &keys_}, {HeadTensor::values, &values_}}) {
    trace.read_rows(layer, tensor, kv_head, 0, tokens_, rows->data());
    kernels::pad_rows(rows->data(), tokens_, shape_.head_dim, width_);
  }
}

Index HeadEvaluation::memory(const ModelInfo& model, Index tokens) {
  const Index width = kernels::rounded_up(model.head_dim, kernels::kLanes);
  const Index floats = tokens * (2 * width + kPanel + 1) + kPositions * (width + kPanel) + 8 * kPanel * width;
  return floats * static_cast<Index>(sizeof(float));
}

// Weights of the queries from `first` on over all positions.
void HeadEvaluation::attend(int member, Index first, Block& block) const {
  block.count = std::min<Index>(kPanel, queries_.count() - first);
  block.columns = kernels::rounded_up(block.count, kernels::kLanes);
  const Index depth = shape_.head_dim;
  Matrix queries(kPanel, depth);
  trace_.read_rows(shape_.layer, HeadTensor::queries, shape_.query_head(member), queries_.first + first, block.count,
                   queries.data());
  for (Index q = block.count; q < kPanel; ++q) queries.row(q) = queries.row(block.count - 1);
  for (Index q = 0; q < kPanel; ++q) {
    block.positions[static_cast<std::size_t>(q)] =
        queries_.positions[static_cast<std::size_t>(first + std::min(q, block.count - 1))];
  }
  Buffer panel(depth * kPanel);
  kernels::to_panels(queries.data(), depth, kPanel, depth, panel.data());
  const kernels::QueryColumns columns{.positions = block.positions.data(),
                                      .columns = block.columns,
                                      .sliding_window = shape_.sliding_window,
                                      .scale = static_cast<float>(shape_.softmax_scale),
                                      .softcapping = static_cast<float>(shape_.attn_logit_softcapping)};
  std::array<float, kPanel> maxima;
  maxima.fill(-std::numeric_limits<float>::infinity());
  for (Index key = 0; key < tokens_; key += kPositions) {
    const Index count = std::min(kPositions, tokens_ - key);
    float* const logits = block.weights.data() + key * kPanel;
    kernels::multiply(count, block.columns, depth, keys_.data() + key * width_, width_, 1, panel.data(), kPanel, logits,
                      kPanel);
    kernels::finish_logits(columns, key, count, logits, maxima.data());
  }
  std::array<double, kPanel> ignored{};
  for (Index key = 0; key < tokens_; key += kPositions) {
    const Index count = std::min(kPositions, tokens_ - key);
    kernels::exponentiate_columns(count, maxima.data(), block.weights.data() + key * kPanel, ignored.data(),
                                  block.columns);
  }
  count_operations(2 * tokens_ * block.count * depth);
  count_exponentials(tokens_ * block.count);
}

// Mass and weighted values of `positions`, with the weights of `block`.
void HeadEvaluation::sum_over(std::span<const int> positions, const Block& block, Block& sums) const {
  sums.mass.fill(0);
  sums.sums.setZero(block.columns, width_);
  Buffer weights(kPositions * kPanel);
  Buffer values(kPositions * width_);
  Matrix part(block.columns, width_);
  for (std::size_t first = 0; first < positions.size(); first += kPositions) {
    const auto here = positions.subspan(first, std::min<std::size_t>(kPositions, positions.size() - first));
    const auto count = static_cast<Index>(here.size());
    const bool adjacent = here.back() - here.front() == static_cast<int>(count) - 1;
    const float* weight_rows = block.weights.data() + here.front() * kPanel;
    const float* value_rows = values_.data() + here.front() * width_;
    if (!adjacent) {
      for (Index k = 0; k < count; ++k) {
        const Index position = here[static_cast<std::size_t>(k)];
        std::copy_n(block.weights.data() + position * kPanel, kPanel, weights.data() + k * kPanel);
        std::copy_n(values_.data() + position * width_, width_, values.data() + k * width_);
      }
      weight_rows = weights.data();
      value_rows = values.data();
    }
    for (Index k = 0; k < count; ++k) {
      for (Index q = 0; q < block.columns; ++q) {
        sums.mass[static_cast<std::size_t>(q)] += static_cast<double>(weight_rows[k * kPanel + q]);
      }
    }
    kernels::multiply(block.columns, width_, count, weight_rows, 1, kPanel, value_rows, width_, part.data(), width_);
    sums.sums += part.cast<double>();
  }
  count_operations(2 * static_cast<Index>(positions.size()) * block.count * shape_.head_dim);
}

// The output of one query whose attention on what is cached vanishes beside what was evicted: against its own maximum.
Eigen::RowVectorXd HeadEvaluation::attend_directly(int member, Index query, std::span<const int> kept) const {
  const Matrix row =
      trace_.read(shape_.layer, HeadTensor::queries, shape_.query_head(member), queries_.first + query, 1);
  const int position = queries_.positions[static_cast<std::size_t>(query)];
  const int first = shape_.sliding_window > 0 ? std::max(0, position - shape_.sliding_window + 1) : 0;
  std::vector<int> cached;
  std::ranges::copy_if(kept, std::back_inserter(cached), [first](int n) { return n >= first; });
  for (int n = std::max(first, shape_.prompt_length); n <= position; ++n) cached.push_back(n);
  const auto row_of = [&](const Buffer& rows, int n) {
    return Eigen::Map<const Eigen::RowVectorXf>(rows.data() + n * width_, shape_.head_dim).cast<double>();
  };
  Eigen::VectorXd weights(static_cast<Index>(cached.size()));
  for (std::size_t i = 0; i < cached.size(); ++i) {
    double logit = row.row(0).cast<double>().dot(row_of(keys_, cached[i])) * shape_.softmax_scale;
    const double cap = shape_.attn_logit_softcapping;
    if (cap > 0) logit = cap * std::tanh(logit / cap);
    weights(static_cast<Index>(i)) = logit;
  }
  weights = (weights.array() - weights.maxCoeff()).exp();
  Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(shape_.head_dim);
  for (std::size_t i = 0; i < cached.size(); ++i) sum += weights(static_cast<Index>(i)) * row_of(values_, cached[i]);
  return sum / weights.sum();
}

std::vector<HeadMeasures> HeadEvaluation::measure(int member, std::span<const std::vector<int>* const> kept_sets,
                                                  Eigen::Ref<Matrix> outputs,
                                                  std::span<Eigen::Ref<Matrix>> differences) const {
  // The first of each kind.
  const auto same = [](const std::vector<int>* a, const std::vector<int>* b) { return *a < *b; };
  std::map<const std::vector<int>*, std::size_t, decltype(same)> distinct(same);
  std::vector<std::size_t> first_like(kept_sets.size());
  for (std::size_t set = 0; set < kept_sets.size(); ++set) {
    first_like[set] = distinct.try_emplace(kept_sets[set], set).first->second;
  }
  std::vector<int> everything(static_cast<std::size_t>(tokens_));
  std::iota(everything.begin(), everything.end(), 0);
  const std::span<const int> before = std::span(everything).first(static_cast<std::size_t>(shape_.prompt_length));
  const std::span<const int> after = std::span(everything).subspan(before.size());
  std::vector<HeadMeasures> measures(kept_sets.size());
  const Index depth = shape_.head_dim;
  Block block;
  block.weights = Buffer(tokens_ * kPanel);
  Block full;
  Block tail;
  Block kept;
  for (Index first = 0; first < queries_.count(); first += kPanel) {
    attend(member, first, block);
    // In these two parts, as every cache is summed, so that keeping everything makes no difference at all.
    sum_over(before, block, full);
    sum_over(after, block, tail);
    full.sums += tail.sums;
    for (std::size_t q = 0; q < kPanel; ++q) full.mass[q] += tail.mass[q];
    DoubleMatrix exact(block.count, depth);
    for (Index q = 0; q < block.count; ++q) {
      exact.row(q) = full.sums.row(q).head(depth) / full.mass[static_cast<std::size_t>(q)];
      if (exact.row(q).allFinite()) continue;
      throw Error(
          fmt::format("{}: layer {}, query head {}: the attention of the query at position {} exceeds float32's range",
                      trace_.path().string(), shape_.layer, shape_.query_head(member),
                      block.positions[static_cast<std::size_t>(q)]));
    }
    outputs.middleRows(first, block.count) = exact.cast<float>();
    for (std::size_t set = 0; set < kept_sets.size(); ++set) {
      if (first_like[set] != set) continue;
      sum_over(*kept_sets[set], block, kept);
      for (Index q = 0; q < block.count; ++q) {
        const auto column = static_cast<std::size_t>(q);
        const double mass = kept.mass[column] + tail.mass[column];
        const Eigen::RowVectorXd evicted =
            mass > kFaint ? Eigen::RowVectorXd((kept.sums.row(q).head(depth) + tail.sums.row(q).head(depth)) / mass)
                          : attend_directly(member, first + q, *kept_sets[set]);
        const Eigen::RowVectorXd difference = evicted - exact.row(q);
        differences[set].row(first + q) = difference.cast<float>();
        measures[set].head_error.push_back(static_cast<float>(relative_error(difference.norm(), exact.row(q).norm())));
        measures[set].cosine.push_back(static_cast<float>(cosine(evicted, exact.row(q))));
        measures[set].attention_recall.push_back(static_cast<float>(mass / full.mass[column]));
      }
    }
  }
  for (std::size_t set = 0; set < kept_sets.size(); ++set) {
    if (first_like[set] == set) continue;
    measures[set] = measures[first_like[set]];
    differences[set] = differences[first_like[set]];
  }
  return measures;
}

}  // namespace kvreplay
