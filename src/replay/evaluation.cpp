#include "replay/evaluation.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/softmax.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

using kernels::kPanel;

// Positions whose weighted values are summed in float32.
constexpr Index kPositions = 512;

// Queries of a group that attend together: as many as a block of keys is still in the cache for.
constexpr Index kColumns = 2 * kPanel;

// Below this sum of exponentials, against the full cache's maximum, too few of their bits are left.
constexpr double kFaint = 1e-30;

using DoubleMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace

// Queries of some query heads that are measured together.
struct HeadEvaluation::Attention {
  Index first = 0;                          // index of the first query
  Index count = 0;                          // queries of each query head
  Index columns = 0;                        // the same in whole vectors; those beyond repeat the last query
  int first_member = 0;                     // of the group
  int members = 0;                          // side by side
  std::vector<std::int32_t> positions;      // [members · columns]
  std::vector<std::int32_t> first_visible;  // the same
  Buffer weights;                           // [tokens, members · columns] exponentials against each query's maximum
  std::vector<double> sinks;                // [members · columns] the same of its sink

  Index row() const { return members * columns; }
  double sink(int member, Index query) const { return sinks[static_cast<std::size_t>(member * columns + query)]; }
};

// What the queries of one query head get from some positions.
struct HeadEvaluation::Sums {
  std::vector<double> mass;  // [columns]
  DoubleMatrix values;       // [columns, width], weighted

  void clear(Index columns, Index width) {
    mass.assign(static_cast<std::size_t>(columns), 0.0);
    values.setZero(columns, width);
  }
};

// What the queries of one query head attend to most.
class HeadEvaluation::MostAttended {
 public:
  MostAttended(const Attention& attention, int member, Index tokens) : weights_(attention.count, tokens) {
    const float* from = attention.weights.data() + (member - attention.first_member) * attention.columns;
    for (Index n = 0; n < tokens; ++n, from += attention.row()) {
      for (Index q = 0; q < attention.count; ++q) weights_(q, n) = from[q];
    }
    known_.resize(static_cast<std::size_t>(attention.count));
  }

  struct Top {
    int most = 0;     // positions that were asked for
    float above = 0;  // what the next one has of the query's weights
    int count = 0;    // positions that have more
  };

  // Of the query `query` the `most` positions with the largest weights, but for those that have as much as the next.
  const Top& of(Index query, int most) {
    std::vector<Top>& known = known_[static_cast<std::size_t>(query)];
    const auto found = std::ranges::find(known, most, &Top::most);
    if (found != known.end()) return *found;
    Top& top = known.emplace_back(Top{.most = most, .above = std::numeric_limits<float>::infinity()});
    if (most >= weights_.cols()) return top;
    // Weights are not negative, so that their bits order them: by the leading ones first, and where these of the next
    // one are found, among the few that share them.
    constexpr unsigned kShift = 20;
    const std::span weights(weights_.data() + query * weights_.cols(), static_cast<std::size_t>(weights_.cols()));
    const auto leading = [](float weight) { return std::bit_cast<std::uint32_t>(weight) >> kShift; };
    std::array<int, (1U << (31 - kShift))> counts{};
    for (const float weight : weights) ++counts[leading(weight)];
    std::size_t bin = counts.size() - 1;
    int more = 0;
    while (more + counts[bin] <= most) more += counts[bin--];
    std::vector<float> alike;
    alike.reserve(static_cast<std::size_t>(counts[bin]));
    for (const float weight : weights) {
      if (leading(weight) == bin) alike.push_back(weight);
    }
    std::nth_element(alike.begin(), alike.begin() + (most - more), alike.end(), std::greater<>());
    top.above = alike[static_cast<std::size_t>(most - more)];
    top.count = more + static_cast<int>(std::ranges::count_if(alike, [&](float weight) { return weight > top.above; }));
    return top;
  }

 private:
  Matrix weights_;  // [queries, tokens]
  std::vector<std::vector<Top>> known_;
};

