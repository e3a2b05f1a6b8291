// Expected attention (arXiv 2510.00636): what queries that are still to come will attend to on average.
//
// Queries before rotation are taken to be normal with the prompt's own mean μ and covariance Σ (divided by the count,
// without the first `sinks` queries). Queries of the next `future` positions have R μ and R Σ Rᵀ, R being the mean of
// these positions' rotations. The logarithm of the expected attention weight of key k is then, up to what all keys have
// in common,
//   k·μ' / √D + kᵀ Σ' k / (2 D)
// and the score the softmax of it over the rows from the sinks on, plus ε, times ‖v‖ (paper, section 3, and kvpress;
// averaged over a group where it shares a kept set). Sinks are always kept. 1/√D is the model's own scale of q·k here.
//
// statistics=FILE takes μ and Σ from other traces of the model, as `kvreplay query-statistics` writes them: then no
// query of the trace is needed, and the score is a property of the keys and values alone.
#include <algorithm>
#include <cmath>

#include "base/softmax.h"
#include "policy/policy.h"
#include "policy/published_code.h"
#include "policy/query_statistics.h"

namespace kvreplay {
namespace {

struct Statistics {
  Eigen::VectorXd mean;        // [D]
  Eigen::MatrixXd covariance;  // [D, D]
};

struct ExpectedAttentionParameters {
  int future;
  int sinks;
  bool covariance;
  bool values;
  double epsilon;
  std::shared_ptr<const QueryStatistics> statistics;  // null: the prompt's own
};

class ExpectedAttention : public Ranking {
 public:
  explicit ExpectedAttention(ExpectedAttentionParameters parameters) : p_(std::move(parameters)) {}

  Protection protection() const override { return {.sinks = p_.sinks}; }
  Requirements requirements() const override {
    Requirements requirements{.needs = {{Need::Kind::rotary}, {Need::Kind::keys_or_values}}};
    if (!p_.statistics) requirements.needs.push_back({Need::Kind::all_queries});
    return requirements;
  }

  void check(const HeadShape& shape) const override {
    if (p_.statistics) p_.statistics->check(shape);
  }
  void check_run(const RunIdentity& run) const override {
    if (p_.statistics) p_.statistics->check_run(run);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const HeadShape& shape = head.shape();
    const Statistics queries =
        p_.statistics ? Statistics{p_.statistics->mean(shape, member), p_.statistics->covariance(shape, member)}
                      : statistics_of(head, member);
    const Eigen::MatrixXd rotation = mean_rotation(*shape.rotary, shape.next_position, p_.future, shape.head_dim);
    const Eigen::VectorXd mean = rotation * queries.mean;
    const Eigen::MatrixXd covariance = rotation * queries.covariance * rotation.transpose();
    const auto first = static_cast<Index>(shape.held_of_first(p_.sinks));
    const auto keys = head.keys().bottomRows(head.rows() - first).cast<double>().eval();
    Eigen::VectorXd expected = keys * mean * shape.rule.softmax_scale;
    if (p_.covariance) {
      const double half = shape.rule.softmax_scale * shape.rule.softmax_scale / 2;
      expected += (keys * covariance).cwiseProduct(keys).rowwise().sum() * half;
    }
    softmax(expected, 0, expected.size());
    for (Index n = 0; n < expected.size(); ++n) {
      const double length = p_.values ? static_cast<double>(head.values().row(first + n).norm()) : 1.0;
      // Without the values' lengths nothing is added either, as in kvpress.
      scores[static_cast<std::size_t>(first + n)] =
          static_cast<float>((expected(n) + (p_.values ? p_.epsilon : 0)) * length);
    }
  }

 private:
  // Of the queries before the eviction, unrotated.
  Statistics statistics_of(const Head& head, int member) const {
    const int count = head.shape().next_position;
    const int first = std::min(p_.sinks, count - 1);
    Matrix queries = head.queries(member, count).bottomRows(count - first);
    std::vector<int> positions;
    for (int position = first; position < count; ++position) positions.push_back(position);
    unrotate(*head.shape().rotary, positions, queries);
    const Eigen::MatrixXd rows = queries.cast<double>();
    Statistics statistics{rows.colwise().mean().transpose(), {}};
    const Eigen::MatrixXd centred = rows.rowwise() - statistics.mean.transpose();
    statistics.covariance = centred.transpose() * centred / static_cast<double>(rows.rows());
    return statistics;
  }

  ExpectedAttentionParameters p_;
};

std::vector<Parameter> parameters() {
  return {
      Parameter::integer("future", 512, 1, "positions to come that queries are expected at").of(Parameter::Step::score),
      Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection),
      Parameter::flag("covariance", true, "use how queries vary, not their mean alone").of(Parameter::Step::score),
      Parameter::flag("values", true, "multiply by the length of the value").of(Parameter::Step::score),
      Parameter::real("epsilon", 0, 0, 1e6, "added to the expected attention before that").of(Parameter::Step::score)};
}

ExpectedAttentionParameters parameters_from(const Arguments& a) {
  return {.future = a.integer("future"),
          .sinks = a.integer("sinks"),
          .covariance = a.flag("covariance"),
          .values = a.flag("values"),
          .epsilon = a.real("epsilon"),
          .statistics = nullptr};
}

const MethodRegistration expected_attention([] {
  return Method{
      .name = "expected-attention",
      .summary = "Keeps what queries drawn like the prompt's, at the positions to come, would attend to on average.",
      .source = "arXiv 2510.00636, section 3",
      .parameters =
          [] {
            std::vector<Parameter> all = parameters();
            all.push_back(Parameter::file("statistics", "of queries of other traces, by kvreplay query-statistics")
                              .of(Parameter::Step::score));
            return all;
          }(),
      .compose =
          [](const Arguments& a) {
            ExpectedAttentionParameters p = parameters_from(a);
            if (!a.text("statistics").empty()) {
              p.statistics = std::make_shared<const QueryStatistics>(a.text("statistics"));
            }
            return Composition{.rule = std::make_shared<ExpectedAttention>(std::move(p))};
          },
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "expected-attention@kvpress",
      .summary = "One kept set per KV head: the group's scores are averaged.",
      .source = "github.com/NVIDIA/kvpress, expected_attention_press.py",
      .parameters = parameters(),
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<ExpectedAttention>(parameters_from(a)),
                               .granularity = Granularity::kv,
                               .share = Share::mean,
                               .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "expected-attention",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
