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
  Buffer queries;   // [D, kQueryBlock], scaled and packed
  Buffer logits;    // [keys, kQueryBlock]
  Buffer outputs;   // [D, kQueryBlock]
  Buffer turned;    // outputs as panels of elements
  Buffer gathered;  // [kKeyBlock, D]: rows of the cache that do not lie together

  void make_room(Index dim, Index keys) {
    if (logits.size() > 0) return;
    queries = Buffer(dim * kQueryBlock);
    outputs = Buffer(dim * kQueryBlock);
    turned = Buffer(kernels::rounded_up(dim, kernels::kPanel) * kQueryBlock);
    logits = Buffer(keys * kQueryBlock);
    gathered = Buffer(kKeyBlock * dim + KvCache::kReadAhead);
  }
};

// The rows that a query head attends to.
struct HeadView {
  const KvCache& cache;
  int layer;
  int set;
  const AttentionRule& rule;
  Index head_dim;
  Index query_width;                        // floats from one token's queries to the next's
  Index earlier;                            // rows in the cache before the new tokens
  Index rows_before;                        // of the first row in the block of keys that it lies in
  const float* queries;                     // [count, query_width], at this head
  float* outputs;                           // the same
  std::span<const std::int32_t> positions;  // of the rows

  // The first row that new token `query` sees.
  Index first_seen(Index query) const {
    const Index first_position = rule.first_visible(positions[static_cast<std::size_t>(earlier + query)]);
    if (first_position == 0) return 0;
    return std::lower_bound(positions.begin(), positions.end(), first_position) - positions.begin();
  }

  // Where the block of keys that `row` lies in begins and ends. Blocks are cut at the same rows whatever queries see,
  // so that the order of summation depends on nothing else.
  Index block_begin(Index row) const {
    return std::max<Index>(0, (row + rows_before) / kKeyBlock * kKeyBlock - rows_before);
  }
  Index block_end(Index row) const { return ((row + rows_before) / kKeyBlock + 1) * kKeyBlock - rows_before; }
};

// Attends up to kQueryBlock queries, whose logits are kept key by key, a column per query, so that every step of the
// softmax runs over whole vectors of queries.
void attend_block(const HeadView& head, Index first, Index rows, Workspace& work, double* mass) {
  const Index dim = head.head_dim;
  const auto scale = static_cast<float>(head.rule.softmax_scale);
  const float* const queries = head.queries + first * head.query_width;
  kernels::pack(DType::float32, reinterpret_cast<const std::byte*>(queries), head.query_width, rows, dim,
                work.queries.data());
  for (float& element : work.queries.part(0, dim * kQueryBlock)) element *= scale;
  // From the block of keys on that holds the first which one of the queries sees.
  const Index begin = head.block_begin(head.first_seen(first));
  const Index own = head.earlier + first;  // the first query's key
  const Index end = own + rows;
  float maxima[kQueryBlock];
  std::fill_n(maxima, kQueryBlock, -std::numeric_limits<float>::infinity());
  const auto cap = static_cast<float>(head.rule.attn_logit_softcapping);
  Index seen[kQueryBlock] = {};
  for (Index q = 0; q < rows; ++q) seen[q] = head.first_seen(first + q);
  for (Index start = begin, stop = 0; start < end; start = stop) {
    stop = std::min(head.block_end(start), end);
    float* const logits = work.logits.data() + (start - begin) * kQueryBlock;
    const float* const keys = head.cache.keys(head.layer, head.set, start, stop - start, work.gathered.data());
    kernels::multiply_packed(stop - start, kQueryBlock, dim, keys, dim, work.queries.data(), logits, kQueryBlock,
                             false);
    if (cap > 0) kernels::soft_cap((stop - start) * kQueryBlock, cap, logits);
    for (Index j = std::max(start, own + 1); j < stop; ++j) {
      std::fill_n(logits + (j - start) * kQueryBlock, j - own, -std::numeric_limits<float>::infinity());
    }
    for (Index q = 0; q < rows; ++q) {
      for (Index j = start; j < std::min(seen[q], stop); ++j) {
        logits[(j - start) * kQueryBlock + q] = -std::numeric_limits<float>::infinity();
      }
    }
    kernels::raise_maxima(stop - start, kQueryBlock, logits, maxima);
  }

  double sums[kQueryBlock] = {};
  std::fill_n(work.outputs.data(), dim * kQueryBlock, 0.0f);
  for (Index start = begin, stop = 0; start < end; start = stop) {
    stop = std::min(head.block_end(start), end);
    float* weights = work.logits.data() + (start - begin) * kQueryBlock;
    kernels::exponentiate_and_sum(stop - start, kQueryBlock, maxima, weights, sums);
    const float* const values = head.cache.values(head.layer, head.set, start, stop - start, work.gathered.data());
    kernels::add_product(dim, kQueryBlock, stop - start, values, 1, dim, weights, kQueryBlock, work.outputs.data(),
                         kQueryBlock);
  }

  float factors[kQueryBlock] = {};
  for (Index q = 0; q < rows; ++q) factors[q] = static_cast<float>(1.0 / sums[q]);
  if (mass != nullptr) kernels::add_mass(end - begin, kQueryBlock, work.logits.data(), factors, mass + begin);
  kernels::to_panels(work.outputs.data(), kQueryBlock, dim, kQueryBlock, work.turned.data());
  for (Index q = 0; q < rows; ++q) {
    float* const out = head.outputs + (first + q) * head.query_width;
    for (Index d = 0; d < dim; d += kernels::kPanel) {
      const float* const from = work.turned.data() + d * kQueryBlock + q * kernels::kPanel;
      for (Index i = 0; i < std::min(kernels::kPanel, dim - d); ++i) out[d + i] = from[i] * factors[q];
    }
  }
}