HeadEvaluation::HeadEvaluation(const CapturedRun& trace, int layer, int kv_head, const Eviction& eviction)
    : trace_(trace),
      shape_(head_shape(trace.info(), layer, kv_head, eviction.position)),
      queries_(evaluation_queries(trace.info(), eviction)),
      tokens_(queries_.positions.back() + 1),
      width_(kernels::rounded_up(shape_.head_dim, kernels::kLanes)) {}

Index HeadEvaluation::memory(const ModelInfo& model, Index tokens, bool over_time) {
  const Index width = kernels::rounded_up(model.head_dim, kernels::kLanes);
  // Values, weights, and what is gathered of them; keys whole where parts of them cannot be read alone.
  const Index floats =
      tokens * (width + kColumns) + kPositions * (3 * width + kColumns) + 2 * model.head_dim * kColumns;
  const Index sums = 5 * kColumns * (width + 1) * static_cast<Index>(sizeof(double));
  const Index most_attended =
      over_time
          ? tokens * (kPanel * static_cast<Index>(sizeof(float)) + 2 * static_cast<Index>(sizeof(Residency::Stay)))
          : 0;
  return (floats + tokens * width) * static_cast<Index>(sizeof(float)) + sums + most_attended;
}

// Weights over all positions, block after block of keys, then the values that they weigh, before and after the
// eviction.
void HeadEvaluation::attend(Attention& attention, Buffer& values, std::vector<Sums>& before,
                            std::vector<Sums>& after) const {
  const Index depth = shape_.head_dim;
  const Index row = attention.row();
  // The queries as the columns of a matrix [D, members · columns].
  Buffer queries(depth * row);
  Matrix rows(attention.count, depth);
  attention.positions.clear();
  attention.first_visible.clear();
  std::vector<float> maxima;
  for (int m = 0; m < attention.members; ++m) {
    trace_.read_rows(shape_.layer, HeadTensor::queries, shape_.query_head(attention.first_member + m),
                     queries_.first + attention.first, attention.count, rows.data());
    for (Index c = 0; c < attention.columns; ++c) {
      const Index query = std::min(c, attention.count - 1);
      for (Index d = 0; d < depth; ++d) queries.data()[d * row + m * attention.columns + c] = rows(query, d);
      const int position = queries_.positions[static_cast<std::size_t>(attention.first + query)];
      attention.positions.push_back(position);
      attention.first_visible.push_back(static_cast<std::int32_t>(shape_.rule.first_visible(position)));
      maxima.push_back(shape_.rule.sink(shape_.query_head(attention.first_member + m)));
    }
  }
  const kernels::QueryColumns columns{.positions = attention.positions.data(),
                                      .first_visible = attention.first_visible.data(),
                                      .columns = row,
                                      .scale = static_cast<float>(shape_.rule.softmax_scale),
                                      .softcapping = static_cast<float>(shape_.rule.attn_logit_softcapping)};
  const bool by_blocks = trace_.reads_directly(shape_.layer, HeadTensor::keys);
  Buffer keys((by_blocks ? kPositions : tokens_) * width_);
  for (Index first = 0; first < tokens_; first += kPositions) {
    const Index count = std::min(kPositions, tokens_ - first);
    if (by_blocks || first == 0) {
      const Index read = by_blocks ? count : tokens_;
      trace_.read_rows(shape_.layer, HeadTensor::keys, shape_.kv_head, first, read, keys.data());
      kernels::pad_rows(keys.data(), read, depth, width_);
    }
    float* const logits = attention.weights.data() + first * row;
    kernels::multiply(count, row, depth, keys.data() + (by_blocks ? 0 : first * width_), width_, 1, queries.data(), row,
                      logits, row);
    kernels::finish_logits(columns, first, count, logits, maxima.data());
  }
  attention.sinks.clear();
  for (Index q = 0; q < row; ++q) {
    const int member = attention.first_member + static_cast<int>(q / attention.columns);
    const double sink = static_cast<double>(shape_.rule.sink(shape_.query_head(member)));
    attention.sinks.push_back(std::exp(sink - static_cast<double>(maxima[static_cast<std::size_t>(q)])));
  }
  count_operations(2 * tokens_ * attention.members * attention.count * depth);
  count_exponentials(tokens_ * attention.members * attention.count);

  if (values.size() == 0) {
    values = Buffer(tokens_ * width_);
    trace_.read_rows(shape_.layer, HeadTensor::values, shape_.kv_head, 0, tokens_, values.data());
    kernels::pad_rows(values.data(), tokens_, depth, width_);
  }
  const Index prompt = shape_.next_position;
  for (Index first = 0; first < tokens_;) {
    // No block reaches over the eviction, so that the parts add up as those of a kept set that is the whole prompt.
    const Index end = first < prompt ? std::min(first + kPositions, prompt) : std::min(first + kPositions, tokens_);
    float* const weights = attention.weights.data() + first * row;
    kernels::exponentiate_columns(end - first, row, maxima.data(), weights);
    for (int m = 0; m < attention.members; ++m) {
      Sums& sums = (first < prompt ? before : after)[static_cast<std::size_t>(m)];
      add_range(end - first, attention, weights + m * attention.columns, row, values.data() + first * width_, sums);
    }
    first = end;
  }
}

