// Methods without golden calls against plain references, and promises of budgets and selections.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>

#include "base/error.h"
#include "replay/replay.h"
#include "replay/results_file.h"
#include "replay/trace_source.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

std::vector<TraceReplay> run(const TraceReader& trace, const std::vector<std::string>& specs,
                             const std::vector<std::string>& capacities, std::optional<Granularity> granularity = {}) {
  return replay(trace, make_request(specs, capacities, granularity));
}

class Methods : public testing::Test {
 protected:
  Methods() { open({.num_layers = 4, .num_attention_heads = 6, .num_key_value_heads = 3, .hidden_size = 40}); }

  void open(const RandomTrace& shape) {
    shape.write(folder_ / "t.h5");
    trace_ = std::make_unique<TraceReader>(folder_ / "t.h5");
  }

  std::string message_of(const std::string& spec, const std::string& capacity = "12",
                         std::optional<Granularity> granularity = {}) {
    try {
      run(*trace_, {spec}, {capacity}, granularity);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  void write(const std::string& name, const std::string& text) { std::ofstream(folder_ / name) << text; }

  TemporaryFolder folder_;
  std::unique_ptr<TraceReader> trace_;
};

TEST_F(Methods, AttentionWithItsDefaultsIsSnapKV) {
  const auto replays = run(*trace_, {"attention(window=4)", "snapkv(window=4)"}, {"12"});
  EXPECT_EQ(replays.at(0).results[0].kept.sets, replays[0].results[1].kept.sets);
}

// c_j = a_j / (1 − a_j) · ‖Σ a v − v_j‖ in double, straight from the paper.
TEST_F(Methods, CaoteFollowsItsEquation) {
  constexpr int kWindow = 5;
  const Policy policy = make_policy(fmt::format("caote(window={})", kWindow));
  const TraceHead source(*trace_, 1, 2, 60);
  const Head head(source);
  std::vector<float> scores(60);
  policy.ranking()->score(head, 1, scores);
  const Eigen::MatrixXd keys = head.keys().cast<double>();
  const Eigen::MatrixXd values = head.values().cast<double>();
  const Eigen::MatrixXd queries = source.queries(1, 60 - kWindow, kWindow).cast<double>();
  Eigen::VectorXd attention = Eigen::VectorXd::Zero(60);
  for (int i = 0; i < kWindow; ++i) {
    const int position = 60 - kWindow + i;
    Eigen::VectorXd weights = (keys.topRows(position + 1) * queries.row(i).transpose() / std::sqrt(8.0)).array().exp();
    weights /= weights.sum();
    attention.head(position + 1) += weights / kWindow;
  }
  const Eigen::RowVectorXd output = attention.transpose() * values;
  for (int n = 0; n < 60 - kWindow; ++n) {
    const double expected = attention(n) / (1 - attention(n)) * (output - values.row(n)).norm();
    EXPECT_NEAR(scores[static_cast<std::size_t>(n)], expected, 1e-5 * expected + 1e-9);
  }
}

TEST_F(Methods, KeyNormKeepsTheShortestKeys) {
  const auto replays = run(*trace_, {"knorm"}, {"7"});
  const Matrix keys = trace_->read(2, HeadTensor::keys, 1, 0, 60);
  const std::span<const int> kept = replays.at(0).results.at(0).kept.of_query_head(2, 2, 2).kept();
  float longest = 0;
  for (const int n : kept) longest = std::max(longest, keys.row(n).norm());
  for (int n = 0; n < 60; ++n) {
    if (!std::ranges::binary_search(kept, n)) {
      EXPECT_GE(keys.row(n).norm(), longest);
    }
  }
}

TEST_F(Methods, PyramidGivesLowerLayersMore) {
  const auto replays = run(*trace_, {"snapkv(window=4)+pyramid(beta=4)", "snapkv(window=4)"}, {"20"});
  const KeptSets& kept = replays.at(0).results[0].kept;
  // (20 − 4) ranked: the last layer 16/4 = 4, the first 28, steps of 8, and the window of 4.
  for (int layer = 0; layer < 4; ++layer) {
    for (int head = 0; head < 6; ++head) {
      EXPECT_EQ(kept.of_query_head(layer, head, 2).kept().size(), static_cast<std::size_t>(32 - 8 * layer));
    }
  }
  EXPECT_EQ(kept.mean_size(), 20);
}

// What PyramidKV's code and ReST-KV's do differently.
TEST_F(Methods, PyramidsOnShortPromptsAreDrawnWhereAsked) {
  const auto replays =
      run(*trace_, {"snapkv(window=4)+pyramid(beta=4)", "restkv(window=4)+pyramid(beta=4,short=pyramid)"}, {"40"});
  // 36 ranked positions each and a prompt of 60 < 2·36: the first layer gets all 56, the last 2·36 − 56 = 16, steps are
  // 40/3 rounded down, and the window of 4 comes on top.
  for (int layer = 0; layer < 4; ++layer) {
    EXPECT_EQ(replays.at(0).results.at(0).kept.of_query_head(layer, 0, 2).kept().size(), 40u);
    EXPECT_EQ(replays.at(0).results.at(1).kept.of_query_head(layer, 0, 2).kept().size(),
              static_cast<std::size_t>(60 - 13 * layer));
  }
}

TEST_F(Methods, PyramidOfKvpressRoundsAtTheEnd) {
  // A mean of 26 ranked over 52 positions: the last layer 26/20 = 1.3, below the window of 64 in kvpress's default, so
  // that it falls back to the uniform budget.
  EXPECT_NE(message_of("pyramidkv@kvpress", "26"), "") << "the window of 64 exceeds the capacity";
  open({.num_layers = 4, .prompt_length = 400, .num_tokens = 404});
  // 200 on average, smallest 200/2 = 100, largest 300: steps of 66.67.
  const auto replays = run(*trace_, {"pyramidkv@kvpress(beta=2)"}, {"200"});
  for (int layer = 0; layer < 4; ++layer) {
    const int expected = static_cast<int>(std::nearbyint(300 - layer * (200.0 / 3)));
    EXPECT_EQ(replays.at(0).results.at(0).kept.of_query_head(layer, 0, 2).kept().size(),
              static_cast<std::size_t>(expected));
  }
}

TEST_F(Methods, AdaptiveBudgetsSumToWhatWasGranted) {
  for (const std::string spec : {"snapkv(window=4)+adakv", "restkv(window=4)+adakv(floor=0.5,across=kv)",
                                 "criticalkv(base=snapkv(window=4))+adakv(normalize=false)"}) {
    for (const Granularity granularity : {Granularity::query, Granularity::kv}) {
      SCOPED_TRACE(fmt::format("{} {}", spec, name_of(granularity)));
      const auto replays = run(*trace_, {spec}, {"16"}, granularity);
      const KeptSets& kept = replays.at(0).results.at(0).kept;
      for (int layer = 0; layer < 4; ++layer) {
        std::size_t positions = 0;
        for (int set = 0; set < kept.sets_per_layer; ++set) {
          const std::span<const int> own =
              kept.sets[static_cast<std::size_t>(layer * kept.sets_per_layer + set)].kept();
          positions += own.size();
          EXPECT_GE(own.size(), 4u + 2u) << "below window and floor";
          for (int n = 56; n < 60; ++n) EXPECT_TRUE(std::ranges::binary_search(own, n));
        }
        // The authors round the floor down and each head's share to the nearest.
        EXPECT_NEAR(static_cast<double>(positions), 16.0 * kept.sets_per_layer, 1.5 * kept.sets_per_layer);
      }
    }
  }
}

// kvpress's adaptive budget: each KV head keeps a fifth of its own, the rest of the layer's go to the best of what is
// left. Checked against a plain ranking of everything.
TEST_F(Methods, AdaKVOfKvpressEqualsAPlainRanking) {
  open({.num_layers = 1, .num_attention_heads = 6, .num_key_value_heads = 3, .prompt_length = 300, .num_tokens = 304});
  constexpr int kCapacity = 90;
  constexpr int kWindow = 64;
  const auto replays = run(*trace_, {"adakv@kvpress(safeguard=0.8)", "snapkv@kvpress"}, {fmt::format("{}", kCapacity)});
  struct Entry {
    float score;
    int head;
    int position;
  };
  std::vector<Entry> open_places;
  std::vector<std::vector<int>> expected(3);
  for (int kv_head = 0; kv_head < 3; ++kv_head) {
    const TraceHead source(*trace_, 0, kv_head, 300);
    const Head head(source);
    std::vector<float> sum(300, 0.0f);
    for (int member = 0; member < 2; ++member) {
      std::vector<float> scores(300, 0.0f);
      const Policy snapkv = make_policy("snapkv@kvpress");
      snapkv.ranking()->score(head, member, scores);
      snapkv.ranking()->smooth(head, member, kCapacity, scores);
      for (std::size_t n = 0; n < 300; ++n) sum[n] += scores[n] / 2;
    }
    for (int n = 300 - kWindow; n < 300; ++n) sum[static_cast<std::size_t>(n)] = 1e9f;
    std::vector<int> order(300);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(
        order, [&](int a, int b) { return sum[static_cast<std::size_t>(a)] > sum[static_cast<std::size_t>(b)]; });
    constexpr int kSafe = static_cast<int>(kCapacity * 0.8);
    expected[static_cast<std::size_t>(kv_head)].assign(order.begin(), order.begin() + kSafe);
    for (int i = kSafe; i < 300; ++i) {
      const int n = order[static_cast<std::size_t>(i)];
      open_places.push_back({sum[static_cast<std::size_t>(n)], kv_head, n});
    }
  }
  std::ranges::stable_sort(open_places, [](const Entry& a, const Entry& b) { return a.score > b.score; });
  for (std::size_t i = 0; i < 3 * static_cast<std::size_t>(kCapacity - 72); ++i) {
    expected[static_cast<std::size_t>(open_places[i].head)].push_back(open_places[i].position);
  }
  for (int kv_head = 0; kv_head < 3; ++kv_head) {
    std::vector<int>& positions = expected[static_cast<std::size_t>(kv_head)];
    std::ranges::sort(positions);
    EXPECT_EQ(replays.at(0).results[0].kept.sets[static_cast<std::size_t>(kv_head)], positions);
  }
}

TEST_F(Methods, GivenBudgetsAreFollowed) {
  write("positions.txt", "# a line per layer\n10\n 12, 14, 16\n8 # all\n60\n");
  const std::string spec = "snapkv(window=4)+layers(file=" + (folder_ / "positions.txt").string() + ")";
  const auto replays = run(*trace_, {spec}, {"20"});
  const KeptSets& kept = replays.at(0).results.at(0).kept;
  const std::vector<std::size_t> expected = {10, 10, 10, 12, 14, 16, 8, 8, 8, 60, 60, 60};
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(kept.sets[i].kept().size(), expected[i]);
  write("shares.txt", "0.5\n1\n1.5\n1\n");
  const auto shared =
      run(*trace_, {"recent+layers(file=" + (folder_ / "shares.txt").string() + ",unit=share)"}, {"20"});
  EXPECT_EQ(shared.at(0).results.at(0).kept.sets[0].kept().size(), 10u);
  EXPECT_EQ(shared[0].results[0].kept.sets[6].kept().size(), 30u);
}

TEST_F(Methods, GivenBudgetsDoNotGoByTheCapacityAskedFor) {
  write("twenty.txt", "20\n20\n20\n20\n");
  const std::string spec = "snapkv(window=4)+layers(file=" + (folder_ / "twenty.txt").string() + ")";
  const auto replays = run(*trace_, {spec}, {"3", "30", "100%", "1000"});
  ASSERT_EQ(replays.at(0).results.size(), 1u) << "one result for all capacities";
  EXPECT_EQ(replays[0].results[0].capacity_request, "20");
  EXPECT_EQ(replays[0].results[0].kept.mean_size(), 20);
}

// Positions of the first stage come in the order of the base, also where heads are combined.
TEST_F(Methods, CriticalKVOfALayerKeepsTheOrderOfItsBase) {
  open({.num_layers = 1, .num_attention_heads = 1, .num_key_value_heads = 1});
  const auto replays = run(*trace_, {"criticalkv(base=knorm,first=1)", "knorm"}, {"12"}, Granularity::layer);
  EXPECT_EQ(replays.at(0).results[0].kept.sets, replays[0].results[1].kept.sets);
}

TEST_F(Methods, GivenBudgetsThatDoNotFitAreRefused) {
  const auto refused = [this](const std::string& text, const std::string& reason) {
    write("b.txt", text);
    const std::string message = message_of("snapkv(window=4)+layers(file=" + (folder_ / "b.txt").string() + ")");
    EXPECT_NE(message.find(reason), std::string::npos) << message;
  };
  refused("", "holds no budgets");
  refused("10\n10\n", "has 2 layers, the model has 4");
  refused("10\n10\n10 10\n10\n", "1 or 3 are needed");
  refused("10\n10\nten\n10\n", "line 3: 'ten' is not a number of positions");
  refused("10\n10\n2.5\n10\n", "line 3");
  refused("10\n3\n10\n10\n", "fewer than the 4 that are always kept");
  EXPECT_NE(message_of("snapkv(window=4)+layers(file=/nowhere/b.txt)").find("cannot be read"), std::string::npos);
  EXPECT_NE(message_of("snapkv(window=4)+layers").find("needs a file"), std::string::npos);
}

TEST_F(Methods, ChunksStayWhole) {
  const auto replays = run(*trace_, {"snapkv(window=4)+chunks(size=8)"}, {"20"});
  for (const Residency& residency : replays.at(0).results.at(0).kept.sets) {
    const std::span<const int> set = residency.kept();
    ASSERT_EQ(set.size(), 20u);
    // 56 ranked positions make 7 chunks; 16 ranked places hold two whole ones.
    for (int first = 0; first < 56; first += 8) {
      const auto inside = std::ranges::count_if(set, [first](int n) { return n >= first && n < first + 8; });
      EXPECT_TRUE(inside == 0 || inside == 8) << inside;
    }
  }
  // A place too small for a chunk goes to its best positions.
  const auto narrow = run(*trace_, {"snapkv(window=4)+chunks(size=8)"}, {"7"});
  for (const Residency& residency : narrow.at(0).results.at(0).kept.sets) {
    const std::span<const int> set = residency.kept();
    EXPECT_EQ(set.size(), 7u);
    EXPECT_EQ(set[0] / 8, set[2] / 8);
  }
}

TEST_F(Methods, LaCacheSpreadsPositionsOverLayers) {
  open({.num_layers = 8, .prompt_length = 200, .num_tokens = 204});
  const auto replays = run(*trace_, {"lacache"}, {"64"});
  const KeptSets& kept = replays.at(0).results.at(0).kept;
  std::vector<int> together;
  for (int layer = 0; layer < 8; ++layer) {
    const std::span<const int> set = kept.of_query_head(layer, 0, 2).kept();
    EXPECT_NEAR(static_cast<double>(set.size()), 64, 6);
    for (const int sink : {0, 1, 2, 3}) EXPECT_TRUE(std::ranges::binary_search(set, sink));
    EXPECT_TRUE(std::ranges::binary_search(set, 199));
    together.insert(together.end(), set.begin(), set.end());
  }
  std::ranges::sort(together);
  together.erase(std::unique(together.begin(), together.end()), together.end());
  EXPECT_GT(together.size(), 100u) << "layers together remember more than one of them";
  EXPECT_NE(message_of("lacache", "12").find("capacity 12 is below the 13 positions that lacache needs"),
            std::string::npos);
  EXPECT_NE(message_of("lacache(span=2,overlap=2)", "64").find("overlap"), std::string::npos);
}

TEST_F(Methods, KeptSetsFromAFileLeadToTheSameMeasures) {
  const std::vector<std::string> specs = {"snapkv(window=4)", "restkv(window=4)+adakv", "tova"};
  for (const Granularity granularity : {Granularity::query, Granularity::kv}) {
    const auto original = run(*trace_, specs, {"16"}, granularity);
    write_kept_sets(folder_ / "kept.h5", original);
    for (std::size_t i = 0; i < specs.size(); ++i) {
      const std::string spec = fmt::format("kept(file={},index={})", (folder_ / "kept.h5").string(), i);
      const auto again = run(*trace_, {spec}, {"16"});
      EXPECT_EQ(again.at(0).results.at(0).measures[Measure::layer_error].numbers,
                original.at(0).results[i].measures[Measure::layer_error].numbers);
      EXPECT_EQ(again[0].results[0].kept.mean_size(), original[0].results[i].kept.mean_size());
    }
    const std::string spec = "kept(file=" + (folder_ / "kept.h5").string() + ")";
    if (granularity == Granularity::query) {
      EXPECT_NE(message_of(spec, "16", Granularity::kv).find("a set per query head"), std::string::npos);
    } else {
      EXPECT_NE(message_of(spec, "16", Granularity::layer).find("a set per KV head"), std::string::npos);
      EXPECT_EQ(message_of(spec, "16", Granularity::query), "");
    }
    EXPECT_NE(message_of("kept(file=" + (folder_ / "kept.h5").string() + ",index=9)").find("holds 3 of them"),
              std::string::npos);
  }
  EXPECT_NE(message_of("kept"), "");
  EXPECT_NE(message_of("kept(file=/nowhere.h5)").find("/nowhere.h5"), std::string::npos);
}

TEST_F(Methods, KeptSetsOfAnotherShapeAreRefused) {
  write_kept_sets(folder_ / "kept.h5", run(*trace_, {"recent"}, {"16"}));
  const std::string spec = "kept(file=" + (folder_ / "kept.h5").string() + ")";
  open({.num_layers = 2});
  EXPECT_NE(message_of(spec).find("holds 12 sets; the trace has 2 layers of 2 KV heads"), std::string::npos);
  open({.num_layers = 4, .num_attention_heads = 6, .num_key_value_heads = 3, .prompt_length = 50});
  EXPECT_NE(message_of(spec).find("was kept at position 60, and this eviction is at 50"), std::string::npos);
}

TEST_F(Methods, StepsThatDoNotGoTogetherAreRefused) {
  EXPECT_NE(message_of("recent+adakv").find("has none"), std::string::npos);
  EXPECT_NE(message_of("recent+chunks").find("has none"), std::string::npos);
  EXPECT_NE(message_of("snapkv+pyramid+adakv").find("second budget"), std::string::npos);
  EXPECT_NE(message_of("pyramid").find("is a step of a policy"), std::string::npos);
  EXPECT_NE(message_of("snapkv+snapkv").find("is a policy"), std::string::npos);
  EXPECT_NE(message_of("oracle-reconstruction+pyramid").find("keeps exactly the capacity"), std::string::npos);
  EXPECT_NE(message_of("full+pyramid").find("would change nothing"), std::string::npos);
  EXPECT_NE(message_of("tova+adakv").find("granularity layer"), std::string::npos);
  EXPECT_NE(message_of("criticalkv(base=recent)").find("must be a policy with scores"), std::string::npos);
}

// Accumulated attention as KVCache-Factory's H2OKVCluster sums it, in double: every query masked causally, or, as
// before its commit 9f9aa2e, the last `window` alone.
Eigen::VectorXd accumulated(const Head& head, const TraceHead& source, int member, bool causal, int window) {
  const int prompt = head.rows();
  const Eigen::MatrixXd keys = head.keys().cast<double>();
  const Eigen::MatrixXd queries = source.queries(member, 0, prompt).cast<double>();
  Eigen::VectorXd sums = Eigen::VectorXd::Zero(prompt);
  for (int position = 0; position < prompt; ++position) {
    const bool masked = causal || position >= prompt - window;
    const int seen = masked ? position + 1 : prompt;
    Eigen::VectorXd weights = (keys.topRows(seen) * queries.row(position).transpose() / std::sqrt(8.0)).array().exp();
    sums.head(seen) += weights / weights.sum();
  }
  return sums;
}

std::vector<int> best_and_window(const Eigen::VectorXd& sums, int capacity, int window) {
  std::vector<int> order(static_cast<std::size_t>(sums.size() - window));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&sums](int a, int b) { return sums(a) > sums(b); });
  order.resize(static_cast<std::size_t>(capacity - window));
  for (int position = static_cast<int>(sums.size()) - window; position < sums.size(); ++position) {
    order.push_back(position);
  }
  std::ranges::sort(order);
  return order;
}

