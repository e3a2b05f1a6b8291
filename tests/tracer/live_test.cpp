// What eviction does to the model itself: an independent measurement reproduced, and what must hold for every family.
#include "tracer/live/live_run.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "hdf5/hdf5.h"
#include "replay/engine.h"
#include "replay/replay.h"
#include "support/places.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"
#include "tracer/prompt.h"

namespace kvreplay::tracer {
namespace {

using test::TemporaryFolder;
using test::TinyModel;
using test::TinyModelOptions;

// A run of a model over ids, evicted behind `prompt` of them.
struct EvictedRun {
  EvictedRun(const std::filesystem::path& folder, std::vector<std::int32_t> all, int prompt, int threads = 2,
             const HeldParts& parts = {.prompt_queries = 1 << 20, .attention_mass = true})
      : model(folder),
        transformer(model, {.threads = threads}),
        held(model, info_of(folder, {all.begin(), all.begin() + prompt}), prompt, "run", "digest", parts),
        live(model, transformer, held) {
    live.read_prompt();
    live.follow(std::span(all).subspan(static_cast<std::size_t>(prompt)), {});
  }

  TraceInfo info_of(const std::filesystem::path& folder, std::vector<std::int32_t> ids) const {
    PromptOptions options;
    options.model_folder = folder;
    options.prompt_ids = std::move(ids);
    Prompt read = prepare_prompt(options, model.config);
    TraceInfo info = describe(options, model, read, static_cast<Index>(read.ids.size()));
    info.token_pieces.clear();
    return info;
  }

  // Each layer's set per KV head, as `keeps` says of a position.
  template <class Keeps>
  KeptSets sets(const Keeps& keeps) const {
    KeptSets kept{.granularity = Granularity::kv, .sets_per_layer = model.config.num_key_value_heads, .sets = {}};
    const std::vector<std::vector<int>> everything = held.everything();
    for (std::size_t set = 0; set < everything.size(); ++set) {
      std::vector<int> positions;
      for (const int position : everything[set]) {
        if (keeps(static_cast<int>(set), position)) positions.push_back(position);
      }
      kept.sets.emplace_back(std::move(positions));
    }
    return kept;
  }

  Model model;
  Transformer transformer;
  HeldRun held;
  LiveRun live;
};

std::vector<std::int32_t> some_ids(int count, int vocabulary) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back((i * i * 7 + i * 13 + 5) % vocabulary);
  return ids;
}

// Eight query heads on two KV heads.
void grouped_model(const std::filesystem::path& folder) {
  TinyModelOptions options;
  options.heads = 8;
  options.kv_heads = 2;
  TinyModel(options).write(folder);
}

std::filesystem::path demo_model() { return test::project_folder() / "traces" / "demo-model"; }

std::vector<std::int32_t> reference_ids() {
  const TraceReader trace(test::project_folder() / "tests" / "data" / "reference-needle.h5");
  return trace.info().token_ids;
}

constexpr int kReferencePrompt = 569;

// float32 forward passes of an independent program, evicted by the kept sets of 31 settings.
TEST(LiveRun, FindsWhatAnIndependentMeasurementFound) {
  const std::filesystem::path reference = test::project_folder() / "tests" / "data" / "reference-needle-live.h5";
  EvictedRun run(demo_model(), reference_ids(), kReferencePrompt);
  const auto file = hdf5::File::open(reference);
  std::vector<KeptSets> kept;
  for (std::size_t i = 0; i < file.list("/kept").size(); ++i) {
    const std::vector<std::int32_t> positions = file.read_int32s(fmt::format("/kept/{}/kept", i));
    const std::vector<std::int64_t> offsets = file.read_int64s(fmt::format("/kept/{}/offsets", i));
    KeptSets& sets = kept.emplace_back();
    sets.sets_per_layer = run.model.config.num_key_value_heads;
    for (std::size_t set = 0; set + 1 < offsets.size(); ++set) {
      sets.sets.emplace_back(std::vector<int>(positions.begin() + offsets[set], positions.begin() + offsets[set + 1]));
    }
  }
  std::vector<const KeptSets*> settings;
  for (const KeptSets& each : kept) settings.push_back(&each);
  ASSERT_GE(settings.size(), 20U);
  const auto outcomes = run.live.evict(settings);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    SCOPED_TRACE(file.read_string(fmt::format("/kept/{}", i), "policy"));
    const std::vector<float> kl = file.read_floats(fmt::format("/kept/{}/kl", i));
    const std::vector<float> nll = file.read_floats(fmt::format("/kept/{}/nll", i));
    const std::vector<float> nll_full = file.read_floats(fmt::format("/kept/{}/nll_full", i));
    ASSERT_EQ(outcomes[i].size(), kl.size());
    for (std::size_t token = 0; token < kl.size(); ++token) {
      EXPECT_NEAR(outcomes[i][token].divergence, kl[token], 1e-6 + 1e-4 * static_cast<double>(kl[token])) << token;
      if (token == nll.size()) {
        EXPECT_TRUE(std::isnan(outcomes[i][token].loss));
        continue;
      }
      EXPECT_NEAR(outcomes[i][token].loss, nll[token], 1e-5 + 1e-4 * static_cast<double>(nll[token])) << token;
      EXPECT_NEAR(outcomes[i][token].full_loss, nll_full[token], 1e-5 + 1e-4 * static_cast<double>(nll_full[token]));
    }
  }
}