// Adds `count` neighbouring positions of one query head, whose weights are `step` floats apart.
void HeadEvaluation::add_range(Index count, const Attention& attention, const float* weights, Index step,
                               const float* rows, Sums& sums) const {
  for (Index k = 0; k < count; ++k) {
    for (Index c = 0; c < attention.columns; ++c) {
      sums.mass[static_cast<std::size_t>(c)] += static_cast<double>(weights[k * step + c]);
    }
  }
  Matrix part(attention.columns, width_);
  kernels::multiply(attention.columns, width_, count, weights, 1, step, rows, width_, part.data(), width_);
  sums.values += part.cast<double>();
  count_operations(2 * count * attention.count * shape_.head_dim);
}

// Adds any positions, ascending: where `until` is given, to the queries at that position each and before, but for those
// in their `gaps`.
void HeadEvaluation::add(std::span<const int> positions, std::span<const int> until,
                         std::span<const Residency::Gap> gaps, int member, const Attention& attention,
                         const Buffer& values, Sums& sums) const {
  const Index row = attention.row();
  const Index column = (member - attention.first_member) * attention.columns;
  Buffer weights(kPositions * attention.columns);
  Buffer rows(kPositions * width_);
  for (std::size_t first = 0; first < positions.size(); first += kPositions) {
    const auto here = positions.subspan(first, std::min<std::size_t>(kPositions, positions.size() - first));
    const auto count = static_cast<Index>(here.size());
    if (until.empty() && here.back() - here.front() == static_cast<int>(count) - 1) {
      add_range(count, attention, attention.weights.data() + here.front() * row + column, row,
                values.data() + here.front() * width_, sums);
      continue;
    }
    for (Index k = 0; k < count; ++k) {
      const Index position = here[static_cast<std::size_t>(k)];
      std::copy_n(attention.weights.data() + position * row + column, attention.columns,
                  weights.data() + k * attention.columns);
      if (!until.empty()) {
        const int last = until[first + static_cast<std::size_t>(k)];
        for (Index c = 0; c < attention.columns; ++c) {
          if (attention.positions[static_cast<std::size_t>(column + c)] > last) {
            weights.data()[k * attention.columns + c] = 0;
          }
        }
      }
      std::copy_n(values.data() + position * width_, width_, rows.data() + k * width_);
    }
    for (const Residency::Gap& gap : gaps) {
      const auto hidden = std::ranges::lower_bound(here, gap.position);
      if (hidden == here.end() || *hidden != gap.position) continue;
      float* const of_hidden = weights.data() + (hidden - here.begin()) * attention.columns;
      for (Index c = 0; c < attention.columns; ++c) {
        const int query = attention.positions[static_cast<std::size_t>(column + c)];
        if (query >= gap.first && query <= gap.last) of_hidden[c] = 0;
      }
    }
    add_range(count, attention, weights.data(), attention.columns, rows.data(), sums);
  }
}

