// The engine's measures against their definitions in double precision, and the same bits however the work is divided.
#include "replay/engine.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <span>

#include "base/buffer.h"
#include "base/error.h"
#include "hdf5/hdf5.h"
#include "replay/definitions.h"
#include "replay/layer_projection.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

// Policies that look at all that a head has to tell, with windows of several sizes.
std::vector<std::string> policies() {
  return {"full",
          "streamingllm(sinks=2)",
          "h2o(window=4)",
          "tova",
          "snapkv(window=4,kernel=3)",
          "snapkv(window=8,kernel=3)+adakv",
          "restkv(window=4,beta=3)",
          "restkv(window=7,projection=false,temporal=last,spatial=none)",
          "attention(window=5,values=true,temporal=ema,spatial=adaptive,beta=2)",
          "keydiff",
          "caote(window=3)",
          "criticalkv(base=snapkv(window=4))"};
}

// Policies at capacities, and how their scores agree with the oracle's importance.
ReplayRequest everything(const std::vector<std::string>& specs, const std::vector<std::string>& capacities) {
  ReplayRequest request = make_request(specs, capacities);
  request.rank_agreement = true;
  return request;
}

// Sets the number of OpenMP's threads for a while.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

using Results = std::map<std::pair<int, int>, std::vector<LayerResult>>;

Results run(const ReplayEngine& engine, std::vector<ReplayUnit> units) {
  Results results;
  std::size_t next = 0;
  engine.run(units, [&](const ReplayUnit& unit, std::vector<LayerResult> found) {
    EXPECT_EQ(unit, units.at(next++)) << "in their order";
    results[{unit.replay, unit.layer}] = std::move(found);
  });
  EXPECT_EQ(next, units.size());
  return results;
}

Results run(const ReplayEngine& engine) { return run(engine, engine.units()); }

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits(values.size());
  std::ranges::transform(values, bits.begin(), [](float value) { return std::bit_cast<std::uint32_t>(value); });
  return bits;
}

void expect_same(const LayerResult& a, const LayerResult& b) {
  EXPECT_EQ(a.kept, b.kept);
  for (const MeasureTraits& measure : measures()) {
    EXPECT_EQ(bits_of(a.measures[measure.measure]), bits_of(b.measures[measure.measure])) << measure.name;
  }
}

void expect_same(const Results& a, const Results& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [unit, results] : a) {
    const std::vector<LayerResult>& others = b.at(unit);
    ASSERT_EQ(results.size(), others.size());
    for (std::size_t i = 0; i < results.size(); ++i) {
      SCOPED_TRACE(fmt::format("outline {}, layer {}, setting {}", unit.first, unit.second, i));
      expect_same(results[i], others[i]);
    }
  }
}

// ---- The definitions
// ---------------------------------------------------------------------------------------------------

void expect_near(const std::vector<float>& found, const std::vector<double>& expected, const char* what) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    ASSERT_NEAR(found[i], expected[i], 1e-5 * std::max(1.0, expected[i])) << what << " " << i;
  }
}

void expect_defined(const ReplayEngine& engine, const Results& results, const RandomTrace& shape,
                    const RandomTrace::Tensors& tensors) {
  for (const auto& [unit, settings] : results) {
    const TraceReplay& outline = engine.outlines()[static_cast<std::size_t>(unit.first)];
    for (std::size_t i = 0; i < settings.size(); ++i) {
      const LayerResult& found = settings[i];
      SCOPED_TRACE(fmt::format("layer {}, {} at {}, evicted at {}", unit.second, outline.results[i].policy,
                               outline.results[i].capacity, outline.eviction_position));
      const int group = shape.num_attention_heads / shape.num_key_value_heads;
      const bool per_query_head = static_cast<int>(found.kept.size()) == shape.num_attention_heads;
      const auto cached = [&](int head, int position) {
        const std::span<const int> kept =
            found.kept[static_cast<std::size_t>(per_query_head ? head : head / group)].kept();
        std::vector<int> positions(kept.begin(), kept.end());
        for (int n = outline.eviction_position; n <= position; ++n) positions.push_back(n);
        return positions;
      };
      const test::DefinedMeasures expected =
          test::by_definition(shape, tensors, unit.second, outline.eviction().evaluate_from, cached);
      expect_near(found.measures[Measure::head_error], expected.head_error, "head error");
      expect_near(found.measures[Measure::layer_error], expected.layer_error, "layer error");
      expect_near(found.measures[Measure::attention_recall], expected.attention_recall, "attention recall");
      expect_near(found.measures[Measure::cosine], expected.cosine, "cosine");
      if (shape.residual_norms) {
        expect_near(found.measures[Measure::residual_error], expected.residual_error, "residual error");
      }
    }
  }
}

