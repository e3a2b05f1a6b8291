// The forward pass on small random models against a plain one in double precision.
#include "tracer/transformer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "support/every_processor.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::ReferenceLayer;
using test::ReferenceRun;
using test::TemporaryFolder;
using test::TinyModel;
using test::TinyModelOptions;

std::vector<std::int32_t> some_ids(int count, int vocabulary) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back((i * i * 7 + i * 13 + 5) % vocabulary);
  return ids;
}

// Everything that passes an observer, position by position.
class Everything final : public ForwardObserver {
 public:
  Everything(const ModelConfig& config, bool wants_mass) : config_(config), wants_mass_(wants_mass) {}

  bool wants_attention_mass() const override { return wants_mass_; }

  void on_attention(const LayerAttention& attention, KvCache&) override {
    const auto layer = static_cast<std::size_t>(attention.layer);
    layers.resize(std::max(layers.size(), layer + 1));
    layers[layer].queries.insert(layers[layer].queries.end(), attention.queries.begin(), attention.queries.end());
    layers[layer].outputs.insert(layers[layer].outputs.end(), attention.outputs.begin(), attention.outputs.end());
    layers[layer].mass.assign(attention.attention_mass.begin(), attention.attention_mass.end());
  }

  struct Layer {
    std::vector<float> queries;
    std::vector<float> outputs;
    std::vector<double> mass;
  };
  std::vector<Layer> layers;

 private:
  const ModelConfig& config_;
  bool wants_mass_;
};

// Relative Frobenius distance, gathered value by value.
class Distance {
 public:
  void add(double value, double expected) {
    difference_ += (value - expected) * (value - expected);
    size_ += expected * expected;
  }
  double relative() const { return std::sqrt(difference_ / size_); }

 private:
  double difference_ = 0;
  double size_ = 0;
};

constexpr double kTolerance = 1e-5;

void expect_equal(const ModelConfig& config, const ReferenceRun& reference, const Everything& run, const KvCache& cache,
                  std::span<const float> logits) {
  const auto dim = static_cast<std::size_t>(config.head_dim);
  const auto heads = static_cast<std::size_t>(config.num_attention_heads);
  for (std::size_t l = 0; l < reference.layers.size(); ++l) {
    const ReferenceLayer& expected = reference.layers[l];
    const std::size_t positions = expected.queries[0].size();
    Distance queries, outputs, keys, values, mass;
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t t = 0; t < positions; ++t) {
        for (std::size_t d = 0; d < dim; ++d) {
          const std::size_t at = (t * heads + h) * dim + d;
          queries.add(run.layers[l].queries.at(at), expected.queries[h][t][d]);
          outputs.add(run.layers[l].outputs.at(at), expected.outputs[h][t][d]);
        }
        if (!run.layers[l].mass.empty()) mass.add(run.layers[l].mass.at(h * positions + t), expected.mass[h][t]);
      }
    }
    for (std::size_t h = 0; h < expected.keys.size(); ++h) {
      const int head = static_cast<int>(h);
      ASSERT_EQ(cache.length(static_cast<int>(l), head), static_cast<Index>(positions));
      for (std::size_t t = 0; t < positions; ++t) {
        for (std::size_t d = 0; d < dim; ++d) {
          keys.add(cache.keys(static_cast<int>(l), head)[t * dim + d], expected.keys[h][t][d]);
          values.add(cache.values(static_cast<int>(l), head)[t * dim + d], expected.values[h][t][d]);
        }
      }
    }
    EXPECT_LT(queries.relative(), kTolerance) << "layer " << l;
    EXPECT_LT(outputs.relative(), kTolerance) << "layer " << l;
    EXPECT_LT(keys.relative(), kTolerance) << "layer " << l;
    EXPECT_LT(values.relative(), kTolerance) << "layer " << l;
    if (!run.layers[l].mass.empty()) {
      EXPECT_LT(mass.relative(), kTolerance) << "layer " << l;
    }
  }
  Distance distance;
  ASSERT_EQ(logits.size(), reference.logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) distance.add(logits[i], reference.logits[i]);
  EXPECT_LT(distance.relative(), kTolerance);
}