// Adds what queries see after more than one eviction, in the same pieces as after one: of the positions before the
// first to `kept`; of those since to `since`, or nothing and false where all of them are still seen.
bool HeadEvaluation::add_residents(const Residency& residency, int member, const Attention& attention,
                                   const Buffer& values, Sums& kept, Sums& since) const {
  const auto [first_query, last_query] = std::ranges::minmax(attention.positions);
  const auto is_seen_by_all = [last = last_query](int until) { return until >= last; };
  const std::size_t num_kept = residency.kept().size();
  const std::span<const int> listed = residency.positions();
  std::vector<int> positions;
  std::vector<int> until;
  for (std::size_t i = 0; i < num_kept; ++i) {
    if (residency.until()[i] < first_query) continue;
    positions.push_back(listed[i]);
    until.push_back(residency.until()[i]);
  }
  const int first = shape_.next_position;
  std::vector<Residency::Gap> gaps;  // that these queries feel
  for (const Residency::Gap& gap : residency.gaps()) {
    if (gap.first <= last_query && gap.last >= first_query) gaps.push_back(gap);
  }
  const auto since_eviction = std::ranges::lower_bound(gaps, first, {}, &Residency::Gap::position);
  const std::span<const Residency::Gap> gaps_of_kept(gaps.begin(), since_eviction);
  const std::span<const Residency::Gap> gaps_since(since_eviction, gaps.end());
  if (gaps_of_kept.empty() && std::ranges::all_of(until, is_seen_by_all)) until.clear();
  add(positions, until, gaps_of_kept, member, attention, values, kept);

  if (gaps_since.empty() && std::ranges::all_of(residency.until().subspan(num_kept), is_seen_by_all)) return false;
  positions.resize(static_cast<std::size_t>(tokens_ - first));
  std::iota(positions.begin(), positions.end(), first);
  until.assign(positions.size(), Residency::kNever);
  for (std::size_t i = num_kept; i < listed.size() && listed[i] < tokens_; ++i) {
    until[static_cast<std::size_t>(listed[i] - first)] = residency.until()[i];
  }
  add(positions, until, gaps_since, member, attention, values, since);
  return true;
}

// How many of the positions that every query attends to most there are, and are still cached, where `steps`, one per
// query, say how many are cached.
void HeadEvaluation::count_top(const Residency& residency, int member, const Attention& attention,
                               MostAttended& most_attended, std::span<StepOutcome> steps) const {
  std::vector<float> above;
  for (std::size_t q = 0; q < steps.size(); ++q) {
    const MostAttended::Top& top = most_attended.of(static_cast<Index>(q), steps[q].cached);
    above.push_back(top.above);
    steps[q].top = top.count;
  }
  const std::span positions = std::span(attention.positions).first(steps.size());
  std::vector<std::int32_t> counts(steps.size(), 0);
  const float* const weights = attention.weights.data() + (member - attention.first_member) * attention.columns;
  for (const auto& [position, from, until] :
       residency.seen_between(positions.front(), positions.back(), shape_.next_position)) {
    const float* const row = weights + position * attention.row();
    for (std::size_t q = 0; q < counts.size(); ++q) {
      counts[q] += static_cast<std::int32_t>(row[q] > above[q]) & static_cast<std::int32_t>(positions[q] >= from) &
                   static_cast<std::int32_t>(positions[q] <= until);
    }
  }
  for (std::size_t q = 0; q < steps.size(); ++q) steps[q].cached_top = counts[q];
}

