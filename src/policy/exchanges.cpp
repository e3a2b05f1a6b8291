#include "policy/exchanges.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "base/softmax.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "policy/head.h"

namespace kvreplay {
namespace {

// Queries that are calculated side by side. Numbers per query come in multiples of them, Q for E queries: those that
// are missing have neither attention nor importance.
constexpr Index kLanes = 8;
using Lanes = Eigen::Array<double, kLanes, 1>;
using LanesView = Eigen::Map<const Lanes, Eigen::Aligned64>;
using LanesPlace = Eigen::Map<Lanes, Eigen::Aligned64>;

// Positions whose values are multiplied together.
constexpr Index kRows = 64;

// An evaluation query must be left with this share of its attention: where less is the rest of a difference, only
// rounding would be seen.
constexpr double kLeastLeft = 1e-6;

// Query heads that share a kept set.
int members_of(const RefinementShape& shape) {
  if (shape.granularity == Granularity::query) return 1;
  return shape.granularity == Granularity::kv ? shape.group_size : shape.num_query_heads();
}

// Pairs of them whose changes meet in the layer's output.
Index couples_of(Index members, bool output_projection) { return output_projection ? members * (members - 1) / 2 : 0; }

// What looking at `rows` positions takes for a set that so many heads share: the products of their values with those of
// the last two moves, and what is per query.
double operations_of_looks(Index rows, Index width, Index queries, Index members, Index couples) {
  return static_cast<double>(rows * (4 * width * (members + 2 * couples) +
                                     kernels::rounded_up(queries, kLanes) * (18 * members + 16 * couples)));
}

}  // namespace

// One query head: what each position that may be exchanged contributes to each evaluation query.
struct LayerExchanges::Head {
  // Σ weight · value over `rows` and what is cached after the eviction, and Σ weight.
  std::pair<MatrixD, Eigen::VectorXd> attend(const std::vector<int>& rows) const {
    const MatrixD kept = weights(rows, Eigen::all);
    MatrixD sum = later_sum;
    sum.noalias() += kept.transpose() * (*values)(rows, Eigen::all);
    return {std::move(sum), later_mass + kept.colwise().sum().transpose()};
  }

  // [Q, D] output with `rows` kept.
  MatrixD output(const std::vector<int>& rows) const {
    auto [sum, mass] = attend(rows);
    sum.array().colwise() /= mass.array();
    return std::move(sum);
  }

  // Adds what an output [Q, D] of this head becomes behind the projection to `layer` [Q, C], or takes it off.
  void add(const MatrixD& output, double sign, MatrixD& layer) const {
    if (projection.size() > 0) {
      layer.noalias() += sign * output * projection.transpose();
    } else {
      layer.middleCols(index * output.cols(), output.cols()) += sign * output;
    }
  }

  // [Q, D]: Wᵀ of what `layer` [Q, C] holds per query.
  MatrixD project_back(const MatrixD& layer) const {
    if (projection.size() > 0) return layer * projection;
    return layer.middleCols(index * values->cols(), values->cols());
  }

  Index index = 0;             // among the layer's query heads
  const MatrixD* values = {};  // [R, D]
  MatrixD weights;             // [R, Q] unnormalised attention
  MatrixD projection;          // [C, D]; empty where the layer has none: then heads stand side by side
  MatrixD full;                // [Q, D] output of the full cache
  MatrixD later_sum;           // [Q, D] Σ weight · value over what comes after the eviction
  Eigen::VectorXd later_mass;  // [Q] Σ weight over it, and the sink's
};

// Query heads that share a kept set, and what no exchange changes of their products.
struct LayerExchanges::Sharing {
  struct Couple {
    Index a = 0;
    Index b = 0;   // a < b
    MatrixD gram;  // W_aᵀ W_b
  };

