// Eviction at the turns of a conversation, and traces that lie in pieces.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <vector>

#include "replay/engine.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"
#include "trace/writer.h"

namespace kvreplay::test {
namespace {

using testing::HasSubstr;

TEST(Turns, EvictsBeforeEveryTurnThatIsMarked) {
  const TemporaryFolder folder;
  const RandomTrace shape{.prompt_length = 60, .num_tokens = 90, .turn_starts = {0, 40, 66, 80}};
  shape.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  ReplayRequest request = make_request({"snapkv(window=4)+turns"}, {"16"});
  request.strict = true;
  for (const int eviction : {40, 60}) {
    request.eviction_positions = {eviction};
    const ReplayResult result = replay({&trace, 1}, request).front().results.front();
    for (const Residency& set : result.kept.sets) {
      int last = eviction;  // where a turn begins
      for (int query = eviction; query < 90; ++query) {
        if (query == 66 || query == 80) last = query;
        EXPECT_EQ(set.count_at(query, eviction), 16 + query - last + 1) << query;
      }
    }
  }
}

TEST(Turns, AreLeftOutWhereNoneIsMarked) {
  const TemporaryFolder folder;
  const auto note_of = [&folder](const std::vector<int>& turns) {
    const RandomTrace shape{.prompt_length = 60, .num_tokens = 90, .turn_starts = turns};
    shape.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    return replay({&trace, 1}, make_request({"knorm+turns", "knorm"}, {"16"})).front().notes.front();
  };
  EXPECT_THAT(note_of({}), HasSubstr("the trace marks none from position 60 on; capture with --turns"));
  EXPECT_THAT(note_of({0, 40}), HasSubstr("evict where one begins, as with --evict-at 40"));
}

// The tensors of `shape` as a capture writes them whose prompt came in pieces of so many tokens.
void write_in_pieces(const RandomTrace& shape, const std::filesystem::path& path, int tokens) {
  const RandomTrace::Tensors all = shape.tensors();
  TraceWriter writer(path, shape.info(), shape.type, 1);
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    for (int first = 0; first < shape.num_tokens; first += tokens) {
      const int count = std::min(tokens, shape.num_tokens - first);
      const auto write = [&](HeadTensor tensor, const std::vector<float>& rows, int heads) {
        for (int head = 0; head < heads; ++head) {
          const auto place = static_cast<std::size_t>((head * shape.num_tokens + first) * shape.head_dim);
          writer.write_rows(layer, tensor, head, first,
                            std::span(rows).subspan(place, static_cast<std::size_t>(count * shape.head_dim)));
        }
      };
      write(HeadTensor::keys, all.keys[l], shape.num_key_value_heads);
      write(HeadTensor::values, all.values[l], shape.num_key_value_heads);
      write(HeadTensor::queries, all.queries[l], shape.num_attention_heads);
      write(HeadTensor::outputs, all.outputs[l], shape.num_attention_heads);
    }
    writer.write_output_projection(layer, all.projection[l]);
    writer.write_attention_mass(layer, all.mass[l]);
  }
  writer.finish();
}

TEST(Pieces, OfATraceGiveTheBitsOfOne) {
  const TemporaryFolder folder;
  const RandomTrace shape{.prompt_length = 260, .num_tokens = 330, .turn_starts = {0, 120, 270}};
  shape.write(folder / "one.h5");
  write_in_pieces(shape, folder / "pieces.h5", 100);
  // A prompt that is evicted piece by piece while it is read, and what is generated after it.
  ReplayRequest request =
      make_request({"snapkv(window=8)+every(100)", "h2o(window=8)+every(interval=100,attend=before)", "tova+turns",
                    "streamingllm@streaming-llm", "snapkv(window=8)"},
                   {"110"});
  request.eviction_positions = {100};
  request.strict = true;
  const TraceReader one(folder / "one.h5");
  const TraceReader pieces(folder / "pieces.h5");
  const std::vector<ReplayResult> expected = replay({&one, 1}, request).front().results;
  const std::vector<ReplayResult> found = replay({&pieces, 1}, request).front().results;
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].kept.sets, expected[i].kept.sets) << found[i].policy;
    for (const Measure measure : {Measure::layer_error, Measure::head_error, Measure::attention_recall}) {
      EXPECT_EQ(found[i].measures[measure].numbers, expected[i].measures[measure].numbers) << found[i].policy;
    }
  }
}

}  // namespace
}  // namespace kvreplay::test
