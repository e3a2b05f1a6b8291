#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <span>

#include "kernels/inference.h"
#include "kernels/kernels.h"
#include "trace/writer.h"
#include "tracer/synthetic/generator.h"
#include "tracer/synthetic/synthetic.h"

namespace kvreplay::tracer {

namespace {

// Positions of a head that are made, attended and written together.
constexpr Index kBlock = 1024;

// Queries that are attended together.
constexpr Index kQueryBlock = kernels::kPanel;

// Queries that attend to a block while it is at hand: keys and values are made again for every so many.
constexpr Index kChunk = 16 * kQueryBlock;

// Keys whose weights stay in the first-level cache between the softmax and the sum over values.
constexpr Index kKeyBlock = 128;

// Lets pieces of shared work do something one after the other, in the order of their numbers.
class Turns {
 public:
  // Does `work` when all lower turns are over, unless one of them failed.
  template <class Work>
  void take(Index turn, const Work& work) {
    std::unique_lock lock(mutex_);
    turn_came_.wait(lock, [&] { return turn_ == turn || failed_; });
    if (failed_) return;
    work();
    ++turn_;
    turn_came_.notify_all();
  }

  // Nobody waits any longer.
  void give_up() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    turn_came_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_came_;
  Index turn_ = 0;
  bool failed_ = false;
};

// Shares pieces that take turns at their end: make(piece, worker), then finish(piece, worker) in the order of pieces.
template <class Make, class Finish>
void share_in_order(const Execution& execution, Index pieces, const Make& make, const Finish& finish) {
  Turns turns;
  execution.share(pieces, std::numeric_limits<Index>::max(), [&](Index piece, int worker) {
    try {
      make(piece, worker);
      turns.take(piece, [&] { finish(piece, worker); });
    } catch (...) {
      turns.give_up();
      throw;
    }
  });
}

// Writes the tensors of one trace.
class TraceMaker {
 public:
  TraceMaker(const SyntheticTrace& trace, const std::filesystem::path& path, const Execution& execution)
      : trace_(trace),
        execution_(execution),
        generator_(trace),
        info_(generator_.info()),
        dim_(trace.head_dim),
        group_(info_.model.group_size()),
        writer_(path, info_, trace.dtype),
        workspaces_(static_cast<std::size_t>(execution.threads())) {
    if (trace_.attention_mass && info_.query_positions.front() > 0) {
      for (std::int32_t position = 0; position < info_.query_positions.front(); ++position) {
        attended_.push_back(position);
      }
    }
    first_captured_ = static_cast<Index>(attended_.size());
    attended_.insert(attended_.end(), info_.query_positions.begin(), info_.query_positions.end());
  }

  void write(const std::function<void(double share)>& on_progress) {
    const int groups = trace_.num_layers * trace_.num_key_value_heads;
    for (int layer = 0; layer < trace_.num_layers; ++layer) {
      for (int kv_head = 0; kv_head < trace_.num_key_value_heads; ++kv_head) {
        write_group(layer, kv_head);
        const int done = layer * trace_.num_key_value_heads + kv_head + 1;
        if (on_progress) on_progress(static_cast<double>(done) / groups);
      }
      if (trace_.output_projection) write_projection(layer);
    }
    writer_.finish();
  }

 private:
  // What a block of keys adds to a block of queries, with weights relative to the largest logit among them.
  struct Partial {
    float maxima[kQueryBlock];
    double sums[kQueryBlock];
    std::vector<float> outputs;  // [D, kQueryBlock]
  };

  struct Workspace {
    std::vector<float> rows;            // as they are made: [kBlock, D], or some of the projection
    std::vector<std::byte> keys;        // as stored
    std::vector<std::byte> values;      // as stored
    std::vector<float> widened_keys;    // [kBlock, D]
    std::vector<float> widened_values;  // [kBlock, D]
    std::vector<float> logits;          // [kBlock, kQueryBlock]
    std::vector<Partial> partials;      // of each block of queries
  };

  // Up to kQueryBlock queries that attend together. Those of a group's heads at one position follow each other.
  struct QueryRows {
    Index first = 0;  // row, over positions and heads of the group
    Index count = 0;
    Index keys = 0;              // that the last of them sees
    std::vector<float> columns;  // [D, kQueryBlock], scaled
    // Over all blocks of keys so far; in the end the largest logit of all and what the weights add up to.
    double maxima[kQueryBlock];
    double sums[kQueryBlock];
    std::vector<double> outputs;  // [D, kQueryBlock]
  };