// What is done on one thread.
struct Piece {
  std::size_t sequence = 0;
  Index first_token = 0;  // of the sequence among all
  Index head = 0;         // a query head, or a set of the cache
  Index part = 0;         // of the query head's blocks of queries
};

void attend_many(const Execution& execution, const AttentionShape& shape, std::span<const NewTokens> sequences,
                 int layer, std::span<const float> queries, std::span<float> outputs, std::span<double> mass) {
  const Index dim = shape.head_dim;
  const Index query_width = shape.num_attention_heads * dim;
  const Index reach = std::max(shape.rule.sliding_window, shape.rule.attention_chunk_size);
  std::vector<Piece> pieces;
  Index work_size = 0;
  Index most_seen = 0;
  Index first_token = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const auto& [cache, count] = sequences[s];
    if (cache == nullptr) {
      first_token += count;
      continue;
    }
    Index seen = 0;
    for (int set = 0; set < cache->sets_per_layer(); ++set) seen = std::max(seen, cache->length(layer, set));
    if (reach > 0) seen = std::min(seen, reach + kQueryBlock + kKeyBlock);
    most_seen = std::max(most_seen, seen);
    work_size += count * seen * query_width;
    const Index parts = std::min(kPiecesPerHead, (count + kQueryBlock - 1) / kQueryBlock);
    for (Index head = 0; head < shape.num_attention_heads; ++head) {
      for (Index part = 0; part < parts; ++part) pieces.push_back({s, first_token, head, part});
    }
    first_token += count;
  }
  const Index mass_width = mass.empty() ? 0 : static_cast<Index>(mass.size()) / shape.num_attention_heads;
  std::vector<double> partial_mass(pieces.size() * static_cast<std::size_t>(mass_width));
  std::vector<Workspace> workspaces(static_cast<std::size_t>(execution.threads()));
  execution.share(static_cast<Index>(pieces.size()), work_size, [&](Index number, int worker) {
    const Piece& piece = pieces[static_cast<std::size_t>(number)];
    const auto& [cache, count] = sequences[piece.sequence];
    Workspace& work = workspaces[static_cast<std::size_t>(worker)];
    work.make_room(dim, most_seen);
    const int set = static_cast<int>(piece.head * cache->sets_per_layer() / shape.num_attention_heads);
    const Index first_value = piece.first_token * query_width + piece.head * dim;
    const HeadView head{.cache = *cache,
                        .layer = layer,
                        .set = set,
                        .rule = shape.rule,
                        .head_dim = dim,
                        .query_width = query_width,
                        .earlier = cache->length(layer, set) - count,
                        .rows_before = cache->rows_before(layer, set, kKeyBlock),
                        .queries = queries.data() + first_value,
                        .outputs = outputs.data() + first_value,
                        .positions = cache->positions(layer, set)};
    double* piece_mass = mass.empty() ? nullptr : partial_mass.data() + number * mass_width;
    for (Index first = piece.part * kQueryBlock; first < count; first += kPiecesPerHead * kQueryBlock) {
      attend_block(head, first, std::min(kQueryBlock, count - first), work, piece_mass);
    }
  });
  if (mass.empty()) return;
  for (std::size_t number = 0; number < pieces.size(); ++number) {
    const auto sums = mass.subspan(static_cast<std::size_t>(pieces[number].head * mass_width));
    const double* const piece_mass = partial_mass.data() + static_cast<Index>(number) * mass_width;
    for (Index j = 0; j < mass_width; ++j) sums[static_cast<std::size_t>(j)] += piece_mass[j];
  }
}