// Writes tensors that a test has changed.
void write(const std::filesystem::path& path, const RandomTrace& shape, const RandomTrace::Tensors& tensors) {
  TraceWriter writer(path, shape.info(), shape.type);
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    writer.write(layer, HeadTensor::keys, tensors.keys[l]);
    writer.write(layer, HeadTensor::values, tensors.values[l]);
    writer.write(layer, HeadTensor::queries, tensors.queries[l]);
    writer.write(layer, HeadTensor::outputs, tensors.outputs[l]);
    if (shape.output_projection) writer.write_output_projection(layer, tensors.projection[l]);
    if (shape.attention_mass) writer.write_attention_mass(layer, tensors.mass[l]);
  }
  writer.finish();
}

struct Shape {
  const char* name;
  RandomTrace trace;
};

class EngineOn : public testing::TestWithParam<Shape> {
 protected:
  EngineOn() { GetParam().trace.write(folder_ / "t.h5"); }

  TraceReader reader() const { return TraceReader(folder_ / "t.h5"); }

  TemporaryFolder folder_;
};

TEST_P(EngineOn, MeasuresFollowTheirDefinitions) {
  const TraceReader trace = reader();
  const RandomTrace::Tensors tensors = GetParam().trace.tensors();
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    std::vector<std::string> specs = policies();
    if (granularity == Granularity::layer) std::erase(specs, "snapkv(window=8,kernel=3)+adakv");
    ReplayRequest asked = make_request(specs, {"9", "40%"}, granularity);
    if (granularity == Granularity::kv) {
      const int prompt = trace.info().prompt_length;
      asked.eviction_positions = {prompt - 5, prompt};
    }
    const ReplayEngine engine(std::span(&trace, 1), asked);
    expect_defined(engine, run(engine), GetParam().trace, tensors);
    if (HasFatalFailure()) return;
  }
}

TEST_P(EngineOn, SelectAndRunKeepTheSameSets) {
  const TraceReader trace = reader();
  const ReplayEngine engine(std::span(&trace, 1), make_request(policies(), {"9", "40%"}));
  const Results results = run(engine);
  std::vector<ReplayUnit> units = engine.units();
  std::ranges::reverse(units);
  std::size_t next = 0;
  engine.decide(units, [&](const ReplayUnit& unit, const std::vector<LayerResidencies>& sets) {
    EXPECT_EQ(unit, units.at(next++));
    const std::vector<LayerResult>& measured = results.at({unit.replay, unit.layer});
    ASSERT_EQ(sets.size(), measured.size());
    for (std::size_t i = 0; i < sets.size(); ++i) {
      EXPECT_EQ(sets[i], measured[i].kept) << i;
    }
  });
  EXPECT_EQ(next, units.size());
}

TEST_P(EngineOn, TheSameBitsHoweverTheWorkIsDivided) {
  const TraceReader trace = reader();
  const ReplayRequest asked = everything(policies(), {"9", "40%"});
  Results expected;
  {
    const Threads one(1);
    expected = run(ReplayEngine(std::span(&trace, 1), asked));
  }
  for (const int count : {2, 3, 8}) {
    SCOPED_TRACE(fmt::format("{} threads", count));
    const Threads threads(count);
    const ReplayEngine engine(std::span(&trace, 1), asked);
    expect_same(run(engine), expected);
    std::vector<ReplayUnit> units = engine.units();
    std::ranges::reverse(units);
    expect_same(run(engine, units), expected);
    if (count != 3) continue;
    Results alone;
    for (const ReplayUnit& unit : units) alone.merge(run(engine, {unit}));
    expect_same(alone, expected);
  }
}