  explicit Sharing(std::span<const Head> of) : members(of) {
    const auto count = static_cast<Index>(members.size());
    const bool projected = members.front().projection.size() > 0;
    products.resize(members.front().values->rows(), count + couples_of(count, projected));
    for (Index a = 0; a < count; ++a) {
      const Head& one = members[static_cast<std::size_t>(a)];
      if (!projected) {
        products.col(a) = one.values->rowwise().squaredNorm();
        continue;
      }
      for (Index b = a; b < count; ++b) {
        const Head& other = members[static_cast<std::size_t>(b)];
        MatrixD gram = one.projection.transpose() * other.projection;
        const Index column = a == b ? a : count + static_cast<Index>(couples.size());
        products.col(column) = (a == b ? 1 : 2) * (*one.values * gram).cwiseProduct(*other.values).rowwise().sum();
        if (a == b) {
          grams.push_back(std::move(gram));
        } else {
          couples.push_back({a, b, std::move(gram)});
        }
      }
    }
  }

  std::span<const Head> members;  // [M]
  std::vector<MatrixD> grams;     // [M]: W_aᵀ W_a; none without a projection
  std::vector<Couple> couples;
  MatrixD products;  // [R, M + couples]: v_aᵀ W_aᵀ W_b v_b; of couples twice
};

// What exchanging positions of a kept set does to the layer's error, in tables that follow every exchange.
//
// With w and v a position's weight and value, m = Σ w and s = Σ w v over what is cached, o = s / m, and W the output
// projection, bringing a position in (+) or out (−) moves the output of head a by q_a (v_a − o_a), where q_a = ±w_a t_a
// and t_a = 1 / (m_a ± w_a). The squared length of the layer's error vector r then changes by
//   2 Σ_a q_a (v_a − o_a)·W_aᵀ r + Σ_ab q_a q_b (v_a − o_a)ᵀ W_aᵀ W_b (v_b − o_b),
// and r is linear in the outputs: W_aᵀ r = g_a + Σ_b W_aᵀ W_b o_b, where g_a stays while this set changes. That makes
//   ±2 Σ_a t_a (Y_a − w_a O_a) + Σ_a t_a² (±X_aa + w_a² (P_aa + C_aa)) + Σ_{a<b} t_a t_b (±X_ab + w_a w_b (P_ab +
//   C_ab))
// with, per position and query, Y_a = w_a v_a·g_a, X_aa = 2 w_a v_aᵀ W_aᵀ W_a s_a, and
// X_ab = 2 (w_a v_aᵀ W_aᵀ W_b s_b + w_b v_bᵀ W_bᵀ W_a s_a); per position P_aa = v_aᵀ W_aᵀ W_a v_a and
// P_ab = 2 v_aᵀ W_aᵀ W_b v_b; per query C_aa and C_ab, the same of o, and O_a = o_a·g_a + C_aa + ½ Σ_b C_ab. When
// position x comes or goes, of the tables X alone changes: by products of weights and K_ab = v_aᵀ W_aᵀ W_b v_b(x).
class LayerExchanges::SharedSet {
 public:
  SharedSet(const Sharing& sharing, const Eigen::VectorXd& importance)
      : heads_(sharing.members),
        sharing_(sharing),
        members_(static_cast<Index>(heads_.size())),
        couples_(static_cast<Index>(sharing.couples.size())),
        pairs_(members_ + couples_),
        rows_(sharing.products.rows()),
        blocks_(importance.size() / kLanes),
        table_(rows_, blocks_ * (2 * members_ + pairs_) * kLanes),
        sums_(blocks_, (2 * members_ + pairs_) * kLanes),
        state_(MatrixD::Zero(blocks_, (1 + 5 * members_ + pairs_) * kLanes)),
        steps_(members_, kLanes),
        updated_(static_cast<std::size_t>(rows_)) {
    for (Index block = 0; block < blocks_; ++block) {
      lanes(state_, block, 0) = importance.segment<kLanes>(block * kLanes).array();
    }
    // Products of heads with the same values stand side by side.
    const Index partners = couples_ > 0 ? members_ : 1;
    std::vector<Index> first_product;
    Index columns = 0;
    Index end = 0;
    for (Index a = 0; a < members_; a = end) {
      while (end < members_ && head(end).values == head(a).values) {
        first_product.push_back(columns + (end - a) * 2 * partners);
        ++end;
      }
      const Index width = kernels::rounded_up((end - a) * 2 * partners, kLanes);
      directions_.push_back({head(a).values, columns, MatrixD::Zero(head(a).values->cols(), width)});
      columns += width;
    }
    products_.resize(1, columns);
    for (Index a = 0; a < members_; ++a) {
      own_.push_back(first_product[static_cast<std::size_t>(a)] + (couples_ > 0 ? 2 * a : 0));
    }
    for (const Sharing::Couple& couple : sharing.couples) {
      const Index forth = first_product[static_cast<std::size_t>(couple.a)] + 2 * couple.b;
      const Index back = first_product[static_cast<std::size_t>(couple.b)] + 2 * couple.a;
      both_.push_back({couple.a, couple.b, forth, back});
    }
  }