// The output of one query whose attention on what is cached vanishes beside what was evicted: against its own maximum.
Eigen::RowVectorXd HeadEvaluation::attend_directly(int query_head, Index query, const Residency& residency,
                                                   const Buffer& values) const {
  const auto row = trace_.read(shape_.layer, HeadTensor::queries, query_head, queries_.first + query, 1)
                       .row(0)
                       .cast<double>()
                       .eval();
  const Matrix keys = trace_.read(shape_.layer, HeadTensor::keys, shape_.kv_head, 0, tokens_);
  const int position = queries_.positions[static_cast<std::size_t>(query)];
  const auto first = static_cast<int>(shape_.rule.first_visible(position));
  const std::vector<int> cached = residency.cached_at(position, shape_.next_position, first);
  Eigen::VectorXd weights(static_cast<Index>(cached.size()));
  for (std::size_t i = 0; i < cached.size(); ++i) {
    weights(static_cast<Index>(i)) = row.dot(keys.row(cached[i]).cast<double>());
  }
  scale_logits(weights, shape_.rule);
  const double sink = exponentiate(weights, 0, weights.size(), static_cast<double>(shape_.rule.sink(query_head)));
  Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(shape_.head_dim);
  for (std::size_t i = 0; i < cached.size(); ++i) {
    const Eigen::Map<const Eigen::RowVectorXf> value(values.data() + cached[i] * width_, shape_.head_dim);
    sum += weights(static_cast<Index>(i)) * value.cast<double>();
  }
  return sum / (weights.sum() + sink);
}

