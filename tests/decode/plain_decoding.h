// Caches that are evicted while tokens come, written down as plainly as they can be: for rules of published codes and
// papers that are told again in a test.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "support/random_trace.h"
#include "trace/reader.h"

namespace kvreplay::test {

/// A KV head of a trace and the query heads that read it, in double.
class PlainHead {
 public:
  PlainHead(const TraceReader& trace, int layer, int kv_head);

  int group_size() const { return static_cast<int>(queries_.size()); }
  int prompt_length() const { return prompt_length_; }
  int num_tokens() const { return static_cast<int>(keys_.rows()); }
  Eigen::RowVectorXd key(int position) const { return keys_.row(position); }

  /// q·k / √D of the query at `query` of the group's query head `member` with the keys at `positions`.
  std::vector<double> logits(int member, int query, const std::vector<int>& positions) const;

  /// The softmax of that.
  std::vector<double> attention(int member, int query, const std::vector<int>& positions) const;

 private:
  int prompt_length_;
  Eigen::MatrixXd keys_;
  std::vector<Eigen::MatrixXd> queries_;
};

std::vector<double> softmax_of(std::vector<double> logits);

/// The places of the `count` largest, ascending; of equal ones the first.
std::vector<int> places_of_largest(const std::vector<double>& scores, int count);

/// Expects that the policy keeps in every layer after every token what `decide` leaves of its caches, which it is asked
/// for the prompt and then for every token that has joined them: caches of the layer's KV heads, `t` the last token.
/// `begin` is told of a new layer.
using PlainCaches = std::vector<std::vector<int>>;
void expect_kept(const RandomTrace& shape, const std::string& spec, const std::string& capacity,
                 const std::function<void(const std::vector<PlainHead>& heads)>& begin,
                 const std::function<void(const std::vector<PlainHead>& heads, int t, PlainCaches& caches)>& decide);

}  // namespace kvreplay::test