// Single tokens: bound by reading the cache, so the query heads that share rows follow each other over the same ones.
void attend_single(const Execution& execution, const AttentionShape& shape, std::span<const NewTokens> sequences,
                   int layer, std::span<const float> queries, std::span<float> outputs) {
  const Index dim = shape.head_dim;
  const Index query_width = shape.num_attention_heads * dim;
  std::vector<Piece> pieces;
  Index work_size = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    if (sequences[s].cache == nullptr) continue;
    const KvCache& cache = *sequences[s].cache;
    work_size += 2 * cache.length(layer, 0) * query_width;
    for (int set = 0; set < cache.sets_per_layer(); ++set) {
      pieces.push_back({.sequence = s, .first_token = static_cast<Index>(s), .head = set});
    }
  }
  execution.share(static_cast<Index>(pieces.size()), work_size, [&](Index number, int) {
    const Piece& piece = pieces[static_cast<std::size_t>(number)];
    const KvCache& cache = *sequences[piece.sequence].cache;
    const auto set = static_cast<int>(piece.head);
    const Index group = shape.num_attention_heads / cache.sets_per_layer();
    const auto positions = cache.positions(layer, set);
    const Index first_position = shape.rule.first_visible(positions.back());
    const Index begin = std::lower_bound(positions.begin(), positions.end(), first_position) - positions.begin();
    const Index keys = cache.length(layer, set) - begin;
    const Index first_value = piece.first_token * query_width + set * group * dim;
    std::vector<float> gathered(static_cast<std::size_t>(kKeyBlock * dim + KvCache::kReadAhead));
    std::vector<float> weights(static_cast<std::size_t>(group * keys));
    std::vector<float> query(static_cast<std::size_t>(dim));
    for (Index start = 0; start < keys; start += kKeyBlock) {
      const Index count = std::min(kKeyBlock, keys - start);
      const float* const rows = cache.keys(layer, set, begin + start, count, gathered.data());
      for (Index member = 0; member < group; ++member) {
        const float* from = queries.data() + first_value + member * dim;
        for (Index d = 0; d < dim; ++d) {
          query[static_cast<std::size_t>(d)] = from[d] * static_cast<float>(shape.rule.softmax_scale);
        }
        kernels::multiply_vector(DType::float32, reinterpret_cast<const std::byte*>(rows), count, dim, query.data(),
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
      const Index count = std::min(kKeyBlock, keys - start);
      const float* const rows = cache.values(layer, set, begin + start, count, gathered.data());
      for (Index member = 0; member < group; ++member) {
        kernels::add_product(1, width, count, weights.data() + member * keys + start, 0, 1, rows, dim,
                             sums.data() + member * width, width);
      }
    }
    for (Index member = 0; member < group; ++member) {
      std::copy_n(sums.data() + member * width, dim, outputs.data() + first_value + member * dim);
    }
  });
}

}  // namespace

void attend(const Execution& execution, const AttentionShape& shape, std::span<const NewTokens> sequences, int layer,
            std::span<const float> queries, std::span<float> outputs, std::span<double> mass, bool single_queries) {
  const bool all_single = std::ranges::all_of(sequences, [](const NewTokens& tokens) { return tokens.count == 1; });
  if (all_single && mass.empty() && single_queries) {
    attend_single(execution, shape, sequences, layer, queries, outputs);
  } else {
    attend_many(execution, shape, sequences, layer, queries, outputs, mass);
  }
}

}  // namespace kvreplay::tracer