// A policy that decides over what the model holds keeps what it keeps of a trace of the same run.
TEST(LiveRun, DecidesAsOverATrace) {
  const std::filesystem::path file = test::project_folder() / "tests" / "data" / "reference-needle.h5";
  const TraceReader trace(file);
  EvictedRun run(demo_model(), reference_ids(), kReferencePrompt);
  const ReplayRequest request = make_request(
      {"snapkv", "restkv", "h2o", "tova", "snapkv+adakv", "keydiff", "cake", "oracle-attention", "streamingllm"},
      {"64", "25%"});
  const TraceReplay of_trace = replay(trace, request).front();
  const ReplayEngine engine({&run.held}, request);
  const TraceReplay of_run = replay(engine).front();
  EXPECT_EQ(decide(engine).front().results[3].kept.sets, of_run.results[3].kept.sets);
  ASSERT_EQ(of_run.results.size(), of_trace.results.size());
  for (std::size_t i = 0; i < of_run.results.size(); ++i) {
    const ReplayResult& expected = of_trace.results[i];
    const ReplayResult& found = of_run.results[i];
    SCOPED_TRACE(expected.policy + " at " + expected.capacity_request);
    // The trace is of another program, so that scores that are nearly tied may change places.
    std::size_t common = 0;
    std::size_t all = 0;
    for (std::size_t set = 0; set < expected.kept.sets.size(); ++set) {
      const auto a = expected.kept.sets[set].kept();
      const auto b = found.kept.sets[set].kept();
      all += a.size();
      common += static_cast<std::size_t>(
          std::ranges::count_if(a, [&b](int position) { return std::ranges::binary_search(b, position); }));
    }
    EXPECT_GE(static_cast<double>(common), 0.999 * static_cast<double>(all));
    const Table& error = found.measures[Measure::layer_error];
    for (std::size_t n = 0; n < error.numbers.size(); n += 7) {
      EXPECT_NEAR(error.numbers[n], expected.measures[Measure::layer_error].numbers[n], 0.02);
    }
    EXPECT_FALSE(found.measures[Measure::residual_error].numbers.empty());
  }
}

TEST(LiveRun, GivesTheSameBitsForAnyThreadsAndWhateverElseIsRun) {
  const TemporaryFolder folder;
  grouped_model(folder.path());
  const std::vector<std::int32_t> ids = some_ids(150, 97);
  const auto every = [](int n) { return [n](int set, int position) { return (position + set) % n == 0; }; };
  const auto outcomes = [&](int threads, std::size_t settings) {
    EvictedRun run(folder.path(), ids, 131, threads);
    std::vector<KeptSets> kept = {run.sets(every(3)), run.sets(every(5)), run.sets(every(2))};
    std::vector<const KeptSets*> asked;
    for (std::size_t i = 0; i < settings; ++i) asked.push_back(&kept[i]);
    std::vector<double> numbers;
    const auto outcomes_of_all = run.live.evict(asked);
    for (const ModelOutcome& outcome : outcomes_of_all.front()) numbers.push_back(outcome.divergence);
    return numbers;
  };
  const std::vector<double> alone = outcomes(1, 1);
  EXPECT_GT(alone.front(), 0);
  EXPECT_EQ(outcomes(1, 3), alone);
  EXPECT_EQ(outcomes(3, 1), alone);
  EXPECT_EQ(outcomes(2, 3), alone);
}