// The fewest bytes that the engine accepts.
Index least_memory(ReplayEngine& engine) {
  Index too_few = 0;
  Index enough = Index{1} << 40;
  while (enough - too_few > 1) {
    const Index middle = too_few + (enough - too_few) / 2;
    try {
      engine.limit_memory(middle);
      enough = middle;
    } catch (const Error&) {
      too_few = middle;
    }
  }
  return enough;
}

TEST_P(EngineOn, TheSameBitsInAnyMemory) {
  const TraceReader trace = reader();
  const ReplayRequest asked = everything(policies(), {"9", "40%"});
  const Results expected = run(ReplayEngine(std::span(&trace, 1), asked));
  for (const int count : {1, 3}) {
    const Threads threads(count);
    ReplayEngine engine(std::span(&trace, 1), asked);
    const Index unlimited = engine.memory();
    const Index least = least_memory(engine);
    EXPECT_LT(least, unlimited);
    for (const Index limit : {least, least + least / 3, 4 * least}) {
      SCOPED_TRACE(fmt::format("{} threads, {} of {} bytes", count, limit, unlimited));
      engine.limit_memory(limit);
      EXPECT_LE(engine.memory(), limit);
      expect_same(run(engine), expected);
    }
    // It says what it takes, and takes what it says.
    engine.limit_memory(least);
    const std::string message = message_of<Error>([&] { engine.limit_memory(least - 1); });
    double size = 0;
    char unit = 0;
    const std::size_t named = message.find("takes ");
    ASSERT_NE(named, std::string::npos) << message;
    ASSERT_EQ(std::sscanf(message.c_str() + named, "takes %lf %ciB", &size, &unit), 2) << message;
    ASSERT_TRUE(unit == 'K' || unit == 'M') << message;
    const auto bytes = static_cast<Index>(size * (unit == 'K' ? 1024 : 1048576));
    EXPECT_NO_THROW(engine.limit_memory(bytes)) << message;
    EXPECT_LE(bytes, least + std::max(least / 10, Index{1024})) << message;
    EXPECT_GT(engine.memory(), 0);
  }
  Buffer::keep_at_most(Index{256} << 20);
}

TEST_P(EngineOn, TheSameBitsInAnyCompany) {
  const TraceReader trace = reader();
  const std::vector<std::string> specs = policies();
  const ReplayEngine together(std::span(&trace, 1), everything(specs, {"9", "12"}));
  const Results all = run(together);
  // Backwards, and some of them twice.
  std::vector<std::string> others(specs.rbegin(), specs.rend());
  others.push_back(specs[4]);
  others.push_back(specs[6]);
  const ReplayEngine twice(std::span(&trace, 1), everything(others, {"12"}));
  const std::vector<ReplayResult>& outline = together.outlines()[0].results;
  const std::vector<ReplayResult>& other_outline = twice.outlines()[0].results;
  EXPECT_EQ(other_outline.size(), others.size());
  for (const auto& [unit, results] : run(twice)) {
    for (std::size_t i = 0; i < results.size(); ++i) {
      const auto same = std::ranges::find_if(outline, [&](const ReplayResult& result) {
        return result.policy == other_outline[i].policy && result.capacity == other_outline[i].capacity;
      });
      ASSERT_NE(same, outline.end());
      SCOPED_TRACE(other_outline[i].policy);
      expect_same(results[i], all.at(unit)[static_cast<std::size_t>(same - outline.begin())]);
    }
  }
}