// Runs `ids` in passes of the given sizes and compares everything with the reference.
void check(const TinyModelOptions& options, std::span<const std::int32_t> ids, std::initializer_list<int> passes,
           const Transformer::Options& execution) {
  const TemporaryFolder folder;
  const TinyModel tiny(options);
  tiny.write(folder.path());
  const Model model(folder.path());
  Transformer transformer(model, execution);
  KvCache cache(model.config.num_layers, model.config.num_key_value_heads, model.config.head_dim,
                static_cast<Index>(ids.size()));
  Everything run(model.config, passes.size() == 1);
  std::vector<float> logits;
  std::size_t done = 0;
  for (const int count : passes) {
    logits = transformer.forward(ids.subspan(done, static_cast<std::size_t>(count)), cache, &run);
    done += static_cast<std::size_t>(count);
  }
  ASSERT_EQ(done, ids.size());
  EXPECT_EQ(cache.next_position(), static_cast<Index>(ids.size()));
  expect_equal(model.config, tiny.run(ids), run, cache, logits);
}

struct Variant {
  const char* name;
  TinyModelOptions options;
};

std::vector<Variant> variants() {
  std::vector<Variant> all;
  const auto add = [&](const char* name, auto change) {
    TinyModelOptions options;
    options.seed = static_cast<unsigned>(all.size() + 1);
    change(options);
    all.push_back({name, options});
  };
  add("MultiHead", [](TinyModelOptions&) {});
  add("GroupsOfEight", [](TinyModelOptions& o) { o.hidden = 64, o.heads = 8, o.kv_heads = 1; });
  add("GroupsOfTwo", [](TinyModelOptions& o) { o.hidden = 64, o.heads = 4, o.kv_heads = 2; });
  add("OneHead", [](TinyModelOptions& o) { o.hidden = 34, o.heads = 1, o.kv_heads = 1, o.intermediate = 51; });
  add("OneLayer", [](TinyModelOptions& o) { o.layers = 1; });
  add("Biases", [](TinyModelOptions& o) { o.attention_bias = o.mlp_bias = true, o.kv_heads = 2; });
  add("TiedEmbeddings", [](TinyModelOptions& o) { o.tied = true; });
  add("WideHeads", [](TinyModelOptions& o) { o.head_dim = 40, o.kv_heads = 2; });
  add("NarrowHeads", [](TinyModelOptions& o) { o.head_dim = 2; });
  add("LongerThanABlockOfWeights", [](TinyModelOptions& o) { o.layers = 1, o.hidden = 520, o.intermediate = 1030; });
  add("Llama3Rope", [](TinyModelOptions& o) {
    o.head_dim = 32;
    o.rope_scaling = {{"rope_type", "llama3"},
                      {"factor", 8.0},
                      {"low_freq_factor", 1.0},
                      {"high_freq_factor", 4.0},
                      {"original_max_position_embeddings", 512}};
  });
  add("LinearRope", [](TinyModelOptions& o) { o.rope_scaling = {{"type", "linear"}, {"factor", 2.5}}; });
  add("Float16", [](TinyModelOptions& o) { o.dtype = DType::float16, o.attention_bias = true; });
  add("BFloat16", [](TinyModelOptions& o) { o.dtype = DType::bfloat16, o.kv_heads = 2; });
  return all;
}

class EveryVariant : public testing::TestWithParam<Variant> {};

TEST_P(EveryVariant, ComputesWhatThePlainForwardPassDoes) {
  const auto& options = GetParam().options;
  check(options, some_ids(150, options.vocabulary), {150}, {});
}

TEST_P(EveryVariant, ContinuesFromItsCache) {
  const auto& options = GetParam().options;
  check(options, some_ids(82, options.vocabulary), {70, 1, 9, 1, 1}, {});
}

INSTANTIATE_TEST_SUITE_P(Each, EveryVariant, testing::ValuesIn(variants()),
                         [](const auto& variant) { return std::string(variant.param.name); });