  // Exchanges rows in `kept`, at most `exchanges` times; `residual` [Q, C] is the layer's error vector and is kept up
  // to date.
  void improve(std::vector<int>& kept, int exchanges, MatrixD& residual) {
    for (const Head& head : heads_) head.add(head.output(kept), -1, residual);
    fill(kept, residual);
    std::vector<bool> is_kept(static_cast<std::size_t>(rows_), false);
    for (const int row : kept) is_kept[static_cast<std::size_t>(row)] = true;
    for (int i = 0; i < exchanges; ++i) {
      const auto [added, gain] = best(is_kept, 1);
      if (added < 0) break;
      move(added, 1);
      is_kept[static_cast<std::size_t>(added)] = true;
      const auto [removed, loss] = best(is_kept, -1);
      if (removed < 0 || !(gain + loss < -1e-12)) {
        is_kept[static_cast<std::size_t>(added)] = false;
        break;
      }
      move(removed, -1);
      is_kept[static_cast<std::size_t>(removed)] = false;
    }
    kept.clear();
    for (int row = 0; row < static_cast<int>(rows_); ++row) {
      if (is_kept[static_cast<std::size_t>(row)]) kept.push_back(row);
    }
    for (const Head& head : heads_) head.add(head.output(kept), 1, residual);
  }

 private:
  // What the values of a group are multiplied by: W_aᵀ W_b v_b(x), of the last two moves side by side.
  struct Directions {
    const MatrixD* values;
    Index first;      // of their products
    MatrixD columns;  // [D, …]
  };

  // A couple and where K_ab and K_ba stand among the products.
  struct Both {
    Index a;
    Index b;
    Index forth;
    Index back;
  };

  // What a row of the table holds per query: w and Y of every head, X of every pair. The sums: m and s·g of every head,
  // C of s in place of o of every pair. The state: importance; m, what must be left of it, and O of every head; C of
  // every pair; for the last two moves twice w of every head, negative where it went.
  Index weight(Index a) const { return a; }
  Index linear(Index a) const { return members_ + a; }
  Index product(Index pair) const { return 2 * members_ + pair; }
  Index mass(Index a) const { return 1 + a; }
  Index least(Index a) const { return 1 + members_ + a; }
  Index offset(Index a) const { return 1 + 2 * members_ + a; }
  Index curve(Index pair) const { return 1 + 3 * members_ + pair; }
  Index moved(Index slot, Index a) const { return 1 + (3 + slot) * members_ + pairs_ + a; }

  const Head& head(Index member) const { return heads_[static_cast<std::size_t>(member)]; }
  static LanesPlace lanes(MatrixD& of, Index row, Index number) { return LanesPlace(&of(row, number * kLanes)); }
  LanesPlace in_table(Index row, Index block, Index number) {
    return LanesPlace(&table_(row, (block * (2 * members_ + pairs_) + number) * kLanes));
  }