// Stores every tensor of a trace in chunks, packed where `gzip_level` is not 0.
void store_in_chunks(const std::filesystem::path& path, int layers, unsigned gzip_level) {
  using hdf5::Handle;
  const auto require = [](bool success) {
    if (!success) throw std::runtime_error("the test's own use of HDF5 failed: " + hdf5::last_error());
  };
  edit(path, [&](std::int64_t file) {
    for (int layer = 0; layer < layers; ++layer) {
      for (const char* name : {"keys", "values", "queries", "output_projection", "attention_mass"}) {
        const std::string place = fmt::format("/layers/{}/{}", layer, name);
        if (H5Lexists(file, place.c_str(), H5P_DEFAULT) <= 0) continue;
        std::vector<hsize_t> extent;
        std::vector<float> values;
        {
          const Handle dataset(H5Dopen2(file, place.c_str(), H5P_DEFAULT));
          const Handle space(H5Dget_space(dataset.id()));
          extent.resize(static_cast<std::size_t>(H5Sget_simple_extent_ndims(space.id())));
          H5Sget_simple_extent_dims(space.id(), extent.data(), nullptr);
          values.resize(static_cast<std::size_t>(H5Sget_simple_extent_npoints(space.id())));
          require(H5Dread(dataset.id(), H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0);
        }
        remove(file, place);
        std::vector<hsize_t> chunk = extent;
        for (hsize_t& edge : chunk) edge = std::max<hsize_t>(edge * 2 / 5, 1);
        const Handle space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr));
        const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
        require(H5Pset_chunk(creation.id(), static_cast<int>(chunk.size()), chunk.data()) >= 0);
        if (gzip_level > 0) require(H5Pset_deflate(creation.id(), gzip_level) >= 0);
        const Handle dataset(
            H5Dcreate2(file, place.c_str(), H5T_IEEE_F32LE, space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
        require(dataset && H5Dwrite(dataset.id(), H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0);
      }
    }
  });
}

TEST_P(EngineOn, TheSameBitsFromAnyStorage) {
  const ReplayRequest asked = everything(policies(), {"9", "40%"});
  const TraceReader contiguous = reader();
  const Results expected = run(ReplayEngine(std::span(&contiguous, 1), asked));
  for (const unsigned gzip_level : {0U, 1U}) {
    SCOPED_TRACE(gzip_level == 0 ? "chunked" : "gzip");
    const auto path = folder_ / "again.h5";
    GetParam().trace.write(path);
    store_in_chunks(path, GetParam().trace.num_layers, gzip_level);
    const TraceReader trace(path);
    EXPECT_EQ(trace.reads_directly(0, HeadTensor::keys), gzip_level == 0);
    EXPECT_EQ(trace.stored_tensors().front().storage, gzip_level == 0 ? "chunked" : "chunked, gzip");
    expect_same(run(ReplayEngine(std::span(&trace, 1), asked)), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, EngineOn,
    testing::Values(Shape{"gqa", {.spans = {{3, 9, "inside"}, {55, 66, "across"}}}},
                    Shape{"one_head", {.num_layers = 3, .num_attention_heads = 1, .num_key_value_heads = 1}},
                    Shape{"mha", {.num_attention_heads = 3, .num_key_value_heads = 3, .head_dim = 20}},
                    Shape{"mqa_8_to_1", {.num_layers = 5, .num_attention_heads = 8, .num_key_value_heads = 1}},
                    Shape{"gqa_8_to_1", {.num_attention_heads = 16, .num_key_value_heads = 2, .hidden_size = 70}},
                    Shape{"odd_head_dim", {.head_dim = 7, .hidden_size = 29}},
                    Shape{"hidden_below_head_dim", {.head_dim = 20, .hidden_size = 6}},
                    Shape{"several_slices_of_the_projection", {.num_layers = 1, .hidden_size = 1100}},
                    Shape{"without_projection", {.output_projection = false}},
                    Shape{"sliding_window", {.sliding_window = 31}}, Shape{"soft_capping", {.softcapping = 4}},
                    Shape{"residual_stream", {.hidden_size = 1100, .residual_norms = true}},
                    Shape{"norm_behind_the_projection",
                          {.hidden_size = 530, .residual_norms = true, .projection_output_norm = true}},
                    Shape{"one_evaluation_query", {.prompt_length = 69}},
                    Shape{"evaluation_queries_65", {.num_layers = 1, .num_tokens = 125}},
                    Shape{"evaluation_queries_130", {.num_layers = 1, .num_tokens = 190, .sliding_window = 70}},
                    Shape{"several_blocks_of_positions", {.num_layers = 1, .prompt_length = 1030, .num_tokens = 1040}}),
    [](const auto& shape) { return std::string(shape.param.name); });

// What the layers change adds up, behind a norm or not.
TEST(Engine, AddsUpWhatAllLayersChange) {
  for (const bool norm : {false, true}) {
    const TemporaryFolder folder;
    const RandomTrace shape{
        .num_layers = 3, .hidden_size = 530, .residual_norms = true, .projection_output_norm = norm};
    shape.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    ReplayRequest request = make_request({"recent", "knorm", "full"}, {"9"});
    request.residual_sum = true;
    const TraceReplay replay = kvreplay::replay(std::span(&trace, 1), request).front();
    const std::vector<float>& lengths = trace.info().layers.back().residual_norm;
    for (const ReplayResult& result : replay.results) {
      SCOPED_TRACE(result.policy);
      std::vector<Eigen::VectorXd> sums(replay.evaluation_positions.size(), Eigen::VectorXd::Zero(530));
      for (int layer = 0; layer < 3; ++layer) {
        const auto cached = [&](int head, int position) {
          const auto kept = result.kept.of_query_head(layer, head, 2).kept();
          std::vector<int> positions(kept.begin(), kept.end());
          for (int n = replay.eviction_position; n <= position; ++n) positions.push_back(n);
          return positions;
        };
        const auto defined =
            test::by_definition(shape, shape.tensors(), layer, replay.eviction().evaluate_from, cached);
        for (std::size_t query = 0; query < sums.size(); ++query) sums[query] += defined.change[query];
      }
      const Table& found = result.measures[Measure::residual_sum];
      ASSERT_EQ(found.numbers.size(), sums.size());
      for (std::size_t query = 0; query < sums.size(); ++query) {
        const double expected = sums[query].norm() / static_cast<double>(lengths[lengths.size() - sums.size() + query]);
        EXPECT_NEAR(found.numbers[query], expected, 1e-5 * std::max(1.0, expected)) << query;
      }
    }
    // Where a sweep does the layers one by one there is none.
    const TraceReplay without = kvreplay::replay(trace, make_request({"recent"}, {"9"})).front();
    EXPECT_TRUE(without.results.front().measures[Measure::residual_sum].numbers.empty());
  }
}

TEST(Engine, ManyTracesAreWorkedOnTogether) {
  const TemporaryFolder folder;
  const std::vector<RandomTrace> shapes = {
      {.num_layers = 3, .num_attention_heads = 1, .num_key_value_heads = 1},
      {.num_attention_heads = 6, .num_key_value_heads = 3, .prompt_length = 40, .output_projection = false, .seed = 2},
      {.num_layers = 4, .num_attention_heads = 4, .num_key_value_heads = 1, .head_dim = 16, .seed = 3}};
  std::vector<TraceReader> traces;
  for (std::size_t t = 0; t < shapes.size(); ++t) {
    const auto path = folder / fmt::format("{}.h5", t);
    shapes[t].write(path);
    traces.emplace_back(path);
  }
  const ReplayRequest asked = everything(policies(), {"9", "40%"});
  for (const int count : {1, 8}) {
    const Threads threads(count);
    ReplayEngine engine(traces, asked);
    std::vector<ReplayUnit> units = engine.units();
    ASSERT_EQ(units.size(), 9u);
    std::mt19937 generator(4);
    std::ranges::shuffle(units, generator);
    const Results all = run(engine, units);
    engine.limit_memory(least_memory(engine));
    expect_same(run(engine, units), all);
    for (std::size_t t = 0; t < traces.size(); ++t) {
      const ReplayEngine alone(std::span(&traces[t], 1), asked);
      for (const auto& [unit, results] : run(alone)) {
        for (std::size_t i = 0; i < results.size(); ++i) {
          SCOPED_TRACE(fmt::format("trace {}, layer {}, setting {}", t, unit.second, i));
          expect_same(results[i], all.at({static_cast<int>(t), unit.second}).at(i));
        }
      }
    }
  }
  Buffer::keep_at_most(Index{256} << 20);
}

// One evicted position outweighs all others by e^difference.
TEST(Engine, WhatIsLeftOfTheAttentionMayVanish) {
  for (const float difference : {40.0f, 60.0f, 68.0f, 70.0f, 85.0f, 110.0f, 250.0f, 1000.0f}) {
    for (const double softcapping : {0.0, 300.0}) {
      SCOPED_TRACE(fmt::format("a difference of {}, capped at {}", difference, softcapping));
      const TemporaryFolder folder;
      const RandomTrace shape{.num_tokens = 140, .softcapping = softcapping};
      RandomTrace::Tensors tensors = shape.tensors();
      const auto d = static_cast<std::size_t>(shape.head_dim);
      for (std::size_t layer = 0; layer < tensors.keys.size(); ++layer) {
        for (std::size_t i = 0; i < tensors.queries[layer].size(); i += d) tensors.queries[layer][i] = 1;
        for (std::size_t head = 0; head < 2; ++head) {
          float* key = tensors.keys[layer].data() + (head * 140 + 5) * d;
          std::fill_n(key, d, 0.0f);
          key[0] = difference * std::sqrt(static_cast<float>(d));
        }
      }
      write(folder / "t.h5", shape, tensors);
      const TraceReader trace(folder / "t.h5");
      const ReplayEngine engine(std::span(&trace, 1), make_request({"recent", "full"}, {"12"}));
      const Results results = run(engine);
      expect_defined(engine, results, shape, tensors);
      for (const float recall : results.at({0, 0}).at(0).measures[Measure::attention_recall]) EXPECT_LT(recall, 1e-9f);
      for (const float error : results.at({0, 0}).at(1).measures[Measure::head_error]) EXPECT_EQ(error, 0.0f);
    }
  }
}

TEST(Engine, APromptShorterThanTheWindowIsRefused) {
  const TemporaryFolder folder;
  RandomTrace{.prompt_length = 6, .num_tokens = 9}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const std::string message = message_of<Error>(
      [&] { const ReplayEngine engine(std::span(&trace, 1), make_request({"snapkv(window=8)"}, {"5"})); });
  EXPECT_NE(message.find("capacity 5 is below the 8 positions that snapkv(window=8)"), std::string::npos) << message;
  // Whoever asks for more than the prompt gets all of it.
  const ReplayEngine engine(std::span(&trace, 1), make_request({"snapkv(window=8)"}, {"8"}));
  for (const auto& [unit, results] : run(engine)) {
    for (const Residency& set : results.at(0).kept) EXPECT_EQ(set, (std::vector<int>{0, 1, 2, 3, 4, 5}));
  }
}

TEST(Engine, CostIsPositiveAndGrowsWithSettings) {
  for (const bool output_projection : {true, false}) {
    const TemporaryFolder folder;
    RandomTrace{.output_projection = output_projection}.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    std::vector<std::string> specs;
    Work before;
    for (const std::string& spec : policies()) {
      if (spec == "full") continue;  // which has one setting, whatever is asked for
      specs.push_back(spec);
      const ReplayEngine engine(std::span(&trace, 1), make_request(specs, {"9"}));
      const Work cost = engine.cost(engine.units().front());
      EXPECT_GT(cost.operations, before.operations) << spec;
      EXPECT_GE(cost.bytes, before.bytes) << spec;
      EXPECT_GT(cost.bytes, 0) << spec;
      const ReplayEngine more(std::span(&trace, 1), make_request(specs, {"9", "20"}));
      EXPECT_GT(more.cost(more.units().front()).operations, cost.operations) << spec;
      before = cost;
    }
  }
}

// What is computed together is computed once, wherever a capacity that keeps everything stands among the others.
TEST(Engine, TheOrderOfCapacitiesChangesNoWork) {
  const TemporaryFolder folder;
  RandomTrace{}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  std::vector<double> operations;
  for (const std::vector<std::string>& capacities : {std::vector<std::string>{"9", "100%"}, {"100%", "9"}}) {
    const ReplayEngine engine(std::span(&trace, 1), make_request({"snapkv(window=4)", "snapkv(window=8)"}, capacities));
    const double before = work_done().operations;
    EXPECT_EQ(run(engine).size(), 2u);
    operations.push_back(work_done().operations - before);
  }
  EXPECT_EQ(operations[0], operations[1]);
}

TEST(Cost, OraclesCountWhatTheyLookAtAndExchange) {
  const TemporaryFolder folder;
  RandomTrace{.hidden_size = 8}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const auto operations = [&](const std::string& oracle, Granularity granularity) {
    const ReplayRequest asked = make_request({"recent", oracle}, {"9"}, granularity);
    return ReplayEngine(std::span(&trace, 1), asked).cost({0, 0}).operations;
  };
  const double random = operations("random", Granularity::kv);
  EXPECT_EQ(operations("oracle-attention", Granularity::kv) - random, 2.0 * 4 * 10 * 70 * 8);
  const double few = operations("oracle-reconstruction(exchanges=1)", Granularity::kv);
  EXPECT_GT(few, operations("oracle-attention", Granularity::kv));
  // An exchange looks at all 60 positions, in 2 sets of 2 heads or 4 of 1: at what their values have in common with
  // those of two others, of width 8, and at what every head and every pair of heads does to 10 queries.
  const double kv = operations("oracle-reconstruction(exchanges=11)", Granularity::kv) - few;
  EXPECT_GE(kv, 10.0 * 2 * 60 * (2 * 2 * 8 * (2 + 2) + 10 * (2 + 1)));
  EXPECT_GT(kv, operations("oracle-reconstruction(exchanges=11)", Granularity::query) -
                    operations("oracle-reconstruction(exchanges=1)", Granularity::query));
}

// Hours may lie in a layer: what is finished must not wait for the next.
TEST(Engine, LayersWithExchangesAreHandedOutOneByOne) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 4}.write(folder / "t.h5");
  edit(folder / "t.h5", [](std::int64_t file) {
    poke(file, "/layers/2/values", {1, 37, 3}, std::numeric_limits<float>::quiet_NaN());
  });
  const TraceReader trace(folder / "t.h5");
  const ReplayEngine engine(std::span(&trace, 1), make_request({"recent", "oracle-reconstruction"}, {"9"}));
  for (const int count : {1, 3}) {
    const Threads threads(count);
    std::vector<int> done;
    EXPECT_THROW(engine.run(engine.units(), [&](const ReplayUnit& unit,
                                                const std::vector<LayerResult>&) { done.push_back(unit.layer); }),
                 Error);
    EXPECT_EQ(done, (std::vector<int>{0, 1}));
  }
}

TEST(Engine, ExchangesAreTheSameBitsByAnyThreadsInAnyMemory) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 5, .layer_windows = {0, 8, 0, 8, 8}}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    const ReplayRequest asked = make_request(
        {"oracle-reconstruction", "snapkv(window=4)", "oracle-reconstruction(exchanges=2)"}, {"9", "20"}, granularity);
    Results expected;
    {
      const Threads one(1);
      expected = run(ReplayEngine(std::span(&trace, 1), asked));
    }
    for (const int count : {1, 2, 3, 8}) {
      SCOPED_TRACE(fmt::format("{} threads", count));
      const Threads threads(count);
      ReplayEngine engine(std::span(&trace, 1), asked);
      expect_same(run(engine), expected);
      engine.limit_memory(least_memory(engine));
      expect_same(run(engine), expected);
    }
  }
}