// Sets per query head that are equal within every group say the same as one per KV head.
TEST(LiveRun, TakesSetsPerQueryHead) {
  const TemporaryFolder folder;
  grouped_model(folder.path());
  EvictedRun run(folder.path(), some_ids(60, 97), 50);
  const KeptSets per_kv = run.sets([](int set, int position) { return (position + set) % 3 != 0; });
  KeptSets per_query{.granularity = Granularity::query, .sets_per_layer = 8, .sets = {}};
  for (const Residency& set : per_kv.sets) per_query.sets.insert(per_query.sets.end(), 4, set);
  KeptSets other = per_query;
  other.sets[5] = per_query.sets[0];
  const auto outcomes = run.live.evict({&per_kv, &per_query, &other});
  for (std::size_t token = 0; token < outcomes[0].size(); ++token) {
    EXPECT_EQ(outcomes[0][token].divergence, outcomes[1][token].divergence);
    EXPECT_NE(outcomes[0][token].divergence, outcomes[2][token].divergence);
  }
}

TEST(LiveRun, WritesFreelyWhatTheModelWritesWhereNothingIsEvicted) {
  EvictedRun run(demo_model(), reference_ids(), kReferencePrompt);
  const std::vector<std::int32_t> greedy = run.live.write(12);
  const KeptSets little = run.sets([](int, int position) { return position >= kReferencePrompt - 8; });
  const std::vector<Generation> texts = run.live.generate({nullptr, &little}, {}, 12);
  EXPECT_EQ(texts[0].ids, greedy);
  EXPECT_NE(texts[1].ids, greedy);
  const std::vector<std::int32_t> all = reference_ids();
  EXPECT_TRUE(std::equal(greedy.begin(), greedy.end(), all.begin() + kReferencePrompt));
}

// The most attention that one of the later queries pays to each position before the eviction, per set: [sets][N].
std::vector<std::vector<float>> most_attention(const EvictedRun& run) {
  const ModelInfo& model = run.held.info().model;
  const int position = run.held.eviction_position();
  std::vector<std::vector<float>> most;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    for (int head = 0; head < model.num_attention_heads; ++head) {
      const int kv_head = head / model.group_size();
      if (head % model.group_size() == 0) most.emplace_back(static_cast<std::size_t>(position), 0.0f);
      const Matrix keys = run.held.read(layer, HeadTensor::keys, kv_head, 0, run.held.info().num_tokens());
      const Matrix queries = run.held.read(layer, HeadTensor::queries, head, position, run.held.later());
      for (Index query = 0; query < queries.rows(); ++query) {
        Eigen::RowVectorXf weights = queries.row(query) * keys.topRows(position + query + 1).transpose() *
                                     static_cast<float>(model.softmax_scale);
        weights = (weights.array() - weights.maxCoeff()).exp();
        weights /= weights.sum();
        for (int row = 0; row < position; ++row) {
          float& so_far = most.back()[static_cast<std::size_t>(row)];
          so_far = std::max(so_far, weights[row]);
        }
      }
    }
  }
  return most;
}

TEST(LiveRun, LosesNothingWithWhatNoQueryLooksAt) {
  const TemporaryFolder folder;
  TinyModel model({});
  // Large queries look at little.
  for (std::size_t i = 0; i < std::size_t{48} * 48; ++i) {
    for (const int layer : {0, 1}) {
      model.set_weight(fmt::format("model.layers.{}.self_attn.q_proj.weight", layer), i,
                       static_cast<double>(i * 37 % 19) - 9);
    }
  }
  model.write(folder.path());
  EvictedRun run(folder.path(), some_ids(160, 97), 150);
  const std::vector<std::vector<float>> attention = most_attention(run);
  // As many of the least looked at of each set as amount to a ten-thousandth of a query's attention.
  std::vector<float> least;
  std::size_t gone = 0;
  for (std::vector<float> ascending : attention) {
    std::ranges::sort(ascending);
    float sum = 0;
    std::size_t count = 0;
    while (sum + ascending[count] < 1e-7f) sum += ascending[count++];
    least.push_back(ascending[count]);
    gone += count;
  }
  EXPECT_GT(gone, 100U);
  const KeptSets looked_at = run.sets([&](int set, int position) {
    const auto of = static_cast<std::size_t>(set);
    return attention[of][static_cast<std::size_t>(position)] >= least[of];
  });
  const auto outcomes = run.live.evict({&looked_at});
  for (const ModelOutcome& outcome : outcomes.front()) EXPECT_LT(outcome.divergence, 1e-6);
}

// Policies under schedules, as replay sets them up.
struct ScheduledRun {
  ScheduledRun(EvictedRun& run, const std::vector<std::string>& specs, const std::string& capacity,
               Granularity granularity = Granularity::kv)
      : engine({&run.held}, make_request(specs, {capacity}, granularity)),
        replayed(replay(engine).front()),
        decoded(run.live.decode(engine.settings(0))) {}

  ReplayEngine engine;
  TraceReplay replayed;
  std::vector<LiveRun::Decoded> decoded;
};