  // Table and sums for what is kept; `rest` [Q, C] is the layer's error vector without these heads.
  void fill(const std::vector<int>& kept, const MatrixD& rest) {
    MatrixD part(kRows, blocks_ * kLanes);
    // Puts, or adds, weights of head a times products of its values and the rows of `with` [Q, D].
    const auto weigh = [&](Index a, const MatrixD& with, double factor, Index number, bool add) {
      for (Index first = 0; first < rows_; first += kRows) {
        const Index count = std::min(kRows, rows_ - first);
        part.topRows(count).noalias() = head(a).values->middleRows(first, count) * with.transpose();
        for (Index i = 0; i < count; ++i) {
          for (Index block = 0; block < blocks_; ++block) {
            LanesPlace place = in_table(first + i, block, number);
            const Lanes product = factor * in_table(first + i, block, weight(a)) * lanes(part, i, block);
            place = add ? Lanes(place + product) : product;
          }
        }
      }
    };
    const auto put = [&](const Eigen::VectorXd& numbers, Index number) {
      for (Index block = 0; block < blocks_; ++block) {
        lanes(sums_, block, number) = numbers.segment<kLanes>(block * kLanes).array();
      }
    };
    std::vector<MatrixD> sums;
    for (Index a = 0; a < members_; ++a) {
      for (Index row = 0; row < rows_; ++row) {
        for (Index block = 0; block < blocks_; ++block) {
          in_table(row, block, weight(a)) = LanesView(&head(a).weights(row, block * kLanes));
        }
      }
      auto [sum, mass_of_all] = head(a).attend(kept);
      put(mass_of_all, weight(a));
      const MatrixD constant = head(a).project_back(rest);
      put(sum.cwiseProduct(constant).rowwise().sum(), linear(a));
      weigh(a, constant, 1, linear(a), false);
      const MatrixD bent = sharing_.grams.empty() ? sum : sum * sharing_.grams[static_cast<std::size_t>(a)];
      put(sum.cwiseProduct(bent).rowwise().sum(), product(a));
      weigh(a, bent, 2, product(a), false);
      sums.push_back(std::move(sum));
    }
    for (Index c = 0; c < couples_; ++c) {
      const Sharing::Couple& couple = sharing_.couples[static_cast<std::size_t>(c)];
      const MatrixD& sum = sums[static_cast<std::size_t>(couple.a)];
      const MatrixD bent = sums[static_cast<std::size_t>(couple.b)] * couple.gram.transpose();
      put(2 * sum.cwiseProduct(bent).rowwise().sum(), product(members_ + c));
      weigh(couple.a, bent, 2, product(members_ + c), false);
      weigh(couple.b, sum * couple.gram, 2, product(members_ + c), true);
    }
    normalise();
    count_ = 0;
    std::ranges::fill(updated_, 0);
  }

  // The state, once the sums have changed.
  void normalise() {
    for (Index block = 0; block < blocks_; ++block) {
      for (Index a = 0; a < members_; ++a) {
        const Lanes of_all = lanes(sums_, block, weight(a));
        lanes(state_, block, mass(a)) = of_all;
        lanes(state_, block, least(a)) = kLeastLeft * of_all;
        lanes(state_, block, curve(a)) = lanes(sums_, block, product(a)) / of_all.square();
        lanes(state_, block, offset(a)) = lanes(sums_, block, linear(a)) / of_all + lanes(state_, block, curve(a));
      }
      for (Index c = 0; c < couples_; ++c) {
        const auto& [a, b, forth, back] = both_[static_cast<std::size_t>(c)];
        const Lanes of_both = lanes(sums_, block, product(members_ + c)) /
                              (lanes(sums_, block, weight(a)) * lanes(sums_, block, weight(b)));
        lanes(state_, block, curve(members_ + c)) = of_both;
        lanes(state_, block, offset(a)) += of_both / 2;
        lanes(state_, block, offset(b)) += of_both / 2;
      }
    }
  }