// Traces of one model have the same output projections; factors are computed for the first of them alone.
TEST(Engine, TracesWithTheSameProjectionsShareTheirFactors) {
  const TemporaryFolder folder;
  const RandomTrace shape{.num_layers = 3, .hidden_size = 600};
  shape.write(folder / "first.h5");
  std::filesystem::copy(folder / "first.h5", folder / "second.h5");
  edit(folder / "second.h5", [](std::int64_t file) {
    for (const char* layer : {"0", "1", "2"}) poke(file, fmt::format("/layers/{}/keys", layer), {1, 20, 3}, 4.0f);
  });
  std::filesystem::copy(folder / "second.h5", folder / "no digests.h5");
  edit(folder / "no digests.h5", [](std::int64_t file) {
    for (const char* layer : {"0", "1", "2"}) {
      ASSERT_GE(H5Adelete_by_name(file, fmt::format("/layers/{}/output_projection", layer).c_str(), "xxh64", 0), 0);
    }
  });
  RandomTrace other = shape;
  other.seed = 2;
  other.write(folder / "other.h5");

  const ReplayRequest asked = make_request({"restkv(window=4)", "recent"}, {"9", "20"});
  const auto operations_of = [](const ReplayEngine& engine, Results& results) {
    const double before = work_done().operations;
    results = run(engine);
    return work_done().operations - before;
  };
  const double of_factors = 3.0 * 4 * 600 * 8 * 9;  // of 3 layers of 4 heads
  for (const std::string second : {"second.h5", "no digests.h5", "other.h5"}) {
    SCOPED_TRACE(second);
    std::vector<TraceReader> traces;
    traces.emplace_back(folder / "first.h5");
    traces.emplace_back(folder / second);
    double apart = 0;
    Results expected;
    for (int t = 0; t < 2; ++t) {
      Results alone;
      apart += operations_of(ReplayEngine(std::span(&traces[static_cast<std::size_t>(t)], 1), asked), alone);
      for (auto& [unit, results] : alone) expected[{t, unit.second}] = std::move(results);
    }
    for (const int count : {1, 3}) {
      const Threads threads(count);
      ReplayEngine engine(traces, asked);
      const bool same = second != "other.h5";
      EXPECT_EQ(engine.units()[1], (same ? ReplayUnit{1, 0} : ReplayUnit{0, 1}));
      Results together;
      EXPECT_EQ(apart - operations_of(engine, together), same ? of_factors : 0.0);
      expect_same(together, expected);
      engine.limit_memory(least_memory(engine));
      EXPECT_EQ(apart - operations_of(engine, together), same ? of_factors : 0.0);
      expect_same(together, expected);
      // In whatever order they are asked for.
      std::vector<ReplayUnit> units = engine.units();
      std::ranges::reverse(units);
      expect_same(run(engine, units), expected);
    }
  }
}