TEST(Transformer, RunsPromptsOfEveryLengthAroundItsBlocks) {
  TinyModelOptions options;
  options.kv_heads = 2;
  for (const int length : {1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 257}) {
    SCOPED_TRACE(length);
    check(options, some_ids(length, options.vocabulary), {length}, {});
  }
}

TEST(Transformer, RunsWithEveryInstructionSet) {
  TinyModelOptions options;
  options.kv_heads = 2;
  options.dtype = DType::bfloat16;
  test::EveryProcessor().for_each([&] {
    check(options, some_ids(131, options.vocabulary), {130, 1}, {});
    check(options, some_ids(131, options.vocabulary), {131}, {});
  });
}

TEST(Transformer, GivesTheSameBitsForAnyThreadsAndBlocks) {
  const TemporaryFolder folder;
  TinyModelOptions options;
  options.heads = 8;
  options.hidden = 64;
  options.kv_heads = 2;
  TinyModel(options).write(folder.path());
  const Model model(folder.path());
  const auto ids = some_ids(300, options.vocabulary);
  const auto run = [&](int threads, Index block) {
    Transformer transformer(model, {.threads = threads, .block_tokens = block});
    KvCache cache(2, 2, 8, 300);
    Everything everything(model.config, true);
    std::vector<double> result;
    for (const float logit : transformer.forward({ids.data(), 299}, cache, &everything)) result.push_back(logit);
    for (const auto& layer : everything.layers) {
      result.insert(result.end(), layer.queries.begin(), layer.queries.end());
      result.insert(result.end(), layer.outputs.begin(), layer.outputs.end());
      result.insert(result.end(), layer.mass.begin(), layer.mass.end());
    }
    for (const float logit : transformer.forward({ids.data() + 299, 1}, cache)) result.push_back(logit);
    return result;
  };
  const auto expected = run(1, 1024);
  EXPECT_EQ(run(2, 1024), expected);
  EXPECT_EQ(run(5, 1024), expected);
  EXPECT_EQ(run(2, 64), expected);
  EXPECT_EQ(run(3, 37), expected);
}

TEST(Transformer, SumsTheAttentionOfAllQueries) {
  const TemporaryFolder folder;
  TinyModel({}).write(folder.path());
  const Model model(folder.path());
  Transformer transformer(model, {});
  KvCache cache(2, 4, 12, 200);
  Everything run(model.config, true);
  transformer.forward(some_ids(200, 97), cache, &run);
  for (const auto& layer : run.layers) {
    for (std::size_t head = 0; head < 4; ++head) {
      const auto begin = layer.mass.begin() + static_cast<std::ptrdiff_t>(head * 200);
      EXPECT_NEAR(std::accumulate(begin, begin + 200, 0.0), 200, 1e-4);
    }
  }
}

TEST(Transformer, ReportsProgressThatGrows) {
  class Progress final : public ForwardObserver {
   public:
    void on_attention(const LayerAttention&, KvCache&) override {}
    void on_progress(double fraction) override { fractions.push_back(fraction); }
    std::vector<double> fractions;
  };
  const TemporaryFolder folder;
  TinyModel({}).write(folder.path());
  const Model model(folder.path());
  Transformer transformer(model, {.block_tokens = 16});
  KvCache cache(2, 4, 12, 50);
  Progress progress;
  transformer.forward(some_ids(50, 97), cache, &progress);
  EXPECT_TRUE(std::is_sorted(progress.fractions.begin(), progress.fractions.end()));
  EXPECT_DOUBLE_EQ(progress.fractions.back(), 1);
}