TEST_F(Methods, BothStatesOfKVCacheFactorysH2O) {
  open({.num_layers = 4,
        .num_attention_heads = 6,
        .num_key_value_heads = 3,
        .hidden_size = 40,
        .attention_mass = false});
  constexpr int kWindow = 4;
  constexpr int kCapacity = 20;
  const std::vector<TraceReplay> replays =
      run(*trace_,
          {"h2o@kvcache-factory(window=4)", "h2o@kvcache-factory-before-9f9aa2e(window=4)",
           "h2o@kvcache-factory(window=4,heads=kv)", "h2o@kvcache-factory(window=4,heads=kv,share=max)",
           "h2o@kvcache-factory(window=4,heads=kv,share=sum)"},
          {fmt::format("{}", kCapacity)});
  const std::vector<ReplayResult>& results = replays.at(0).results;
  int differing = 0;
  for (int layer = 0; layer < 4; ++layer) {
    for (int kv_head = 0; kv_head < 3; ++kv_head) {
      const TraceHead source(*trace_, layer, kv_head, 60);
      const Head head(source);
      std::vector<Eigen::VectorXd> today;
      for (int member = 0; member < 2; ++member) {
        const int query_head = 2 * kv_head + member;
        today.push_back(accumulated(head, source, member, true, kWindow));
        const std::vector<int> causal = best_and_window(today.back(), kCapacity, kWindow);
        const std::vector<int> before =
            best_and_window(accumulated(head, source, member, false, kWindow), kCapacity, kWindow);
        EXPECT_EQ(results[0].kept.of_query_head(layer, query_head, 2), causal);
        EXPECT_EQ(results[1].kept.of_query_head(layer, query_head, 2), before);
        differing += causal != before ? 1 : 0;
      }
      const Eigen::VectorXd sum = today[0] + today[1];
      EXPECT_EQ(results[2].kept.of_query_head(layer, 2 * kv_head, 2), best_and_window(sum, kCapacity, kWindow));
      EXPECT_EQ(results[3].kept.of_query_head(layer, 2 * kv_head, 2),
                best_and_window(today[0].cwiseMax(today[1]), kCapacity, kWindow));
      EXPECT_EQ(results[4].kept.of_query_head(layer, 2 * kv_head, 2), best_and_window(sum, kCapacity, kWindow));
    }
  }
  EXPECT_GT(differing, 12);
  EXPECT_EQ(results[0].kept.granularity, Granularity::query);
  EXPECT_EQ(results[2].kept.granularity, Granularity::kv);
}