  // The row, kept or not, whose move changes the objective for the best, and by how much; the first of equal ones, −1
  // where there is none.
  std::pair<int, double> best(const std::vector<bool>& is_kept, double sign) {
    int found = -1;
    double least = std::numeric_limits<double>::infinity();
    Index looked = 0;
    for (Index row = 0; row < rows_; ++row) {
      if (is_kept[static_cast<std::size_t>(row)] != (sign < 0)) continue;
      ++looked;
      const int behind = count_ - std::exchange(updated_[static_cast<std::size_t>(row)], count_);
      const double change = behind == 0 ? look<0>(row, sign) : behind == 1 ? look<1>(row, sign) : look<2>(row, sign);
      if (!(change < least)) continue;
      found = static_cast<int>(row);
      least = change;
    }
    count_operations(static_cast<std::int64_t>(
        operations_of_looks(looked, head(0).values->cols(), blocks_ * kLanes, members_, couples_)));
    return {found, least};
  }

  // K of every two heads, of a row with the last two moves.
  void multiply(Index row) {
    for (const Directions& group : directions_) {
      const double* const value = &(*group.values)(row, 0);
      const Index depth = group.columns.rows();
      for (Index column = 0; column < group.columns.cols(); column += kLanes) {
        constexpr Index kChains = 4;  // sums that do not wait for each other
        std::array<Lanes, kChains> sums;
        for (Lanes& sum : sums) sum.setZero();
        Index d = 0;
        for (; d + kChains <= depth; d += kChains) {
          for (Index i = 0; i < kChains; ++i) {
            sums[static_cast<std::size_t>(i)] += value[d + i] * LanesView(&group.columns(d + i, column));
          }
        }
        for (; d < depth; ++d) sums[0] += value[d] * LanesView(&group.columns(d, column));
        LanesPlace(&products_(0, group.first + column)) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
  }

  // Brings a row of the table up to date that is `behind` moves behind, and returns what moving its position would
  // change; infinity where that must not be. No row is more than two behind: what is kept is looked at in every
  // exchange, and so is what is not.
  template <int behind>
  double look(Index row, double sign) {
    if (behind > 0) multiply(row);
    const Index last = (count_ + 1) % 2;
    const double* const constants = &sharing_.products(row, 0);
    const double* const products = products_.data();
    double* table = &table_(row, 0);
    const double* state = state_.data();
    Lanes change = Lanes::Zero();
    Lanes left = Lanes::Constant(std::numeric_limits<double>::infinity());
    for (Index block = 0; block < blocks_; ++block) {
      const auto entry = [table](Index number) { return LanesPlace(table + number * kLanes); };
      const auto of_query = [state](Index number) { return LanesView(state + number * kLanes); };
      Lanes straight = Lanes::Zero();
      Lanes bent = Lanes::Zero();
      for (Index a = 0; a < members_; ++a) {
        const Lanes own = entry(weight(a));
        const Lanes rest = of_query(mass(a)) + sign * own;
        left = left.min(rest - of_query(least(a)));
        const Lanes step = 1 / rest;
        LanesPlace(&steps_(a, 0)) = step;
        straight += step * (entry(linear(a)) - own * of_query(offset(a)));
        Lanes x = entry(product(a));
        const double* const k = products + own_[static_cast<std::size_t>(a)];
        if (behind == 1) x += own * (k[last] * of_query(moved(last, a)));
        if (behind == 2) x += own * (k[0] * of_query(moved(0, a)) + k[1] * of_query(moved(1, a)));
        if (behind > 0) entry(product(a)) = x;
        bent += step.square() * (sign * x + own.square() * (constants[a] + of_query(curve(a))));
      }
      for (Index c = 0; c < couples_; ++c) {
        const auto& [a, b, forth, back] = both_[static_cast<std::size_t>(c)];
        const Lanes one = entry(weight(a));
        const Lanes other = entry(weight(b));
        const double* const f = products + forth;
        const double* const g = products + back;
        Lanes x = entry(product(members_ + c));
        if (behind == 1) {
          x += one * (f[last] * of_query(moved(last, b))) + other * (g[last] * of_query(moved(last, a)));
        }
        if (behind == 2) {
          x += one * (f[0] * of_query(moved(0, b)) + f[1] * of_query(moved(1, b))) +
               other * (g[0] * of_query(moved(0, a)) + g[1] * of_query(moved(1, a)));
        }
        if (behind > 0) entry(product(members_ + c)) = x;
        bent += LanesView(&steps_(a, 0)) * LanesView(&steps_(b, 0)) *
                (sign * x + one * other * (constants[members_ + c] + of_query(curve(members_ + c))));
      }
      change += of_query(0) * (2 * sign * straight + bent);
      table += (2 * members_ + pairs_) * kLanes;
      state += (1 + 5 * members_ + pairs_) * kLanes;
    }
    if (sign < 0 && !(left.minCoeff() >= 0)) return std::numeric_limits<double>::infinity();
    return change.sum();
  }

  // Brings the position of a row that is up to date in or out.
  void move(Index row, double sign) {
    const Index slot = count_ % 2;
    for (Index block = 0; block < blocks_; ++block) {
      for (Index a = 0; a < members_; ++a) {
        const Lanes own = in_table(row, block, weight(a));
        lanes(sums_, block, weight(a)) += sign * own;
        lanes(sums_, block, linear(a)) += sign * in_table(row, block, linear(a));
        lanes(sums_, block, product(a)) +=
            sign * in_table(row, block, product(a)) + sharing_.products(row, a) * own.square();
        lanes(state_, block, moved(slot, a)) = 2 * sign * own;
      }
      for (Index c = 0; c < couples_; ++c) {
        const auto& [a, b, forth, back] = both_[static_cast<std::size_t>(c)];
        const Index pair = members_ + c;
        lanes(sums_, block, product(pair)) +=
            sign * in_table(row, block, product(pair)) +
            sharing_.products(row, pair) * in_table(row, block, weight(a)) * in_table(row, block, weight(b));
      }
    }
    normalise();
    const auto direct = [&](Index place, const auto& direction) {
      const auto group = std::ranges::find_if(
          directions_, [&](const Directions& each) { return place < each.first + each.columns.cols(); });
      group->columns.col(place - group->first + slot) = direction;
    };
    for (Index a = 0; a < members_; ++a) {
      const auto value = head(a).values->row(row).transpose();
      if (sharing_.grams.empty()) {
        direct(own_[static_cast<std::size_t>(a)], value);
      } else {
        direct(own_[static_cast<std::size_t>(a)], sharing_.grams[static_cast<std::size_t>(a)] * value);
      }
    }
    for (Index c = 0; c < couples_; ++c) {
      const auto& [a, b, forth, back] = both_[static_cast<std::size_t>(c)];
      const MatrixD& gram = sharing_.couples[static_cast<std::size_t>(c)].gram;
      direct(forth, gram * head(b).values->row(row).transpose());
      direct(back, gram.transpose() * head(a).values->row(row).transpose());
    }
    ++count_;
  }

  std::span<const Head> heads_;
  const Sharing& sharing_;
  Index members_;
  Index couples_;
  Index pairs_;  // couples, and every head with itself
  Index rows_;
  Index blocks_;                        // of kLanes queries
  MatrixD table_;                       // [R, blocks · numbers · kLanes]
  MatrixD sums_;                        // [blocks, numbers · kLanes]
  MatrixD state_;                       // [blocks, numbers · kLanes]
  MatrixD steps_;                       // [M, kLanes]: t, while a row is looked at
  std::vector<Directions> directions_;  // [group]
  MatrixD products_;                    // [1, …]: K of a row, while it is looked at
  std::vector<Index> own_;              // [M]: where K_aa stands
  std::vector<Both> both_;              // [couples]
  int count_ = 0;                       // moves so far
  std::vector<int> updated_;            // [R]: moves that a row of the table has followed
};

LayerExchanges::LayerExchanges(const LayerSource& layer)
    : group_size_(layer.shape().group_size),
      first_held_(layer.shape().next_position - layer.shape().rows()),
      values_(static_cast<std::size_t>(layer.shape().num_kv_heads)),
      heads_(static_cast<std::size_t>(layer.shape().num_kv_heads * group_size_)) {
  Index queries = 0;
  for (int kv_head = 0; kv_head < layer.shape().num_kv_heads; ++kv_head) {
    const std::unique_ptr<HeadSource> head = layer.head(kv_head);
    queries = static_cast<Index>(head->evaluation_positions().size());
    read_heads(*head);
  }
  MatrixD reference = no_error();
  for (const Head& head : heads_) head.add(head.full, 1, reference);
  // The objective divides by the full output's squared length; a query whose output is 0 cannot be improved.
  importance_ = reference.rowwise().squaredNorm().unaryExpr([](double x) { return x > 0 ? 1 / x : 0; }) /
                static_cast<double>(queries);
}

LayerExchanges::~LayerExchanges() = default;

LayerExchanges::MatrixD LayerExchanges::no_error() const {
  const Head& head = heads_.front();
  const Index columns =
      head.projection.size() > 0 ? head.projection.rows() : static_cast<Index>(heads_.size()) * head.full.cols();
  return MatrixD::Zero(head.full.rows(), columns);
}

void LayerExchanges::read_heads(const HeadSource& source) {
  const HeadShape& shape = source.shape();
  const std::span<const int> positions = source.evaluation_positions();
  const auto queries = static_cast<Index>(positions.size());
  const Index tokens = positions.back() + 1;
  const Index later = tokens - shape.next_position;
  const Index padded = kernels::rounded_up(queries, kLanes);
  const Matrix keys = source.evaluation_keys();
  const MatrixD all_values = source.evaluation_values().cast<double>();
  MatrixD& values = values_[static_cast<std::size_t>(shape.kv_head)];
  values = all_values.middleRows(first_held_, shape.rows());
  for (int member = 0; member < group_size_; ++member) {
    const int query_head = shape.query_head(member);
    Matrix logits = source.evaluation_queries(member) * keys.transpose();
    scale_logits(logits, shape.rule);
    MatrixD weights = MatrixD::Zero(padded, tokens);
    Eigen::VectorXd sinks = Eigen::VectorXd::Zero(padded);  // what a sink weighs, which has no value
    for (Index e = 0; e < logits.rows(); ++e) {
      const Index position = positions[static_cast<std::size_t>(e)];
      weights.row(e).head(tokens) = logits.row(e).cast<double>();
      sinks(e) = exponentiate(weights.row(e), shape.rule.first_visible(position), position + 1,
                              static_cast<double>(shape.rule.sink(query_head)));
    }
    Head& head = heads_[static_cast<std::size_t>(query_head)];
    head.index = query_head;
    head.values = &values;
    Eigen::VectorXd mass = weights.rowwise().sum() + sinks;
    head.later_mass = weights.rightCols(later).rowwise().sum() + sinks;
    mass.tail(padded - queries).setOnes();
    head.later_mass.tail(padded - queries).setOnes();
    head.full.noalias() = weights * all_values;
    head.full.array().colwise() /= mass.array();
    head.later_sum.noalias() = weights.rightCols(later) * all_values.bottomRows(later);
    head.weights = weights.middleCols(first_held_, shape.rows()).transpose();
    if (source.has_output_projection()) head.projection = source.output_projection(member).cast<double>();
  }
}

const std::vector<LayerExchanges::Sharing>& LayerExchanges::sharing(Granularity granularity) {
  std::vector<Sharing>& sharing = sharing_[granularity];
  const std::size_t members = granularity == Granularity::query ? 1
                              : granularity == Granularity::kv  ? static_cast<std::size_t>(group_size_)
                                                                : heads_.size();
  for (std::size_t first = sharing.size() * members; first < heads_.size(); first += members) {
    sharing.emplace_back(std::span(heads_).subspan(first, members));
  }
  return sharing;
}

LayerSets LayerExchanges::improve(Granularity granularity, LayerSets sets, int exchanges) {
  for (std::vector<int>& set : sets) {
    for (int& position : set) position -= first_held_;
  }
  MatrixD residual = no_error();
  for (const Head& head : heads_) {
    const auto set = static_cast<std::size_t>(head.index) * sets.size() / heads_.size();
    head.add(head.output(sets[set]) - head.full, 1, residual);
  }
  const std::vector<Sharing>& sharing = this->sharing(granularity);
  for (std::size_t i = 0; i < sharing.size(); ++i) {
    SharedSet(sharing[i], importance_).improve(sets[i], exchanges, residual);
  }
  if (granularity == Granularity::layer) std::ranges::fill(sets, std::vector<int>(sets.front()));
  for (std::vector<int>& set : sets) {
    for (int& position : set) position += first_held_;
  }
  return sets;
}

double exchange_operations(const RefinementShape& shape, int exchanges) {
  const Index heads = shape.num_query_heads();
  const Index members = members_of(shape);
  const Index sets = heads / members;
  const Index couples = couples_of(members, shape.hidden_size > 0);
  const auto width = static_cast<double>(shape.head_dim);
  const auto rows = static_cast<double>(shape.hidden_size);
  const auto tokens = static_cast<double>(shape.tokens);
  const auto queries = static_cast<double>(shape.queries);
  const auto pairs = static_cast<double>(sets * (members + 2 * couples));
  // Every head's outputs, before and after; for each two that share a set the products of their projections, of their
  // values, and of values with outputs.
  const double loading = static_cast<double>(heads) * queries * width * (8 * tokens + 8 * rows);
  const double products = pairs * 2 * width * (width * (rows + tokens) + queries * tokens);
  // An exchange looks at what is kept and at what is not, at every position once.
  const double one = operations_of_looks(shape.positions, shape.head_dim, shape.queries, members, couples);
  const double operations = loading + products + static_cast<double>(sets) * exchanges * one;
  // In float64, by one thread, and not only products.
  constexpr double kSlower = 4;
  return kSlower * operations;
}

Index exchange_memory(const RefinementShape& shape) {
  const Index heads = shape.num_query_heads();
  const Index members = members_of(shape);
  const Index couples = couples_of(members, shape.hidden_size > 0);
  const Index pairs = members + couples;
  const Index partners = couples > 0 ? members : 1;
  const Index rows = shape.positions;
  const Index queries = kernels::rounded_up(shape.queries, kLanes);
  const Index depth = shape.head_dim;
  const Index columns = shape.hidden_size > 0 ? shape.hidden_size : heads * depth;
  const Index projection = shape.hidden_size * depth;
  const Index loaded = heads * (rows * queries + projection + queries * (2 * depth + 2)) +
                       shape.num_kv_heads * rows * depth + heads / members * (pairs * (rows + depth * depth));
  // While heads are read: keys, values and the projection in float32 too, logits and attention of one.
  const Index reading = shape.tokens * (2 * depth + 2 * queries) + projection;
  // The table, what is per query, directions of the last moves, what is gathered of a set, and outputs.
  const Index numbers = 2 * members + pairs;
  const Index set = numbers * rows * queries + (2 * numbers + 3 * members + 1) * queries +
                    2 * members * (partners + kLanes) * depth + rows * (queries + depth + 1) +
                    (members + 4) * queries * depth + kRows * queries;
  const Index residuals = 3 * queries * columns;
  return static_cast<Index>(sizeof(double)) * (loaded + residuals + std::max(reading, set));
}

}  // namespace kvreplay