TEST(LiveDecoding, LosesNothingWhereTheCapacityHoldsEverything) {
  const TemporaryFolder folder;
  grouped_model(folder.path());
  EvictedRun run(folder.path(), some_ids(90, 97), 70);
  const ScheduledRun scheduled(
      run, {"h2o@h2o", "snapkv(window=8)+every(4)", "tova@tova", "restkv(window=8)+every(3)", "rkv(window=8)+every(5)"},
      "200", Granularity::query);
  ASSERT_EQ(scheduled.decoded.size(), 5U);
  for (const LiveRun::Decoded& setting : scheduled.decoded) {
    ASSERT_EQ(setting.outcomes.size(), 20U);
    for (const ModelOutcome& outcome : setting.outcomes) EXPECT_LT(outcome.divergence, 1e-9);
  }
}

// A cache of the runner that is cut by hand after every token.
TEST(LiveDecoding, FindsWhatTheModelFindsOverACacheThatIsCutByHand) {
  for (const char* family : {"", "gemma3", "qwen3"}) {
    SCOPED_TRACE(family);
    const TemporaryFolder folder;
    grouped_model(folder.path());
    const std::filesystem::path path =
        *family == 0 ? folder.path() : test::project_folder() / "tests" / "tracer" / "families" / family;
    const Model model(path);
    const std::vector<std::int32_t> ids = some_ids(90, model.config.vocab_size);
    EvictedRun run(path, ids, 70);
    constexpr Index kCapacity = 12;
    const ScheduledRun scheduled(run, {"recent+every(1)"}, fmt::format("{}", kCapacity));
    Transformer transformer(model, {.threads = 1});
    const auto cut = [&](KvCache& cache) {
      for (int layer = 0; layer < model.config.num_layers; ++layer) {
        for (int head = 0; head < model.config.num_key_value_heads; ++head) {
          std::vector<Index> rows(static_cast<std::size_t>(std::min(kCapacity, cache.length(layer, head))));
          std::iota(rows.begin(), rows.end(), cache.length(layer, head) - static_cast<Index>(rows.size()));
          cache.keep(layer, head, rows);
        }
      }
    };
    const auto new_cache = [&] {
      return KvCache(model.config.num_layers, model.config.num_key_value_heads, model.config.head_dim, 100);
    };
    KvCache full = new_cache();
    KvCache evicted = new_cache();
    transformer.forward(std::span(ids).first(70), full);
    transformer.forward(std::span(ids).first(70), evicted);
    cut(evicted);
    double lost = 0;
    for (std::size_t token = 70; token < ids.size(); ++token) {
      const std::vector<float> expected = transformer.forward({&ids[token], 1}, full);
      const std::vector<float> found = transformer.forward({&ids[token], 1}, evicted);
      cut(evicted);
      const auto log_sum = [](const std::vector<float>& logits) {
        double sum = 0;
        for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
        return std::log(sum);
      };
      double divergence = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const double log_p = static_cast<double>(expected[i]) - log_sum(expected);
        divergence += std::exp(log_p) * (log_p - (static_cast<double>(found[i]) - log_sum(found)));
      }
      const ModelOutcome& outcome = scheduled.decoded.front().outcomes[token - 70];
      EXPECT_NEAR(outcome.divergence, divergence, 1e-6 + 1e-3 * divergence) << token;
      lost += divergence;
    }
    EXPECT_GT(lost, 1e-3);
  }
}

// What comes before the first layer's attention is the same with any cache.
TEST(LiveDecoding, KeepsInTheFirstLayerWhatAReplayKeeps) {
  EvictedRun run(demo_model(), reference_ids(), kReferencePrompt);
  const ScheduledRun scheduled(run,
                               {"h2o@h2o", "tova@tova", "snapkv+every(4)", "restkv+every(interval=2,slack=8)", "rkv",
                                "streamingllm@streaming-llm", "h2o@h2o-rolled", "morphkv", "cold-compress",
                                "snapkv+adakv+every(4)", "cake+every(4)"},
                               "64", Granularity::query);
  bool deeper = false;
  for (std::size_t i = 0; i < scheduled.decoded.size(); ++i) {
    const ReplayResult& replayed = scheduled.replayed.results[i];
    SCOPED_TRACE(replayed.policy);
    const std::vector<Residency>& found = scheduled.decoded[i].sets;
    ASSERT_EQ(found.size(), replayed.kept.sets.size());
    for (std::size_t set = 0; set < found.size(); ++set) {
      if (set < static_cast<std::size_t>(replayed.kept.sets_per_layer)) {
        EXPECT_EQ(found[set], replayed.kept.sets[set]) << set;
      } else {
        deeper = deeper || found[set] != replayed.kept.sets[set];
      }
    }
  }
  EXPECT_TRUE(deeper) << "layers above decide over other queries";
}