void HeadEvaluation::measure(std::span<const std::vector<const Residency*>> residencies,
                             std::span<const Matrix* const> given, Eigen::Ref<Matrix> outputs,
                             std::span<Eigen::Ref<Matrix>> differences, std::span<LayerNumbers> numbers,
                             std::span<std::vector<StepOutcome>* const> steps) const {
  const Index depth = shape_.head_dim;
  const auto group = static_cast<int>(residencies.size());
  const std::vector<Formula<HeadOutcome>>& measures = formulas<HeadOutcome>();
  const auto place_of = [this](int member, Index query) {
    return static_cast<std::size_t>(shape_.query_head(member) * queries_.count() + query);
  };
  std::vector<std::vector<std::size_t>> first_like;  // [member][set]: the first of those that are equal
  for (int member = 0; member < group; ++member) {
    const auto& sets = residencies[static_cast<std::size_t>(member)];
    // Those whose steps are asked for stand beside those without.
    using Asked = std::pair<const Residency*, bool>;
    const auto less = [](const Asked& a, const Asked& b) {
      return a.second != b.second ? a.second < b.second : *a.first < *b.first;
    };
    std::map<Asked, std::size_t, decltype(less)> distinct(less);
    std::vector<std::size_t>& first = first_like.emplace_back();
    for (std::size_t set = 0; set < sets.size(); ++set) {
      const Asked asked(sets[set], steps[set] != nullptr);
      first.push_back(given[set] != nullptr ? set : distinct.try_emplace(asked, set).first->second);
    }
  }

  Buffer values;
  Attention attention;
  Sums kept;
  Sums since;  // of residencies with more than one eviction
  for (attention.first = 0; attention.first < queries_.count(); attention.first += kPanel) {
    attention.count = std::min<Index>(kPanel, queries_.count() - attention.first);
    attention.columns = kernels::rounded_up(attention.count, kernels::kLanes);
    const auto at_once = static_cast<int>(kColumns / attention.columns);
    for (attention.first_member = 0; attention.first_member < group; attention.first_member += at_once) {
      attention.members = std::min(at_once, group - attention.first_member);
      attention.weights = Buffer(tokens_ * attention.row());
      std::vector<Sums> full(static_cast<std::size_t>(attention.members));
      std::vector<Sums> after(static_cast<std::size_t>(attention.members));
      for (auto* const sums : {&full, &after}) {
        for (Sums& each : *sums) each.clear(attention.columns, width_);
      }
      attend(attention, values, full, after);
      for (int m = 0; m < attention.members; ++m) {
        const int member = attention.first_member + m;
        const auto& sets = residencies[static_cast<std::size_t>(member)];
        Sums& whole = full[static_cast<std::size_t>(m)];
        const Sums& tail = after[static_cast<std::size_t>(m)];
        whole.values += tail.values;
        for (std::size_t c = 0; c < whole.mass.size(); ++c) whole.mass[c] += tail.mass[c];
        DoubleMatrix exact(attention.count, depth);
        for (Index q = 0; q < attention.count; ++q) {
          exact.row(q) =
              whole.values.row(q).head(depth) / (whole.mass[static_cast<std::size_t>(q)] + attention.sink(m, q));
          if (exact.row(q).allFinite()) continue;
          throw Error(fmt::format(
              "{}: layer {}, query head {}: the attention of the query at position {} exceeds float32's range",
              trace_.name(), shape_.layer, shape_.query_head(member),
              attention.positions[static_cast<std::size_t>(q)]));
        }
        std::optional<MostAttended> most_attended;
        outputs.block(attention.first, member * depth, attention.count, depth) = exact.cast<float>();
        for (std::size_t set = 0; set < sets.size(); ++set) {
          if (first_like[static_cast<std::size_t>(member)][set] != set) continue;
          const Residency& residency = *sets[set];
          const Sums* rest = &tail;
          kept.clear(attention.columns, width_);
          if (residency.is_one_eviction()) {
            add(residency.kept(), {}, {}, member, attention, values, kept);
          } else {
            since.clear(attention.columns, width_);
            if (add_residents(residency, member, attention, values, kept, since)) rest = &since;
          }
          for (Index q = 0; q < attention.count; ++q) {
            const auto column = static_cast<std::size_t>(q);
            const double mass = kept.mass[column] + rest->mass[column];
            const int position = attention.positions[column];
            const Eigen::RowVectorXd evicted =
                given[set] != nullptr ? Eigen::RowVectorXd(given[set]
                                                               ->row(position - shape_.next_position)
                                                               .segment(Index{shape_.query_head(member)} * depth, depth)
                                                               .cast<double>())
                : mass > kFaint
                    ? Eigen::RowVectorXd((kept.values.row(q).head(depth) + rest->values.row(q).head(depth)) /
                                         (mass + attention.sink(m, q)))
                    : attend_directly(shape_.query_head(member), attention.first + q, residency, values);
            const Eigen::RowVectorXd difference = evicted - exact.row(q);
            differences[set].row(attention.first + q).segment(member * depth, depth) = difference.cast<float>();
            const HeadOutcome outcome{
                .full = exact.row(q),
                .evicted = evicted,
                .difference = difference,
                .full_mass = whole.mass[column],
                .cached_mass = mass,
                .cached = residency.count_at(position, shape_.next_position,
                                             static_cast<int>(shape_.rule.first_visible(position)))};
            for (const auto& [measure, calculate] : measures) {
              numbers[set][measure][place_of(member, attention.first + q)] = static_cast<float>(calculate(outcome));
            }
            if (steps[set] == nullptr) continue;
            StepOutcome& step = (*steps[set])[place_of(member, attention.first + q)];
            step.cached = outcome.cached;
            step.full_mass = outcome.full_mass;
            step.cached_mass = outcome.cached_mass;
          }
          if (steps[set] == nullptr) continue;
          if (!most_attended) most_attended.emplace(attention, member, tokens_);
          count_top(residency, member, attention, *most_attended,
                    std::span(*steps[set])
                        .subspan(place_of(member, attention.first), static_cast<std::size_t>(attention.count)));
        }
      }
    }
  }
  for (int member = 0; member < group; ++member) {
    const std::vector<std::size_t>& first = first_like[static_cast<std::size_t>(member)];
    for (std::size_t set = 0; set < first.size(); ++set) {
      const std::size_t like = first[set];
      if (like == set) continue;
      for (const auto& [measure, calculate] : measures) {
        std::copy_n(numbers[like][measure].begin() + static_cast<std::ptrdiff_t>(place_of(member, 0)), queries_.count(),
                    numbers[set][measure].begin() + static_cast<std::ptrdiff_t>(place_of(member, 0)));
      }
      if (steps[set] != nullptr) {
        const auto first_step = static_cast<std::ptrdiff_t>(place_of(member, 0));
        std::copy_n(steps[like]->begin() + first_step, queries_.count(), steps[set]->begin() + first_step);
      }
      differences[set].middleCols(member * depth, depth) = differences[like].middleCols(member * depth, depth);
    }
  }
}

}  // namespace kvreplay