TEST_F(Methods, AVariantWhoseMeaningChangedSaysSo) {
  const std::vector<std::string> notes = run(*trace_, {"h2o@kvcache-factory"}, {"40"}).at(0).notes;
  const auto says = [&notes](const std::string& what) {
    return std::ranges::any_of(notes, [&what](const std::string& note) { return note.find(what) != note.npos; });
  };
  EXPECT_TRUE(says("c97f9d7"));
  EXPECT_TRUE(says("is h2o@kvcache-factory-before-9f9aa2e"));
}

// The maximum over positions of the mean over heads, and not the mean of the heads' maxima.
TEST_F(Methods, KVCacheFactorysSnapKVPoolsWhatAGroupShares) {
  const std::string arguments = "(window=4,kernel=3,heads=kv)";
  const KeptSets kept = run(*trace_, {"snapkv@kvcache-factory" + arguments}, {"16"}).at(0).results[0].kept;
  const Policy raw = make_policy("snapkv(window=4,kernel=1)");
  int differing = 0;
  for (int layer = 0; layer < 4; ++layer) {
    for (int kv_head = 0; kv_head < 3; ++kv_head) {
      const TraceHead source(*trace_, layer, kv_head, 60);
      const Head head(source);
      std::vector<float> first(60);
      std::vector<float> second(60);
      raw.ranking()->score(head, 0, first);
      raw.ranking()->score(head, 1, second);
      const auto pooled = [](const auto& score_of) {
        Eigen::VectorXd most_nearby(60);
        for (int n = 0; n < 56; ++n) {
          double most = 0;
          for (int neighbour = std::max(0, n - 1); neighbour <= std::min(55, n + 1); ++neighbour) {
            most = std::max(most, score_of(static_cast<std::size_t>(neighbour)));
          }
          most_nearby(n) = most;
        }
        return most_nearby;
      };
      const auto expected =
          best_and_window(pooled([&](std::size_t n) { return static_cast<double>(first[n] + second[n]); }), 16, 4);
      const auto pooled_first =
          best_and_window(pooled([&](std::size_t n) { return static_cast<double>(first[n]); }) +
                              pooled([&](std::size_t n) { return static_cast<double>(second[n]); }),
                          16, 4);
      EXPECT_EQ(kept.of_query_head(layer, 2 * kv_head, 2), expected) << layer << ", " << kv_head;
      differing += expected != pooled_first ? 1 : 0;
    }
  }
  EXPECT_GT(differing, 0);
}