TEST(LiveDecoding, GivesTheSameBitsForAnyThreadsAndWhateverElseIsRun) {
  const TemporaryFolder folder;
  grouped_model(folder.path());
  const std::vector<std::int32_t> ids = some_ids(100, 97);
  const auto numbers = [&](int threads, const std::vector<std::string>& specs) {
    EvictedRun run(folder.path(), ids, 80, threads);
    const ScheduledRun scheduled(run, specs, "16");
    std::vector<double> found;
    for (const ModelOutcome& outcome : scheduled.decoded.front().outcomes) found.push_back(outcome.divergence);
    return found;
  };
  const std::string first = "snapkv(window=4)+every(2)";
  const std::vector<double> alone = numbers(1, {first});
  EXPECT_GT(alone.back(), 0);
  EXPECT_EQ(numbers(3, {first}), alone);
  EXPECT_EQ(numbers(2, {first, "tova+every(1)", "knorm+every(5)"}), alone);
}

TEST(LiveDecoding, WritesFreelyUnderASchedule) {
  EvictedRun run(demo_model(), reference_ids(), kReferencePrompt);
  const ScheduledRun scheduled(run, {"snapkv+every(4)", "streamingllm+every(1)"}, "1000");
  const ScheduledRun little(run, {"recent+every(1)"}, "8");
  const std::vector<std::int32_t> greedy = run.live.write(12);
  const std::vector<Generation> texts = run.live.generate({nullptr}, scheduled.engine.settings(0), 12);
  ASSERT_EQ(texts.size(), 3U);
  for (const Generation& text : texts) EXPECT_EQ(text.ids, greedy);
  EXPECT_NE(run.live.generate({}, little.engine.settings(0), 12).front().ids, greedy);
}

TEST(LiveRun, CountsRepeatedFourTokenSequences) {
  EXPECT_EQ(repeated_4grams(std::vector<std::int32_t>{1, 2, 3, 4}), 0);
  EXPECT_EQ(repeated_4grams(std::vector<std::int32_t>{1, 2, 3, 4, 5, 6}), 0);
  EXPECT_EQ(repeated_4grams(std::vector<std::int32_t>{1, 1, 1, 1, 1, 1}), 2.0 / 3);
}

class FamilyLive : public testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path folder_ = test::project_folder() / "tests" / "tracer" / "families" / GetParam();
};

// The states behind the eviction in one pass with everything before it, and on views that keep everything.
TEST_P(FamilyLive, LosesNotABitWhereEverythingIsKept) {
  const Model model(folder_);
  const std::vector<std::int32_t> ids = some_ids(200, model.config.vocab_size);
  for (const int prompt : {3, 64, 131, 199}) {
    SCOPED_TRACE(prompt);
    EvictedRun run(folder_, ids, prompt);
    const KeptSets everything = run.sets([](int, int) { return true; });
    const KeptSets nothing = run.sets([](int, int) { return false; });
    const auto outcomes = run.live.evict({&everything, &nothing});
    double lost = 0;
    for (std::size_t token = 0; token < outcomes[0].size(); ++token) {
      EXPECT_EQ(outcomes[0][token].divergence, 0);
      EXPECT_TRUE(outcomes[0][token].same_most_likely);
      lost += outcomes[1][token].divergence;
    }
    EXPECT_GT(lost, 0);

    const auto sets = run.held.everything();
    KvCache view(run.held.before(), sets, model.config.num_key_value_heads, 200 - prompt);
    const Sequence later{std::span(ids).subspan(static_cast<std::size_t>(prompt)), &view};
    const Buffer states = run.transformer.run({&later, 1});
    KvCache whole(model.config.num_layers, model.config.num_key_value_heads, model.config.head_dim, 200);
    const Sequence all{ids, &whole};
    const Buffer uninterrupted = run.transformer.run({&all, 1});
    const auto expected = uninterrupted.part(uninterrupted.size() - states.size(), states.size());
    EXPECT_TRUE(std::ranges::equal(states.part(0, states.size()), expected));
  }
}

INSTANTIATE_TEST_SUITE_P(Each, FamilyLive,
                         testing::Values("gemma", "gemma2", "gemma2-pattern", "gemma3", "gemma3-layer-types", "llama",
                                         "llama-own-head", "llama3", "mistral", "phi3", "qwen2", "qwen3"),
                         [](const auto& family) {
                           std::string name = family.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace kvreplay::tracer
