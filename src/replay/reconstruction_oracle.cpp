#include "replay/reconstruction_oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "base/softmax.h"
#include "base/work.h"
#include "replay/evaluation.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// One query head: what each cached position contributes to each evaluation query.
struct HeadState {
  MatrixD weights;       // [E, T] unnormalised attention
  MatrixD values;        // [T, D]
  MatrixD projection;    // [C, D]; the identity's columns where the trace has no output projection
  MatrixD full;          // [E, D] output of the full cache
  MatrixD sum;           // [E, D] Σ weight · value over what is cached
  Eigen::VectorXd sink;  // [E] weight of the sink, which has no value
  Eigen::VectorXd mass;  // [E] Σ weight over what is cached, the sink's included

  Eigen::RowVectorXd output(Index e) const { return sum.row(e) / mass(e); }
};

// What looking at `candidates` positions takes for E queries of a set that M heads of width D share.
double exchange_part(Index candidates, Index width, Index queries, Index members) {
  const auto shared = static_cast<double>(members);
  return static_cast<double>(candidates * width * queries) * (2 * shared + 4 * shared * shared);
}

// Query heads that share a kept set.
int members_of(const ModelInfo& model, Granularity granularity) {
  if (granularity == Granularity::query) return 1;
  return granularity == Granularity::kv ? model.group_size() : model.num_attention_heads;
}

HeadState load_head(const TraceReader& trace, int layer, int query_head, const Eviction& eviction) {
  const ModelInfo& model = trace.info().model;
  const int kv_head = query_head / model.group_size();
  const HeadShape shape = head_shape(trace.info(), layer, kv_head, eviction.position);
  const EvaluationQueries queries = evaluation_queries(trace.info(), eviction);
  const Index tokens = queries.positions.back() + 1;
  HeadState state;
  Matrix logits = trace.read(layer, HeadTensor::queries, query_head, queries.first, queries.count()) *
                  trace.read(layer, HeadTensor::keys, kv_head, 0, tokens).transpose();
  scale_logits(logits, shape.rule);
  state.weights = MatrixD::Zero(logits.rows(), tokens);
  state.sink.resize(logits.rows());
  for (Index e = 0; e < logits.rows(); ++e) {
    const Index position = queries.positions[static_cast<std::size_t>(e)];
    const Index first = shape.rule.first_visible(position);
    const auto visible = logits.row(e).segment(first, position + 1 - first).cast<double>();
    const double sink = static_cast<double>(shape.rule.sink(query_head));
    const double largest = std::max(visible.maxCoeff(), sink);
    state.weights.row(e).segment(first, visible.size()) = (visible.array() - largest).exp();
    state.sink(e) = std::exp(sink - largest);
  }
  state.values = trace.read(layer, HeadTensor::values, kv_head, 0, tokens).cast<double>();
  const Eigen::VectorXd all = state.weights.rowwise().sum() + state.sink;
  state.full = (state.weights * state.values).array().colwise() / all.array();
  if (trace.has_output_projection(layer)) {
    state.projection = trace.read_output_projection(layer, query_head).cast<double>();
  } else {
    const Index width = static_cast<Index>(model.num_attention_heads) * model.head_dim;
    state.projection = MatrixD::Zero(width, model.head_dim);
    state.projection.middleRows(static_cast<Index>(query_head) * model.head_dim, model.head_dim).setIdentity();
  }
  return state;
}

void cache(HeadState& head, const std::vector<int>& kept, int eviction_position) {
  std::vector<int> cached = kept;
  for (int position = eviction_position; position < head.values.rows(); ++position) cached.push_back(position);
  head.sum.resize(head.full.rows(), head.full.cols());
  head.mass.resize(head.full.rows());
  const MatrixD weights = head.weights(Eigen::all, cached);
  head.sum.noalias() = weights * head.values(cached, Eigen::all);
  head.mass = weights.rowwise().sum() + head.sink;
}

// The query heads that share one kept set, and what exchanging a position of it does to the layer's error.
class SharedSet {
 public:
  // `importance` [E] is what a squared length counts in the objective.
  SharedSet(std::vector<HeadState*> heads, Eigen::VectorXd importance)
      : heads_(std::move(heads)), importance_(std::move(importance)) {
    for (const HeadState* a : heads_) {
      for (const HeadState* b : heads_) {
        gram_.push_back(a->projection.transpose() * b->projection);
        value_products_.push_back((a->values * gram_.back()).cwiseProduct(b->values).rowwise().sum());
      }
    }
  }

