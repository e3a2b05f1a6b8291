#include "tracer/attention.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "base/buffer.h"
#include "kernels/inference.h"
#include "kernels/kernels.h"

namespace kvreplay::tracer {

namespace {

// Queries that are attended together.
constexpr Index kQueryBlock = kernels::kPanel;

// Keys whose weights (64 per key) stay in the first-level cache between the softmax and the sum over values.
constexpr Index kKeyBlock = 128;

// Each query head's blocks of queries are dealt out to this many pieces of work, which sum their attention mass apart
// from each other. The number is fixed, so that the order of summation is.
constexpr Index kPiecesPerHead = 4;

// A thread's working memory.
struct Workspace {
  Buffer queries;  // [D, kQueryBlock], scaled
  Buffer logits;   // [keys, kQueryBlock]
  Buffer outputs;  // [D, kQueryBlock]
};

struct HeadView {
  Index head_dim;
  Index query_width;                        // floats from one token's queries to the next's
  Index earlier;                            // keys in the cache before the new tokens
  std::span<const std::int32_t> positions;  // of the keys
  const AttentionRule* rule;
  const float* keys;     // [keys, D]
  const float* values;   // [keys, D]
  const float* queries;  // [count, query_width], at this head
  float* outputs;        // the same
  float scale;

  // The first key that new token `query` sees.
  Index first_seen(Index query) const {
    const Index first_position = rule->first_visible(positions[static_cast<std::size_t>(earlier + query)]);
    if (first_position == 0) return 0;
    return std::lower_bound(positions.begin(), positions.end(), first_position) - positions.begin();
  }
};

// Attends up to kQueryBlock queries, whose logits are kept key by key, a column per query, so that every step of the
// softmax runs over whole vectors of queries.
void attend_block(const HeadView& head, Index first, Index rows, Workspace& work, double* mass) {
  const Index dim = head.head_dim;
  for (Index d = 0; d < dim; ++d) {
    float* column = work.queries.data() + d * kQueryBlock;
    for (Index q = 0; q < rows; ++q) column[q] = head.queries[(first + q) * head.query_width + d] * head.scale;
    for (Index q = rows; q < kQueryBlock; ++q) column[q] = 0;
  }
  // Keys are counted from the first that one of the queries sees.
  const Index begin = head.first_seen(first);
  const Index own = head.earlier + first - begin;  // the first query's key
  const Index keys = own + rows;
  float maxima[kQueryBlock];
  std::fill_n(maxima, kQueryBlock, -std::numeric_limits<float>::infinity());
  const auto cap = static_cast<float>(head.rule->attn_logit_softcapping);
  Index seen[kQueryBlock] = {};
  for (Index q = 0; q < rows; ++q) seen[q] = head.first_seen(first + q) - begin;
  for (Index start = 0; start < keys; start += kKeyBlock) {
    const Index end = std::min(start + kKeyBlock, keys);
    float* const logits = work.logits.data() + start * kQueryBlock;
    kernels::multiply(end - start, kQueryBlock, dim, head.keys + (begin + start) * dim, dim, 1, work.queries.data(),
                      kQueryBlock, logits, kQueryBlock);
    if (cap > 0) kernels::soft_cap((end - start) * kQueryBlock, cap, logits);
    for (Index j = std::max(start, own + 1); j < end; ++j) {
      std::fill_n(logits + (j - start) * kQueryBlock, j - own, -std::numeric_limits<float>::infinity());
    }
    for (Index q = 0; q < rows; ++q) {
      for (Index j = start; j < std::min(seen[q], end); ++j) {
        logits[(j - start) * kQueryBlock + q] = -std::numeric_limits<float>::infinity();
      }
    }
    kernels::raise_maxima(end - start, kQueryBlock, logits, maxima);
  }

  double sums[kQueryBlock] = {};
  std::fill_n(work.outputs.data(), dim * kQueryBlock, 0.0f);
  for (Index start = 0; start < keys; start += kKeyBlock) {
    const Index count = std::min(kKeyBlock, keys - start);
    float* weights = work.logits.data() + start * kQueryBlock;
    kernels::exponentiate_and_sum(count, kQueryBlock, maxima, weights, sums);
    kernels::add_product(dim, kQueryBlock, count, head.values + (begin + start) * dim, 1, dim, weights, kQueryBlock,
                         work.outputs.data(), kQueryBlock);
  }

  float factors[kQueryBlock] = {};
  for (Index q = 0; q < rows; ++q) factors[q] = static_cast<float>(1.0 / sums[q]);
  if (mass != nullptr) kernels::add_mass(keys, kQueryBlock, work.logits.data(), factors, mass + begin);
  for (Index q = 0; q < rows; ++q) {
    float* out = head.outputs + (first + q) * head.query_width;
    for (Index d = 0; d < dim; ++d) out[d] = work.outputs.data()[d * kQueryBlock + q] * factors[q];
  }
}

void attend_many(const Execution& execution, const AttentionShape& shape, const KvCache& cache, int layer,
                 std::span<const float> queries, Index count, std::span<float> outputs, std::span<double> mass) {
  const Index dim = shape.head_dim;
  const Index group = shape.num_attention_heads / shape.num_key_value_heads;
  const Index query_width = shape.num_attention_heads * dim;

  Index longest = 0;
  for (int kv_head = 0; kv_head < shape.num_key_value_heads; ++kv_head) {
    longest = std::max(longest, cache.length(layer, kv_head));
  }

  const Index reach = std::max(shape.rule.sliding_window, shape.rule.attention_chunk_size);
  const Index seen = reach > 0 ? std::min(longest, reach + kQueryBlock) : longest;
  const Index blocks = (count + kQueryBlock - 1) / kQueryBlock;
  const Index pieces = shape.num_attention_heads * kPiecesPerHead;
  const Index mass_width = mass.empty() ? 0 : static_cast<Index>(mass.size()) / shape.num_attention_heads;
  std::vector<double> partial_mass(static_cast<std::size_t>(pieces * mass_width));
  std::vector<Workspace> workspaces(static_cast<std::size_t>(execution.threads()));
  execution.share(pieces, count * seen * query_width, [&](Index piece, int worker) {
    Workspace& work = workspaces[static_cast<std::size_t>(worker)];
    if (work.logits.size() == 0) {
      work.queries = Buffer(dim * kQueryBlock);
      work.outputs = Buffer(dim * kQueryBlock);
      work.logits = Buffer(seen * kQueryBlock);
    }
    const Index query_head = piece / kPiecesPerHead;
    const int kv_head = static_cast<int>(query_head / group);
    HeadView head;
    head.head_dim = dim;
    head.query_width = query_width;
    head.earlier = cache.length(layer, kv_head) - count;
    head.positions = cache.positions(layer, kv_head);
    head.rule = &shape.rule;
    head.keys = cache.keys(layer, kv_head);
    head.values = cache.values(layer, kv_head);
    head.queries = queries.data() + query_head * dim;
    head.outputs = outputs.data() + query_head * dim;
    head.scale = static_cast<float>(shape.rule.softmax_scale);
    double* piece_mass = mass.empty() ? nullptr : partial_mass.data() + piece * mass_width;
    for (Index block = piece % kPiecesPerHead; block < blocks; block += kPiecesPerHead) {
      const Index first = block * kQueryBlock;
      attend_block(head, first, std::min(kQueryBlock, count - first), work, piece_mass);
    }
  });
  for (Index piece = 0; piece < pieces && !mass.empty(); ++piece) {
    for (Index j = 0; j < mass_width; ++j) {
      mass[static_cast<std::size_t>(piece / kPiecesPerHead * mass_width + j)] +=
          partial_mass[static_cast<std::size_t>(piece * mass_width + j)];
    }
  }
}

// A single token: bound by reading the cache, so the query heads of a group follow each other over the same rows.
void attend_one(const Execution& execution, const AttentionShape& shape, const KvCache& cache, int layer,
                std::span<const float> queries, std::span<float> outputs) {
  const Index dim = shape.head_dim;
  const Index group = shape.num_attention_heads / shape.num_key_value_heads;
  const Index work_size = 2 * cache.length(layer, 0) * dim * shape.num_attention_heads;
  execution.share(shape.num_key_value_heads, work_size, [&](Index piece, int) {
    const int kv_head = static_cast<int>(piece);
    const auto positions = cache.positions(layer, kv_head);
    const Index first_position = shape.rule.first_visible(positions.back());
    const Index begin = std::lower_bound(positions.begin(), positions.end(), first_position) - positions.begin();
    const Index keys = cache.length(layer, kv_head) - begin;
    const float* head_keys = cache.keys(layer, kv_head) + begin * dim;
    const float* head_values = cache.values(layer, kv_head) + begin * dim;
    const Index first_head = kv_head * group;
    std::vector<float> weights(static_cast<std::size_t>(group * keys));
    std::vector<float> query(static_cast<std::size_t>(dim));
    for (Index start = 0; start < keys; start += kKeyBlock) {
      for (Index member = 0; member < group; ++member) {
        const float* from = queries.data() + (first_head + member) * dim;
        for (Index d = 0; d < dim; ++d) {
          query[static_cast<std::size_t>(d)] = from[d] * static_cast<float>(shape.rule.softmax_scale);
        }
        kernels::multiply_vector(DType::float32, reinterpret_cast<const std::byte*>(head_keys + start * dim),
                                 std::min(kKeyBlock, keys - start), dim, query.data(),
                                 weights.data() + member * keys + start);
      }
    }
    const auto cap = static_cast<float>(shape.rule.attn_logit_softcapping);
    if (cap > 0) kernels::soft_cap(group * keys, cap, weights.data());
    for (Index member = 0; member < group; ++member) kernels::softmax(keys, weights.data() + member * keys);
    // Whole vectors, which reach beyond the last value.
    const Index width = kernels::rounded_up(dim, kernels::kLanes);
    std::vector<float> sums(static_cast<std::size_t>(group * width));
    for (Index start = 0; start < keys; start += kKeyBlock) {
      for (Index member = 0; member < group; ++member) {
        kernels::add_product(1, width, std::min(kKeyBlock, keys - start), weights.data() + member * keys + start, 0, 1,
                             head_values + start * dim, dim, sums.data() + member * width, width);
      }
    }
    for (Index member = 0; member < group; ++member) {
      std::copy_n(sums.data() + member * width, dim, outputs.data() + (first_head + member) * dim);
    }
  });
}

}  // namespace

void attend(const Execution& execution, const AttentionShape& shape, const KvCache& cache, int layer,
            std::span<const float> queries, Index count, std::span<float> outputs, std::span<double> mass) {
  if (count == 1 && mass.empty()) {
    attend_one(execution, shape, cache, layer, queries, outputs);
  } else {
    attend_many(execution, shape, cache, layer, queries, count, outputs, mass);
  }
}

}  // namespace kvreplay::tracer