TEST(Transformer, NamesWhereNumbersEnd) {
  const auto complaint = [](const std::string& tensor, std::size_t index, double value) {
    const TemporaryFolder folder;
    TinyModelOptions options;
    options.kv_heads = 2;
    TinyModel tiny(options);
    tiny.set_weight(tensor, index, value);
    tiny.write(folder.path());
    const Model model(folder.path());
    Transformer transformer(model, {});
    KvCache cache(2, 2, 12, 40);
    return message_of<Error>([&] { transformer.forward(some_ids(40, 97), cache); });
  };
  const double nan = std::nan("");
  const double infinity = std::numeric_limits<double>::infinity();
  // Row 17 of a projection is dimension 5 of head 1.
  EXPECT_EQ(complaint("model.layers.1.self_attn.k_proj.weight", 17 * 48, nan),
            "the model computed NaN in the keys of layer 1, KV head 1, position 0: its weights or its config.json are "
            "damaged");
  EXPECT_NE(complaint("model.layers.0.self_attn.q_proj.weight", 30 * 48, nan).find("queries of layer 0, query head 2"),
            std::string::npos);
  EXPECT_NE(complaint("model.layers.0.self_attn.v_proj.weight", 1, infinity).find("infinity in the values of layer 0"),
            std::string::npos);
  EXPECT_NE(complaint("model.layers.0.mlp.up_proj.weight", 5, nan).find("queries of layer 1, query head 0, position 0"),
            std::string::npos);
  EXPECT_NE(complaint("model.layers.1.mlp.up_proj.weight", 5, nan).find("logits after position 39"), std::string::npos);
  // some_ids gives id 5 at position 0 and id 25 at position 1.
  EXPECT_NE(complaint("model.embed_tokens.weight", 25 * 48, nan).find("layer 0, query head 0, position 1:"),
            std::string::npos);
}

TEST(Transformer, TakesTheLowestOfEquallyLikelyTokens) {
  EXPECT_EQ(most_likely(std::vector<float>{1, 3, 3, 2}), 1);
  EXPECT_EQ(most_likely(std::vector<float>{-1}), 0);
}

// Keeps in each head what a cache policy might: the first row and the last ones, more of them in later heads.
class Evicting final : public ForwardObserver {
 public:
  void on_attention(const LayerAttention& attention, KvCache& cache) override {
    for (int head = 0; head < 2; ++head) {
      const Index length = cache.length(attention.layer, head);
      std::vector<Index> rows = {0};
      for (Index row = length - 4 - 3 * head; row < length; ++row) rows.push_back(row);
      cache.keep(attention.layer, head, rows);
    }
  }
};

TEST(Transformer, AttendsToWhatAnObserverLeavesInTheCache) {
  const TemporaryFolder folder;
  TinyModelOptions options;
  options.layers = 1;
  options.kv_heads = 2;
  TinyModel tiny(options);
  tiny.write(folder.path());
  const Model model(folder.path());
  Transformer transformer(model, {});
  const auto ids = some_ids(21, 97);
  const ReferenceLayer whole = tiny.run(ids).layers[0];
  for (const bool one_by_one : {true, false}) {
    KvCache cache(1, 2, 12, 22);
    Evicting evicting;
    transformer.forward({ids.data(), 20}, cache, &evicting);
    EXPECT_EQ(cache.length(0, 0), 5);
    EXPECT_EQ(cache.length(0, 1), 8);
    Everything after(model.config, false);
    // A second token makes the pass a prefill, of which the first must see the same.
    const std::vector<std::int32_t> next = one_by_one ? std::vector{ids[20]} : std::vector{ids[20], ids[20]};
    transformer.forward(next, cache, &after);
    for (std::size_t h = 0; h < 4; ++h) {
      const std::size_t kv = h / 2;
      double total = 0;
      std::vector<double> expected(12);
      for (std::size_t n = 0; n <= 20; ++n) {
        if (n > 0 && n < 16 - 3 * kv) continue;
        double product = 0;
        for (std::size_t d = 0; d < 12; ++d) product += whole.queries[h][20][d] * whole.keys[kv][n][d];
        const double weight = std::exp(product / std::sqrt(12.0));
        total += weight;
        for (std::size_t d = 0; d < 12; ++d) expected[d] += weight * whole.values[kv][n][d];
      }
      for (std::size_t d = 0; d < 12; ++d) {
        EXPECT_NEAR(after.layers[0].outputs[h * 12 + d], expected[d] / total, 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace kvreplay::tracer