// What kvpress 0.5.5 kept of so many positions when it ran; everybody else rounds a share down.
TEST_F(Methods, VariantsOfKvpressCountSharesAsItDoes) {
  struct Count {
    std::string share;
    int length, kept, rounded_down;
  };
  for (const Count& count : {Count{"50%", 7, 3, 3}, Count{"10%", 100, 9, 10}, Count{"10%", 1000, 99, 100},
                             Count{"20%", 20, 3, 4}, Count{"50%", 1, 1, 1}, Count{"30%", 10, 3, 3}}) {
    open({.num_layers = 1,
          .num_attention_heads = 2,
          .num_key_value_heads = 1,
          .prompt_length = count.length,
          .num_tokens = count.length + 2});
    const auto replays = run(*trace_, {"h2o@kvpress", "h2o(window=0,normalize=true)"}, {count.share});
    const std::vector<ReplayResult>& results = replays.at(0).results;
    EXPECT_EQ(results[0].capacity, count.kept) << count.share << " of " << count.length;
    EXPECT_EQ(results[0].kept.mean_size(), count.kept) << count.share << " of " << count.length;
    EXPECT_EQ(results[1].kept.mean_size(), count.rounded_down) << count.share << " of " << count.length;
    const bool told = std::ranges::any_of(replays[0].notes, [&count](const std::string& note) {
      return note == fmt::format("h2o@kvpress: {} of {} positions are {}, and not {}, as its code counts", count.share,
                                 count.length, count.kept, count.rounded_down);
    });
    EXPECT_EQ(told, count.kept != count.rounded_down) << count.share << " of " << count.length;
  }
  // A count is a count.
  open({.num_layers = 1, .prompt_length = 1000, .num_tokens = 1001});
  const auto counted =
      run(*trace_, {"h2o@kvpress", "tova@kvpress", "snapkv@kvpress", "streamingllm@kvpress"}, {"100", "10%"});
  for (const ReplayResult& result : counted.at(0).results) {
    EXPECT_EQ(result.kept.mean_size(), result.capacity_request == "100" ? 100 : 99) << result.policy;
  }
}