  Index position_of(Index row) const { return attended_[static_cast<std::size_t>(row / group_)]; }

  // Everything of one KV head, and of the query heads that read it.
  void write_group(int layer, int kv_head) {
    std::vector<QueryPlan> plans;
    for (Index member = 0; member < group_; ++member) {
      plans.push_back(generator_.plan_queries(layer, static_cast<int>(kv_head * group_ + member)));
    }
    const ValuePlan values = generator_.plan_values(layer, kv_head);
    const Index captured = info_.num_queries();
    std::vector<float> outputs(static_cast<std::size_t>(group_ * captured * dim_));
    std::vector<double> mass(trace_.attention_mass ? static_cast<std::size_t>(group_ * trace_.prompt_tokens) : 0);

    const Index rows = static_cast<Index>(attended_.size()) * group_;
    for (Index first = 0; first < rows; first += kChunk) {
      std::vector<QueryRows> chunk;
      for (Index start = first; start < std::min(rows, first + kChunk); start += kQueryBlock) {
        chunk.push_back(prepare_queries(plans, start, std::min(kQueryBlock, rows - start)));
      }
      attend(layer, kv_head, values, chunk, first == 0);
      for (const QueryRows& queries : chunk) keep_outputs(queries, outputs);
      if (trace_.attention_mass) sum_mass(layer, kv_head, chunk, mass);
    }

    std::vector<float> queries(static_cast<std::size_t>(captured * dim_));
    for (Index member = 0; member < group_; ++member) {
      const int head = static_cast<int>(kv_head * group_ + member);
      for (Index i = 0; i < captured; ++i) {
        generator_.query(plans[static_cast<std::size_t>(member)], info_.query_positions[static_cast<std::size_t>(i)],
                         queries.data() + i * dim_);
      }
      writer_.write_rows(layer, HeadTensor::queries, head, 0, queries);
      writer_.write_rows(
          layer, HeadTensor::outputs, head, 0,
          std::span<const float>(outputs).subspan(static_cast<std::size_t>(member * captured * dim_), queries.size()));
      if (trace_.attention_mass) {
        const auto sums = mass.begin() + member * trace_.prompt_tokens;
        writer_.write_attention_mass_of(layer, head, std::vector<float>(sums, sums + trace_.prompt_tokens));
      }
    }
  }

  QueryRows prepare_queries(const std::vector<QueryPlan>& plans, Index first, Index count) const {
    QueryRows rows;
    rows.first = first;
    rows.count = count;
    rows.keys = position_of(first + count - 1) + 1;
    rows.columns.resize(static_cast<std::size_t>(dim_ * kQueryBlock));
    rows.outputs.resize(rows.columns.size());
    std::fill_n(rows.maxima, kQueryBlock, -std::numeric_limits<double>::infinity());
    std::fill_n(rows.sums, kQueryBlock, 0.0);
    std::vector<float> query(static_cast<std::size_t>(dim_));
    std::vector<std::byte> stored(query.size() * size_of(trace_.dtype));
    const auto scale = static_cast<float>(info_.model.softmax_scale);
    for (Index i = 0; i < count; ++i) {
      generator_.query(plans[static_cast<std::size_t>((first + i) % group_)], position_of(first + i), query.data());
      from_float32(trace_.dtype, query, stored.data());
      to_float32(trace_.dtype, stored.data(), query);
      for (Index d = 0; d < dim_; ++d) {
        rows.columns[static_cast<std::size_t>(d * kQueryBlock + i)] = query[static_cast<std::size_t>(d)] * scale;
      }
    }
    return rows;
  }

  // Makes a block's keys, as they are stored and as they are read again.
  void make_keys(int layer, int kv_head, Index first, Index count, Workspace& work) const {
    const auto size = static_cast<std::size_t>(count * dim_);
    work.rows.resize(static_cast<std::size_t>(std::max<Index>(work.rows.size(), kBlock * dim_)));
    work.widened_keys.resize(static_cast<std::size_t>(kBlock * dim_));
    work.keys.resize(size * size_of(trace_.dtype));
    generator_.keys(layer, kv_head, first, count, work.rows.data());
    from_float32(trace_.dtype, std::span(work.rows).first(size), work.keys.data());
    to_float32(trace_.dtype, work.keys.data(), std::span(work.widened_keys).first(size));
  }