  // Exchanges positions in `kept` for others from `first_held` on, at most `exchanges` times; `residual` [E, C] is the
  // layer's error vector and is kept up to date.
  void improve(std::vector<int>& kept, int first_held, int eviction_position, int exchanges, MatrixD& residual) {
    std::vector<MatrixD> before;
    projected_residual_.clear();
    for (const HeadState* head : heads_) {
      before.push_back(outputs(*head));
      projected_residual_.push_back(residual * head->projection);
    }
    std::vector<bool> is_kept(static_cast<std::size_t>(eviction_position), false);
    for (const int position : kept) is_kept[static_cast<std::size_t>(position)] = true;
    for (int i = 0; i < exchanges; ++i) {
      const auto [added, gain] = best(members(is_kept, false, first_held), 1);
      if (added < 0) break;
      apply(added, 1);
      is_kept[static_cast<std::size_t>(added)] = true;
      const auto [removed, loss] = best(members(is_kept, true, first_held), -1);
      if (removed < 0) {  // nothing can go without leaving a query without weight
        apply(added, -1);
        is_kept[static_cast<std::size_t>(added)] = false;
        break;
      }
      apply(removed, -1);
      is_kept[static_cast<std::size_t>(removed)] = false;
      if (gain + loss < -1e-12) continue;
      apply(removed, 1);
      apply(added, -1);
      is_kept[static_cast<std::size_t>(removed)] = true;
      is_kept[static_cast<std::size_t>(added)] = false;
      break;
    }
    kept = members(is_kept, true, first_held);
    for (std::size_t m = 0; m < heads_.size(); ++m) {
      residual.noalias() += (outputs(*heads_[m]) - before[m]) * heads_[m]->projection.transpose();
    }
  }

 private:
  static std::vector<int> members(const std::vector<bool>& is_kept, bool kept, int first) {
    std::vector<int> positions;
    for (auto i = static_cast<std::size_t>(first); i < is_kept.size(); ++i) {
      if (is_kept[i] == kept) positions.push_back(static_cast<int>(i));
    }
    return positions;
  }

  static MatrixD outputs(const HeadState& head) { return head.sum.array().colwise() / head.mass.array(); }

  // Adding (sign 1) or removing (−1) position n moves a head's output by q·(v_n − o), q = ±w / (mass ± w).
  static MatrixD steps(const HeadState& head, const std::vector<int>& positions, double sign) {
    const MatrixD weights = head.weights(Eigen::all, positions).transpose();  // [n, E]
    return (sign * weights.array()) / ((sign * weights).rowwise() + head.mass.transpose()).array();
  }

  // The position whose exchange changes the objective for the best, and by how much; −1 where there is none. The
  // objective is quadratic in the outputs, so the change is exact: 2·rᵀWΔ + Δᵀ(WᵀW)Δ summed over the sharing heads.
  std::pair<int, double> best(const std::vector<int>& positions, double sign) const {
    if (positions.empty()) return {-1, 0};
    const std::size_t count = heads_.size();
    const auto candidates = static_cast<Index>(positions.size());
    std::vector<MatrixD> q;
    std::vector<MatrixD> values;
    std::vector<MatrixD> output;
    for (const HeadState* head : heads_) {
      q.push_back(steps(*head, positions, sign));
      values.push_back(head->values(positions, Eigen::all));
      output.push_back(outputs(*head));
    }
    MatrixD change = MatrixD::Zero(candidates, importance_.size());
    for (std::size_t a = 0; a < count; ++a) {
      const MatrixD& residual = projected_residual_[a];
      const Eigen::RowVectorXd offset = residual.cwiseProduct(output[a]).rowwise().sum().transpose();
      change.array() += 2 * q[a].array() * ((values[a] * residual.transpose()).rowwise() - offset).array();
      for (std::size_t b = 0; b < count; ++b) {
        const MatrixD& gram = gram_[a * count + b];
        const MatrixD bent = output[b] * gram.transpose();  // [E, D] G_ab o_b
        const MatrixD bent_back = output[a] * gram;         // [E, D] G_abᵀ o_a
        const Eigen::RowVectorXd both = bent.cwiseProduct(output[a]).rowwise().sum().transpose();
        const Eigen::VectorXd& products = value_products_[a * count + b];
        MatrixD quadratic = (-(values[a] * bent.transpose()) - values[b] * bent_back.transpose()).rowwise() + both;
        for (Index n = 0; n < candidates; ++n)
          quadratic.row(n).array() += products(positions[static_cast<std::size_t>(n)]);
        change.array() += q[a].array() * q[b].array() * quadratic.array();
      }
    }
    count_operations(static_cast<std::int64_t>(
        exchange_part(candidates, heads_.front()->values.cols(), importance_.size(), static_cast<Index>(count))));
    const Eigen::VectorXd objective = change * importance_;
    Index found = 0;
    const double value = objective.minCoeff(&found);
    return std::isfinite(value) ? std::pair{positions[static_cast<std::size_t>(found)], value} : std::pair{-1, 0.0};
  }

  void apply(int position, double sign) {
    std::vector<MatrixD> moved;
    for (HeadState* head : heads_) {
      const MatrixD old = outputs(*head);
      head->sum += sign * head->weights.col(position) * head->values.row(position);
      head->mass += sign * head->weights.col(position);
      moved.push_back(outputs(*head) - old);
    }
    for (std::size_t a = 0; a < heads_.size(); ++a) {
      for (std::size_t b = 0; b < heads_.size(); ++b) {
        projected_residual_[a] += moved[b] * gram_[b * heads_.size() + a];
      }
    }
  }

