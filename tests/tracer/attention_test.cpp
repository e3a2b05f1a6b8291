// Attention in blocks against the plain sum over keys, in double precision.
#include "tracer/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "support/every_processor.h"

namespace kvreplay::tracer {
namespace {

std::vector<float> random_values(Index count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

struct Case {
  AttentionShape shape;
  Index earlier = 0;  // tokens in the cache before the new ones
  Index count = 0;
  std::vector<Index> kept;  // of the earlier ones, or empty for all
};

struct Outcome {
  std::vector<float> outputs;
  std::vector<double> mass;
};

KvCache filled_cache(const Case& test) {
  const AttentionShape& shape = test.shape;
  const Index tokens = test.earlier + test.count;
  KvCache cache(1, shape.num_key_value_heads, shape.head_dim, tokens);
  for (int head = 0; head < shape.num_key_value_heads; ++head) {
    const auto keys = random_values(tokens * shape.head_dim, 10 + static_cast<unsigned>(head));
    const auto values = random_values(tokens * shape.head_dim, 20 + static_cast<unsigned>(head));
    const auto append = [&](Index first, Index rows) {
      const KvCache::Rows place = cache.append(0, head, first, rows);
      std::copy_n(keys.data() + first * shape.head_dim, rows * shape.head_dim, place.keys);
      std::copy_n(values.data() + first * shape.head_dim, rows * shape.head_dim, place.values);
    };
    append(0, test.earlier);
    if (!test.kept.empty()) cache.keep(0, head, test.kept);
    append(test.earlier, test.count);
  }
  return cache;
}

// Row by row, key by key.
Outcome plain(const Case& test, const KvCache& cache, const std::vector<float>& queries) {
  const AttentionShape& shape = test.shape;
  const Index dim = shape.head_dim;
  const Index tokens = test.earlier + test.count;
  Outcome outcome;
  outcome.outputs.resize(queries.size());
  outcome.mass.resize(static_cast<std::size_t>(shape.num_attention_heads * tokens));
  for (int head = 0; head < shape.num_attention_heads; ++head) {
    const int kv_head = head / (shape.num_attention_heads / shape.num_key_value_heads);
    const auto positions = cache.positions(0, kv_head);
    for (Index query = 0; query < test.count; ++query) {
      const Index position = test.earlier + query;
      const float* q = queries.data() + (query * shape.num_attention_heads + head) * dim;
      std::vector<double> weights(positions.size());
      double total = 0;
      for (std::size_t j = 0; j < positions.size(); ++j) {
        const bool in_window = shape.rule.sliding_window == 0 || positions[j] > position - shape.rule.sliding_window;
        const Index chunk = shape.rule.attention_chunk_size;
        const bool in_chunk = chunk == 0 || positions[j] / chunk == position / chunk;
        if (positions[j] > position || !in_window || !in_chunk) continue;
        const float* k = cache.keys(0, kv_head) + static_cast<Index>(j) * dim;
        double logit = 0;
        for (Index d = 0; d < dim; ++d) logit += static_cast<double>(q[d]) * static_cast<double>(k[d]);
        logit *= shape.rule.softmax_scale;
        if (shape.rule.attn_logit_softcapping > 0)
          logit = shape.rule.attn_logit_softcapping * std::tanh(logit / shape.rule.attn_logit_softcapping);
        weights[j] = std::exp(logit);
        total += weights[j];
      }
      for (Index d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::size_t j = 0; j < positions.size(); ++j) {
          const float value = cache.values(0, kv_head)[static_cast<Index>(j) * dim + d];
          sum += weights[j] / total * static_cast<double>(value);
        }
        outcome.outputs[static_cast<std::size_t>((query * shape.num_attention_heads + head) * dim + d)] =
            static_cast<float>(sum);
      }
      for (std::size_t j = 0; j < positions.size(); ++j) {
        outcome.mass[static_cast<std::size_t>(head * tokens + positions[j])] += weights[j] / total;
      }
    }
  }
  return outcome;
}

void check(const Case& test) {
  const AttentionShape& shape = test.shape;
  SCOPED_TRACE(testing::Message() << "window " << shape.rule.sliding_window << ", chunk "
                                  << shape.rule.attention_chunk_size << ", cap " << shape.rule.attn_logit_softcapping
                                  << ", earlier " << test.earlier << ", new " << test.count << ", kept "
                                  << test.kept.size());
  const Index tokens = test.earlier + test.count;
  const KvCache cache = filled_cache(test);
  const auto queries = random_values(test.count * shape.num_attention_heads * shape.head_dim, 30);
  const Outcome expected = plain(test, cache, queries);
  const Execution execution(2);
  const NewTokens new_tokens{&cache, test.count};
  test::EveryProcessor().for_each([&] {
    std::vector<float> outputs(queries.size());
    attend(execution, shape, {&new_tokens, 1}, 0, queries, outputs, {});
    for (std::size_t i = 0; i < outputs.size(); ++i) ASSERT_NEAR(outputs[i], expected.outputs[i], 5e-6) << i;
    if (!test.kept.empty()) return;
    std::vector<double> mass(static_cast<std::size_t>(shape.num_attention_heads * tokens));
    attend(execution, shape, {&new_tokens, 1}, 0, queries, outputs, mass);
    for (std::size_t i = 0; i < mass.size(); ++i) {
      ASSERT_NEAR(mass[i], expected.mass[i], 1e-5 * (1 + expected.mass[i])) << i;
    }
  });
}

TEST(Attention, IsTheSameWhateverOtherSequencesThereAre) {
  const AttentionShape shape{4, 2, 12, {0.4, 0, 0}};
  const Index width = shape.num_attention_heads * shape.head_dim;
  for (const auto& counts : {std::vector<Index>{70, 300, 5}, {1, 1, 1}}) {
    std::vector<KvCache> caches;
    caches.reserve(counts.size());
    std::vector<NewTokens> sequences;
    Index tokens = 0;
    for (const Index count : counts) {
      caches.push_back(filled_cache({shape, 40 + 30 * tokens, count, {}}));
      sequences.push_back({&caches.back(), count});
      tokens += count;
    }
    const std::vector<float> queries = random_values(tokens * width, 30);
    std::vector<float> together(queries.size());
    attend(Execution(3), shape, sequences, 0, queries, together, {});
    std::vector<float> alone(queries.size());
    std::size_t first = 0;
    for (const NewTokens& sequence : sequences) {
      const auto values = static_cast<std::size_t>(sequence.count * width);
      attend(Execution(1), shape, {&sequence, 1}, 0, std::span(queries).subspan(first, values),
             std::span(alone).subspan(first, values), {});
      first += values;
    }
    EXPECT_EQ(together, alone);
  }
}

TEST(Attention, SeesTheLastKeysOfEveryWindow) {
  for (const int window : {0, 1, 2, 15, 16, 17, 63, 64, 65, 130, 200, 1000}) {
    check({{4, 2, 12, {0.4, 0, window}}, 0, 193, {}});
    check({{2, 2, 6, {0.4, 0, window}}, 90, 1, {}});
    check({{2, 1, 6, {0.4, 0, window}}, 77, 70, {}});
  }
}

TEST(Attention, SeesNoKeyBeforeItsChunk) {
  for (const int chunk : {1, 2, 15, 16, 64, 65, 130, 1000}) {
    for (const int window : {0, 20}) {
      check({{4, 2, 12, {.softmax_scale = 0.4, .sliding_window = window, .attention_chunk_size = chunk}}, 0, 193, {}});
      check({{2, 2, 6, {.softmax_scale = 0.4, .sliding_window = window, .attention_chunk_size = chunk}}, 90, 1, {}});
      check({{2, 1, 6, {.softmax_scale = 0.4, .sliding_window = window, .attention_chunk_size = chunk}}, 77, 70, {}});
    }
  }
}

TEST(Attention, BendsLogitsToTheirCap) {
  for (const double cap : {0.1, 1.0, 3.0, 50.0}) {
    for (const int window : {0, 20}) {
      check({{4, 2, 12, {1.5, cap, window}}, 0, 100, {}});
      check({{4, 2, 12, {1.5, cap, window}}, 60, 1, {}});
    }
  }
}

TEST(Attention, CountsWindowsInPositionsWhereRowsAreGone) {
  for (const int window : {0, 1, 5, 12, 40, 100}) {
    for (const Index count : {1, 2, 70}) {
      check({{4, 2, 8, {0.5, 0, window}}, 60, count, {0, 1, 7, 30, 31, 44, 52, 59}});
    }
  }
}

}  // namespace
}  // namespace kvreplay::tracer