// 45 % of 1,000 are 449.99999999999994 to kvpress, of which PyramidKVPress takes the fraction along and rounds at last.
// Where the window does not fit the last layer all get the share, rounded.
TEST_F(Methods, KvpressDrawsItsPyramidFromTheUnroundedShare) {
  const auto sizes = [this](const std::string& spec, const std::string& capacity) {
    const KeptSets kept = run(*trace_, {spec}, {capacity}).at(0).results[0].kept;
    std::vector<std::size_t> of_layers;
    for (int layer = 0; layer < trace_->info().model.num_layers; ++layer) {
      of_layers.push_back(kept.of_query_head(layer, 0, 2).kept().size());
    }
    return of_layers;
  };
  open({.num_layers = 4, .prompt_length = 1000, .num_tokens = 1001});
  EXPECT_EQ(sizes("pyramidkv@kvpress(beta=3)", "45%"), (std::vector<std::size_t>{750, 550, 350, 150}));
  EXPECT_EQ(sizes("pyramidkv@kvpress(beta=3)", "449"), (std::vector<std::size_t>{748, 549, 349, 150}));
  EXPECT_EQ(sizes("pyramidkv@kvpress", "10%"), (std::vector<std::size_t>{100, 100, 100, 100}));
  open({.num_layers = 1, .prompt_length = 1000, .num_tokens = 1001});
  EXPECT_EQ(sizes("pyramidkv@kvpress(beta=3)", "45%"), (std::vector<std::size_t>{750}));
}

TEST(Variants, NameTheirMethodAndDifferFromItInWhatTheySay) {
  int count = 0;
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) continue;
    ++count;
    EXPECT_NE(find_method(method->variant_of), nullptr) << method->name;
    EXPECT_TRUE(method->name.starts_with(method->variant_of + "@")) << method->name;
    EXPECT_EQ(make_policy(method->name).canonical, method->name);
    EXPECT_NE(method->revision, "") << method->name;
  }
  EXPECT_GE(count, 10);
  EXPECT_EQ(make_policy("snapkv@rest-kv").granularity, Granularity::query);
  EXPECT_EQ(make_policy("snapkv@kvpress").granularity, Granularity::kv);
  EXPECT_EQ(make_policy("snapkv@kvpress").minimum_capacity(), 64);
}

}  // namespace
}  // namespace kvreplay::test