  std::vector<HeadState*> heads_;
  Eigen::VectorXd importance_;
  std::vector<MatrixD> gram_;                    // [a, b]: W_aᵀ W_b
  std::vector<Eigen::VectorXd> value_products_;  // [a, b]: v_aᵀ W_aᵀ W_b v_b for every position
  std::vector<MatrixD> projected_residual_;      // per head [E, D]: residual · W
};

}  // namespace

double exchange_operations(const ModelInfo& model, const ExchangeShape& shape, int exchanges) {
  const int heads = model.num_attention_heads;
  const int members = members_of(model, shape.granularity);
  const auto width = static_cast<double>(model.head_dim);
  const auto rows = static_cast<double>(model.hidden_size);
  const auto tokens = static_cast<double>(shape.tokens);
  // Every head's outputs, and for each two that share a set the products of their projections and of their values.
  const double loading = heads * static_cast<double>(shape.queries) * width * (4 * tokens + 4 * rows);
  const double products = static_cast<double>(heads) * members * 2 * width * width * (rows + tokens);
  // An exchange looks at what is kept and at what is not, at every position once.
  const double one = exchange_part(shape.positions, model.head_dim, shape.queries, members);
  const int sets = heads / members;
  const double operations = loading + products + static_cast<double>(sets) * exchanges * one;
  // In float64, by one thread, and not only products.
  constexpr double kSlower = 4;
  return kSlower * operations;
}

std::vector<std::vector<int>> exchange_positions(const TraceReader& trace, int layer, const Eviction& eviction,
                                                 Granularity granularity, std::vector<std::vector<int>> sets,
                                                 int exchanges, int threads) {
  const ModelInfo& model = trace.info().model;
  const int heads = model.num_attention_heads;
  const int first_held = eviction.position - head_shape(trace.info(), layer, 0, eviction.position).rows();
  const int per_set = granularity == Granularity::query ? 1 : model.group_size();
  std::vector<HeadState> states(static_cast<std::size_t>(heads));
  const auto load = [&](int head) {
    HeadState& state = states[static_cast<std::size_t>(head)];
    state = load_head(trace, layer, head, eviction);
    cache(state, sets[static_cast<std::size_t>(head / per_set)], eviction.position);
  };
  parallel_for(heads, load, threads);
  MatrixD reference = MatrixD::Zero(states[0].full.rows(), states[0].projection.rows());
  MatrixD residual = reference;
  for (const HeadState& state : states) {
    reference.noalias() += state.full * state.projection.transpose();
    const MatrixD outputs = state.sum.array().colwise() / state.mass.array();
    residual.noalias() += (outputs - state.full) * state.projection.transpose();
  }
  // The objective divides by the full output's squared length; a query whose output is 0 cannot be improved.
  const Eigen::VectorXd importance = reference.rowwise().squaredNorm().unaryExpr([](double x) {
    return x > 0 ? 1 / x : 0;
  }) / static_cast<double>(reference.rows());
  if (granularity == Granularity::layer) {
    std::vector<HeadState*> all;
    for (HeadState& state : states) all.push_back(&state);
    std::vector<int> kept = sets.front();
    SharedSet(all, importance).improve(kept, first_held, eviction.position, exchanges, residual);
    std::ranges::fill(sets, kept);
    return sets;
  }
  for (std::size_t set = 0; set < sets.size(); ++set) {
    std::vector<HeadState*> members;
    for (int m = 0; m < per_set; ++m)
      members.push_back(&states[set * static_cast<std::size_t>(per_set) + static_cast<std::size_t>(m)]);
    SharedSet(members, importance).improve(sets[set], first_held, eviction.position, exchanges, residual);
  }
  return sets;
}

Index exchange_memory(const ModelInfo& model, const ExchangeShape& shape, int threads) {
  const Index heads = model.num_attention_heads;
  const Index sharing = members_of(model, shape.granularity);
  const Index tokens = shape.tokens;
  const Index queries = shape.queries;
  const Index depth = model.head_dim;
  const Index columns = std::max<Index>(model.hidden_size, heads * depth);  // layers may lack the output projection
  const Index state = queries * tokens + tokens * depth + columns * depth + queries * (2 * depth + 1);
  // While a head is loaded, in float32: keys, values, logits, the projection. What is cached is gathered once more.
  const Index loading = ((2 * tokens + columns + queries) * depth + queries * tokens) / 2 + tokens * (queries + depth);
  // Positions that may be exchanged: steps, values and outputs of every head, and sums over pairs of heads.
  const Index exchange = sharing * sharing * (depth * depth + tokens) +
                         sharing * (tokens * (queries + depth) + 4 * queries * depth) + 4 * tokens * queries +
                         2 * tokens * depth;
  const Index residuals = 3 * queries * columns;
  return static_cast<Index>(sizeof(double)) * (heads * state + residuals + std::max(threads * loading, exchange));
}

}  // namespace kvreplay