TEST(Engine, EvictionsOfOneTraceShareTheFactors) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 2}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest asked = make_request({"restkv(window=4)"}, {"9"});
  asked.eviction_positions = {40, 60};
  const ReplayEngine engine(std::span(&trace, 1), asked);
  EXPECT_EQ(engine.units(), (std::vector<ReplayUnit>{{0, 0}, {1, 0}, {0, 1}, {1, 1}}));
  const double before = work_done().operations;
  const Results together = run(engine);
  const double all = work_done().operations - before;
  double apart = 0;
  for (const int replay : {0, 1}) {
    asked.eviction_positions = {replay == 0 ? 40 : 60};
    asked.evaluate_from = 60;
    const double alone = work_done().operations;
    for (const auto& [unit, results] : run(ReplayEngine(std::span(&trace, 1), asked))) {
      expect_same(together.at({replay, unit.second}).front(), results.front());
    }
    apart += work_done().operations - alone;
  }
  EXPECT_EQ(apart - all, 2.0 * 4 * 24 * 8 * 9);
}

TEST(LayerProjection, HoldsTheFactorsOfItsHeadsToTheBit) {
  for (const RandomTrace& shape :
       {RandomTrace{}, RandomTrace{.head_dim = 7, .hidden_size = 511},
        RandomTrace{.num_attention_heads = 3, .num_key_value_heads = 1, .head_dim = 48, .hidden_size = 513},
        RandomTrace{.head_dim = 20, .hidden_size = 1100}, RandomTrace{.head_dim = 20, .hidden_size = 5}}) {
    for (const bool packed : {false, true}) {
      SCOPED_TRACE(fmt::format("{} × {}{}", shape.hidden_size, shape.head_dim, packed ? ", packed" : ""));
      const TemporaryFolder folder;
      shape.write(folder / "t.h5");
      if (packed) store_in_chunks(folder / "t.h5", shape.num_layers, 1);
      const TraceReader trace(folder / "t.h5");
      ASSERT_EQ(trace.reads_projection_directly(1), !packed);
      LayerProjection projection(trace, 1);
      for (int slice = projection_slices(trace.info().model); slice-- > 0;) projection.read_slice(slice);
      for (int head = 0; head < shape.num_attention_heads; ++head) {
        projection.decompose(head);
        const Matrix expected = projection_factor_of(trace.read_output_projection(1, head));
        const Matrix& found = projection.factor(head);
        ASSERT_EQ(found.rows(), expected.rows());
        ASSERT_EQ(found.cols(), expected.cols());
        EXPECT_EQ(std::memcmp(found.data(), expected.data(), static_cast<std::size_t>(found.size()) * sizeof(float)),
                  0);
      }
    }
  }
}

}  // namespace
}  // namespace kvreplay::test