  void make_values(const ValuePlan& plan, Index first, Index count, Workspace& work) const {
    const auto size = static_cast<std::size_t>(count * dim_);
    work.widened_values.resize(static_cast<std::size_t>(kBlock * dim_));
    work.values.resize(size * size_of(trace_.dtype));
    generator_.values(plan, first, count, work.rows.data());
    from_float32(trace_.dtype, std::span(work.rows).first(size), work.values.data());
    to_float32(trace_.dtype, work.values.data(), std::span(work.widened_values).first(size));
  }

  // Logits [keys, kQueryBlock] of a block of keys from `first` on; what a query does not see is -infinity.
  void multiply_logits(const QueryRows& queries, Index first, Index keys, Workspace& work) const {
    work.logits.resize(static_cast<std::size_t>(kBlock * kQueryBlock));
    float* logits = work.logits.data();
    kernels::multiply(keys, kQueryBlock, dim_, work.widened_keys.data(), dim_, 1, queries.columns.data(), kQueryBlock,
                      logits, kQueryBlock);
    for (Index i = 0; i < queries.count && position_of(queries.first + i) < first + keys - 1; ++i) {
      for (Index j = std::max<Index>(position_of(queries.first + i) + 1 - first, 0); j < keys; ++j) {
        logits[j * kQueryBlock + i] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Attends a chunk's queries to all that they see; the first time also writes the group's keys and values.
  void attend(int layer, int kv_head, const ValuePlan& values, std::vector<QueryRows>& chunk, bool writing) {
    const Index end = writing ? info_.num_tokens() : chunk.back().keys;
    share_in_order(
        execution_, (end + kBlock - 1) / kBlock,
        [&](Index piece, int worker) {
          Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          const Index first = piece * kBlock;
          const Index count = std::min(kBlock, end - first);
          make_keys(layer, kv_head, first, count, work);
          make_values(values, first, count, work);
          work.partials.resize(std::max(work.partials.size(), chunk.size()));
          for (std::size_t i = 0; i < chunk.size(); ++i) {
            if (chunk[i].keys > first) attend_block(chunk[i], first, std::min(count, chunk[i].keys - first), work, i);
          }
        },
        [&](Index piece, int worker) {
          const Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          const Index first = piece * kBlock;
          if (writing) {
            writer_.write_rows(layer, HeadTensor::keys, kv_head, first, std::span<const std::byte>(work.keys));
            writer_.write_rows(layer, HeadTensor::values, kv_head, first, std::span<const std::byte>(work.values));
          }
          for (std::size_t i = 0; i < chunk.size(); ++i) {
            if (chunk[i].keys > first) merge(work.partials[i], chunk[i]);
          }
        });
  }

  void attend_block(const QueryRows& queries, Index first, Index keys, Workspace& work, std::size_t number) const {
    Partial& partial = work.partials[number];
    multiply_logits(queries, first, keys, work);
    std::fill_n(partial.maxima, kQueryBlock, -std::numeric_limits<float>::infinity());
    kernels::raise_maxima(keys, kQueryBlock, work.logits.data(), partial.maxima);
    std::fill_n(partial.sums, kQueryBlock, 0.0);
    partial.outputs.assign(static_cast<std::size_t>(dim_ * kQueryBlock), 0.0F);
    // A query that sees none of the keys has no largest logit; any number leaves its weights 0.
    float maxima[kQueryBlock];
    for (Index i = 0; i < kQueryBlock; ++i) maxima[i] = std::isinf(partial.maxima[i]) ? 0 : partial.maxima[i];
    for (Index start = 0; start < keys; start += kKeyBlock) {
      const Index count = std::min(kKeyBlock, keys - start);
      float* weights = work.logits.data() + start * kQueryBlock;
      kernels::exponentiate_and_sum(count, kQueryBlock, maxima, weights, partial.sums);
      kernels::add_product(dim_, kQueryBlock, count, work.widened_values.data() + start * dim_, 1, dim_, weights,
                           kQueryBlock, partial.outputs.data(), kQueryBlock);
    }
  }

  void merge(const Partial& partial, QueryRows& queries) const {
    double before[kQueryBlock];
    double added[kQueryBlock];
    for (Index i = 0; i < kQueryBlock; ++i) {
      const double largest = std::max(queries.maxima[i], static_cast<double>(partial.maxima[i]));
      // Infinities of queries that saw nothing so far, or nothing here.
      before[i] = queries.sums[i] > 0 ? std::exp(queries.maxima[i] - largest) : 0;
      added[i] = partial.sums[i] > 0 ? std::exp(static_cast<double>(partial.maxima[i]) - largest) : 0;
      queries.maxima[i] = largest;
      queries.sums[i] = queries.sums[i] * before[i] + partial.sums[i] * added[i];
    }
    for (Index d = 0; d < dim_; ++d) {
      double* sums = queries.outputs.data() + d * kQueryBlock;
      const float* more = partial.outputs.data() + d * kQueryBlock;
      for (Index i = 0; i < kQueryBlock; ++i) sums[i] = sums[i] * before[i] + static_cast<double>(more[i]) * added[i];
    }
  }

  // Puts a block's outputs where the trace has them, [H/K, Q, D].
  void keep_outputs(const QueryRows& queries, std::vector<float>& outputs) const {
    for (Index i = 0; i < queries.count; ++i) {
      const Index query = (queries.first + i) / group_ - first_captured_;
      if (query < 0) continue;
      float* out = outputs.data() + ((queries.first + i) % group_ * info_.num_queries() + query) * dim_;
      for (Index d = 0; d < dim_; ++d) {
        out[d] = static_cast<float>(queries.outputs[static_cast<std::size_t>(d * kQueryBlock + i)] / queries.sums[i]);
      }
    }
  }

  // Adds the attention that the chunk's prompt queries give to each key to `mass`, [H/K, P].
  void sum_mass(int layer, int kv_head, const std::vector<QueryRows>& chunk, std::vector<double>& mass) {
    const Index prompt = trace_.prompt_tokens;
    const Index end = std::min(chunk.back().keys, prompt);
    execution_.share((end + kBlock - 1) / kBlock, std::numeric_limits<Index>::max(), [&](Index piece, int worker) {
      Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
      const Index first = piece * kBlock;
      const Index count = std::min(kBlock, end - first);
      make_keys(layer, kv_head, first, count, work);
      for (const QueryRows& queries : chunk) {
        if (queries.keys <= first) continue;
        const Index keys = std::min(count, queries.keys - first);
        multiply_logits(queries, first, keys, work);
        float maxima[kQueryBlock];
        for (Index i = 0; i < kQueryBlock; ++i) maxima[i] = static_cast<float>(queries.maxima[i]);
        double ignored[kQueryBlock] = {};
        kernels::exponentiate_and_sum(keys, kQueryBlock, maxima, work.logits.data(), ignored);
        for (Index member = 0; member < group_; ++member) {
          float factors[kQueryBlock] = {};
          for (Index i = 0; i < queries.count; ++i) {
            const Index row = queries.first + i;
            if (row % group_ == member && position_of(row) < prompt)
              factors[i] = static_cast<float>(1 / queries.sums[i]);
          }
          kernels::add_mass(keys, kQueryBlock, work.logits.data(), factors, mass.data() + member * prompt + first);
        }
      }
    });
  }

  void write_projection(int layer) {
    const Index width = Index{trace_.num_attention_heads} * dim_;
    const Index rows = std::max<Index>(kBlock * dim_ / width, 1);
    const auto count_of = [&](Index piece) { return std::min(rows, trace_.hidden_size - piece * rows); };
    share_in_order(
        execution_, (trace_.hidden_size + rows - 1) / rows,
        [&](Index piece, int worker) {
          Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          work.rows.resize(static_cast<std::size_t>(std::max(kBlock * dim_, rows * width)));
          generator_.projection(layer, piece * rows, count_of(piece), work.rows.data());
        },
        [&](Index piece, int worker) {
          const std::span<const float> made = workspaces_[static_cast<std::size_t>(worker)].rows;
          writer_.write_output_projection_rows(layer, piece * rows,
                                               made.first(static_cast<std::size_t>(count_of(piece) * width)));
        });
  }

  SyntheticTrace trace_;
  const Execution& execution_;
  Generator generator_;
  const TraceInfo& info_;
  Index dim_;
  Index group_;
  TraceWriter writer_;
  std::vector<Workspace> workspaces_;
  std::vector<std::int32_t> attended_;  // positions of all queries that attend
  Index first_captured_ = 0;            // among them
};

}  // namespace

void write_synthetic(const SyntheticTrace& trace, const std::filesystem::path& path, const Execution& execution,
                     const std::function<void(double share)>& on_progress) {
  TraceMaker(trace, path, execution).write(on_progress);
}

}  // namespace kvreplay::tracer
