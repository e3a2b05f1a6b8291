#include "trace/attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/softmax.h"

namespace kvreplay {

Matrix attention_outputs(const Eigen::Ref<const Matrix>& queries, std::span<const std::int32_t> positions,
                         const Eigen::Ref<const Matrix>& keys, const Eigen::Ref<const Matrix>& values,
                         const AttentionRule& rule, int query_head) {
  constexpr Index kBlock = 4096;
  const Index count = queries.rows();
  if (static_cast<Index>(positions.size()) != count) {
    throw Error(fmt::format("{} queries with {} positions", count, positions.size()));
  }
  if (count == 0) return Matrix(0, values.cols());

  // Query i sees keys [first[i], end[i]).
  std::vector<Index> first;
  std::vector<Index> end;
  for (const Index position : positions) {
    if (position < 0 || position >= keys.rows() || position >= values.rows()) {
      throw Error(fmt::format("the query at position {} has no key among {}", position, keys.rows()));
    }
    first.push_back(rule.first_visible(position));
    end.push_back(position + 1);
  }
  const Index low = *std::min_element(first.begin(), first.end());
  const Index high = *std::max_element(end.begin(), end.end());

  Matrix weights = queries * keys.middleRows(low, high - low).transpose();
  Eigen::VectorXd sums(count);
  for (Index i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    auto row = weights.row(i);
    auto seen = row.segment(first[at] - low, end[at] - first[at]);
    scale_logits(seen, rule);
    const float sink = exponentiate(row, first[at] - low, end[at] - low, rule.sink(query_head));
    sums[i] = seen.cast<double>().sum() + static_cast<double>(sink);
  }

  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> outputs;
  outputs.setZero(count, values.cols());
  for (Index start = low; start < high; start += kBlock) {
    const Index size = std::min(kBlock, high - start);
    const Matrix part = weights.middleCols(start - low, size) * values.middleRows(start, size);
    outputs += part.cast<double>();
  }
  outputs.array().colwise() /= sums.array();
  return outputs.cast<float>();
}

}  // namespace kvreplay
