// KVzip's scores and kept sets against kvpress' own, on a capture that repeats its prompt; and +global alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <numeric>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "replay/replay.h"
#include "replay/trace_source.h"
#include "support/places.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::HasSubstr;

// The prompt of 260 tokens, a request of 7, and the 260 again; the calls are with the prompt's own capture.
const std::filesystem::path kRepeat = test_data() / "methods-gqa-repeat.h5";
const std::filesystem::path kCalls = golden_folder() / "methods-gqa.h5";
constexpr int kContext = 260;

ReplayRequest at_context_end(const std::string& spec, const std::string& capacity) {
  ReplayRequest request = make_request({spec}, {capacity});
  request.eviction_positions = {kContext};
  return request;
}

TEST(KVzip, ScoresAreTheLargestAttentionOfTheRepetition) {
  const TraceReader trace(kRepeat);
  const hdf5::File golden = hdf5::File::open(kCalls);
  const std::vector<float> scores = golden.read_floats("/golden/kvzip-r0.5/scores");
  const Policy policy = make_policy("kvzip");
  const ModelInfo& model = trace.info().model;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    for (int kv_head = 0; kv_head < model.num_key_value_heads; ++kv_head) {
      const TraceHead source(trace, layer, kv_head, kContext);
      const Head head(source);
      std::vector<float> largest(kContext, 0.0f);
      for (int member = 0; member < model.group_size(); ++member) {
        std::vector<float> own(kContext);
        policy.ranking()->score(head, member, own);
        for (std::size_t n = 0; n < own.size(); ++n) largest[n] = std::max(largest[n], own[n]);
      }
      const auto row = static_cast<std::size_t>(layer * model.num_key_value_heads + kv_head) * kContext;
      for (std::size_t n = 4; n < largest.size(); ++n) {
        ASSERT_NEAR(largest[n], scores[row + n], 1e-4f * scores[row + n] + 1e-7f)
            << layer << " " << kv_head << " " << n;
      }
    }
  }
}

TEST(KVzip, KeepsWhatKvpressKeeps) {
  const TraceReader trace(kRepeat);
  const hdf5::File golden = hdf5::File::open(kCalls);
  const std::map<std::string, std::pair<std::string, std::string>> calls = {
      {"kvzip-r0.5", {"kvzip@kvpress", "130"}},
      {"kvzip-r0.75", {"kvzip@kvpress", "65"}},
      {"kvzip-layerwise-r0.5", {"kvzip@kvpress(across=layer)", "130"}},
      {"kvzip-layerwise-r0.75", {"kvzip@kvpress(across=layer)", "65"}},
  };
  for (const auto& [id, call] : calls) {
    const std::vector<std::int64_t> kept = golden.read_int64s("/golden/" + id + "/kept");
    const std::vector<std::int64_t> offsets = golden.read_int64s("/golden/" + id + "/offsets");
    const auto replays = replay(trace, at_context_end(call.first, call.second));
    const KeptSets& ours = replays.at(0).results.at(0).kept;
    ASSERT_EQ(ours.sets.size() + 1, offsets.size());
    int differing = 0;
    for (std::size_t set = 0; set < ours.sets.size(); ++set) {
      const std::vector<int> theirs(kept.begin() + offsets[set], kept.begin() + offsets[set + 1]);
      std::vector<int> either;
      std::ranges::set_symmetric_difference(ours.sets[set].kept(), theirs, std::back_inserter(either));
      differing += static_cast<int>(either.size());
    }
    // A position that is in by rounding puts another one out.
    EXPECT_LE(differing, 2) << id;
  }
}

TEST(KVzip, RefusesACaptureThatDoesNotRepeatItsContext) {
  const TemporaryFolder folder;
  RandomTrace().write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const auto message = [&](const ReplayRequest& request) -> std::string {
    try {
      replay(trace, request);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message(make_request({"kvzip"}, {"20"})),
              HasSubstr("the prompt ends there; capture a prompt that repeats"));
  RandomTrace some;
  some.captured_prompt_queries = 10;
  some.write(folder / "some.h5");
  ReplayRequest early = make_request({"kvzip"}, {"20"});
  early.eviction_positions = {30};
  try {
    replay(TraceReader(folder / "some.h5"), early);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("the 30 queries of the prompt from position 30 on, and the trace holds 10"));
  }
}

TEST(GlobalBudget, TheBestOfTheModelAreKept) {
  const TemporaryFolder folder;
  RandomTrace{.num_layers = 3}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  const auto replays = replay(trace, make_request({"random+global", "random"}, {"12"}));
  const KeptSets& kept = replays.at(0).results.at(0).kept;
  std::size_t positions = 0;
  for (const Residency& set : kept.sets) positions += set.kept().size();
  EXPECT_EQ(positions, 12 * kept.sets.size());
  // Whatever is kept anywhere scores at least what is evicted anywhere else.
  const Policy policy = make_policy("random");
  const ModelInfo& model = trace.info().model;
  float lowest_kept = std::numeric_limits<float>::max();
  float highest_evicted = 0;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    for (int kv_head = 0; kv_head < model.num_key_value_heads; ++kv_head) {
      const TraceHead source(trace, layer, kv_head, 60);
      const Head head(source);
      std::vector<float> shared(60, 0.0f);
      for (int member = 0; member < model.group_size(); ++member) {
        std::vector<float> own(60);
        policy.ranking()->score(head, member, own);
        for (std::size_t n = 0; n < own.size(); ++n) shared[n] += own[n];
      }
      for (int n = 0; n < 60; ++n) {
        const float score = shared[static_cast<std::size_t>(n)] / static_cast<float>(model.group_size());
        const std::span<const int> set =
            kept.sets[static_cast<std::size_t>(layer * model.num_key_value_heads + kv_head)].kept();
        if (std::ranges::binary_search(set, n)) {
          lowest_kept = std::min(lowest_kept, score);
        } else {
          highest_evicted = std::max(highest_evicted, score);
        }
      }
    }
  }
  EXPECT_GE(lowest_kept, highest_evicted);
}

}  // namespace
}  // namespace kvreplay::test
