// ChunkKV's selection (arXiv 2502.00299): neighbouring tokens carry a meaning together and stay together.
//
// The ranked positions are cut into chunks of `size` from the first one on, and whole chunks are taken by the mean of
// their scores (paper, section 3), the earlier first among equals. The paper and kvpress keep as many whole chunks as
// the ratio asks for; here the capacity is kept exactly: the first chunk that does not fit gives its best positions.
#include <algorithm>
#include <numeric>

#include "policy/policy.h"

namespace kvreplay {
namespace {

class Chunks : public Selection {
 public:
  explicit Chunks(int size) : size_(size) {}

  std::vector<int> select(std::span<const float> scores, Protection protection, int capacity) const override {
    const int rows = static_cast<int>(scores.size());
    if (capacity >= rows) return select_top(scores, protection, capacity);
    const int last = rows - protection.window;
    struct Chunk {
      int first;
      int count;
      double mean;
    };
    std::vector<Chunk> chunks;
    for (int first = protection.sinks; first < last; first += size_) {
      const int count = std::min(size_, last - first);
      const auto members = scores.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      chunks.push_back({first, count, std::accumulate(members.begin(), members.end(), 0.0) / count});
    }
    std::ranges::stable_sort(chunks, [](const Chunk& a, const Chunk& b) { return a.mean > b.mean; });
    std::vector<int> kept(static_cast<std::size_t>(protection.sinks));
    std::iota(kept.begin(), kept.end(), 0);
    int room = capacity - protection.count();
    for (const Chunk& chunk : chunks) {
      const auto members = scores.subspan(static_cast<std::size_t>(chunk.first), static_cast<std::size_t>(chunk.count));
      for (const int offset : room > 0 ? select_top(members, {}, room) : std::vector<int>{}) {
        kept.push_back(chunk.first + offset);
      }
      room -= chunk.count;
      if (room <= 0) break;
    }
    for (int position = last; position < rows; ++position) kept.push_back(position);
    std::ranges::sort(kept);
    return kept;
  }

 private:
  int size_;
};

const MethodRegistration chunks([] {
  return Method{
      .name = "chunks",
      .step = Method::Step::selection,
      .summary = "Keeps whole chunks of neighbouring positions, by the mean of their scores.",
      .source = "arXiv 2502.00299, section 3",
      .parameters = {Parameter::integer("size", 10, 1, "positions per chunk").of(Parameter::Step::selection)},
      .compose =
          [](const Arguments& a) { return Composition{.selection = std::make_shared<Chunks>(a.integer("size"))}; },
  };
});

}  // namespace
}  // namespace kvreplay
