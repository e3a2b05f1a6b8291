#include "replay/definitions.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace kvreplay::test {
namespace {

using DoubleMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace

DefinedMeasures by_definition(const RandomTrace& shape, const RandomTrace::Tensors& tensors, int layer,
                              int evaluate_from, const CachedPositions& cached_positions) {
  const TraceInfo info = shape.info();
  const Index d = shape.head_dim;
  const int heads = shape.num_attention_heads;
  const auto l = static_cast<std::size_t>(layer);
  const auto evaluated = std::ranges::lower_bound(info.query_positions, evaluate_from) - info.query_positions.begin();
  const std::vector<int> positions(info.query_positions.begin() + evaluated, info.query_positions.end());
  const auto rows_of = [d](const std::vector<float>& tensor, Index head, Index rows) -> DoubleMatrix {
    return MatrixView(tensor.data() + head * rows * d, rows, d).cast<double>();
  };
  const auto count = static_cast<Index>(positions.size());
  DoubleMatrix full(count, heads * d);
  DoubleMatrix evicted(count, heads * d);
  DefinedMeasures measures;
  for (int head = 0; head < heads; ++head) {
    const int kv_head = head / (heads / shape.num_key_value_heads);
    const DoubleMatrix keys = rows_of(tensors.keys[l], kv_head, shape.num_tokens);
    const DoubleMatrix values = rows_of(tensors.values[l], kv_head, shape.num_tokens);
    const DoubleMatrix queries = rows_of(tensors.queries[l], head, info.num_queries());
    for (Index e = 0; e < count; ++e) {
      const int t = positions[static_cast<std::size_t>(e)];
      Eigen::VectorXd logits = keys.topRows(t + 1) * queries.row(evaluated + e).transpose() * info.model.softmax_scale;
      const double cap = shape.softcapping;
      if (cap > 0) logits = logits.unaryExpr([cap](double x) { return cap * std::tanh(x / cap); }).eval();
      const int first = shape.sliding_window > 0 ? std::max(0, t - shape.sliding_window + 1) : 0;
      std::vector<int> cached = cached_positions(head, t);
      std::erase_if(cached, [first](int n) { return n < first; });
      // Output and sum of weights over `seen`, against a maximum.
      const auto attend = [&](const std::vector<int>& seen, double maximum, Eigen::RowVectorXd& output) {
        double sum = 0;
        output = Eigen::RowVectorXd::Zero(d);
        for (const int n : seen) {
          const double weight = std::exp(logits(n) - maximum);
          sum += weight;
          output += weight * values.row(n);
        }
        output /= sum;
        return sum;
      };
      const auto largest = [&](const std::vector<int>& seen) {
        double maximum = logits(seen.front());
        for (const int n : seen) maximum = std::max(maximum, logits(n));
        return maximum;
      };
      std::vector<int> visible(static_cast<std::size_t>(t + 1 - first));
      std::iota(visible.begin(), visible.end(), first);
      Eigen::RowVectorXd output;
      const double all = attend(visible, largest(visible), output);
      full.row(e).segment(head * d, d) = output;
      // Against a maximum of its own, whatever is left of the full cache's attention.
      const double own = attend(cached, largest(cached), output);
      evicted.row(e).segment(head * d, d) = output;
      measures.attention_recall.push_back(own * std::exp(largest(cached) - largest(visible)) / all);
      std::vector<double> ranked;
      for (const int n : visible) ranked.push_back(logits(n));
      std::ranges::sort(ranked, std::greater<>());
      double missed = 0;
      for (const int n : visible) {
        const bool is_top = cached.size() < ranked.size() && logits(n) > ranked[cached.size()];
        missed += is_top && !std::ranges::binary_search(cached, n) ? 1 : 0;
      }
      measures.recurrence.push_back(missed / static_cast<double>(cached.size()));
      const auto o = full.row(e).segment(head * d, d);
      const auto changed = evicted.row(e).segment(head * d, d);
      measures.head_error.push_back((changed - o).norm() / o.norm());
      measures.cosine.push_back(changed.dot(o) / (changed.norm() * o.norm()));
    }
  }
  DoubleMatrix projection = DoubleMatrix::Identity(heads * d, heads * d);
  if (shape.output_projection) {
    projection = MatrixView(tensors.projection[l].data(), shape.hidden_size, heads * d).cast<double>();
  }
  for (Index e = 0; e < count; ++e) {
    measures.layer_error.push_back((projection * (evicted - full).row(e).transpose()).norm() /
                                   (projection * full.row(e).transpose()).norm());
    if (!shape.residual_norms) continue;
    const TraceInfo described = shape.info();
    const LayerInfo& of = described.layers[l];
    const auto added = [&](const Eigen::RowVectorXd& outputs) -> Eigen::VectorXd {
      const Eigen::VectorXd projected = projection * outputs.transpose();
      if (of.projection_output_norm.weight.empty()) return projected;
      const Eigen::VectorXd weight =
          Eigen::Map<const Eigen::VectorXf>(of.projection_output_norm.weight.data(), projected.size()).cast<double>();
      const double mean = projected.squaredNorm() / static_cast<double>(projected.size());
      return (projected / std::sqrt(mean + of.projection_output_norm.epsilon)).cwiseProduct(weight);
    };
    const auto residual = of.residual_norm[of.residual_norm.size() - static_cast<std::size_t>(count - e)];
    measures.change.emplace_back(added(evicted.row(e)) - added(full.row(e)));
    measures.residual_error.push_back(measures.change.back().norm() / static_cast<double>(residual));
  }
  return measures;
}

}  // namespace kvreplay::test
