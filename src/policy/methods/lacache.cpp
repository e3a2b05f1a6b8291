// LaCache (arXiv 2507.14204): a ladder over the layers, so that together they remember further back.
//
// After the sinks, each position is kept by `span` neighbouring layers only; deeper layers keep later positions, and
// the pattern repeats along the prompt like the rungs of a ladder. Sinks and the most recent positions are kept by all
// layers (paper, section 3). No key, value or query is looked at.
//
// This draws what the authors' code (LongBench/lacache/kv_cache.py) keeps after one call on the whole prompt, their
// rounding included: layers keep a few positions more or fewer than the capacity, and with little room for the ladder
// far fewer; what was used is reported. When a ladder through the prompt once does not save enough, their code starts
// over on what is left, and so on; there it can gather a position twice, which here is kept once. `span` is by default
// half the layers (the authors' 16 of 32).
//
// Under a schedule, and as lacache@lacache, it goes on from what it left, as their class does: a cursor moves along the
// cache, the rungs before it are left alone, and where what is behind it cannot save enough, it starts over at the
// sinks. The capacity grows once, at the first eviction, by half of what a rung saves. Several rows may go at once, so
// that there are steps without an eviction. Where no rung saves anything their code divides by zero; here sinks and
// recent positions stay.
//
// A position can only be kept by neighbours that hold it: layers whose sliding window leaves them fewer positions draw
// a ladder among themselves, over what they hold.
#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

int divided_up(int a, int b) { return (a + b - 1) / b; }

// Where the next rung begins.
class Cursor : public PatternMemory {
 public:
  explicit Cursor(int sinks) : row(sinks) {}

  int row;             // behind the rungs that were drawn since it last started over
  bool grown = false;  // whether the capacity has grown
};

class LaCache : public Pattern {
 public:
  LaCache(int sinks, int span, int overlap) : sinks_(sinks), span_(span), overlap_(overlap) {}

  Protection protection() const override { return {.sinks = sinks_}; }

  // One rung, and a position for every layer.
  int minimum_capacity(const HeadShape& shape) const override {
    const int sinks = shape.held_of_first(sinks_);
    const Rung rung = rung_over(shape.layers_alike);
    if (rung.saved() == 0) return std::max(1, sinks);
    return sinks + shape.layers_alike + rung.kept - rung.saved() / 2;
  }

  void check(const HeadShape& shape) const override {
    const int span = span_over(shape.layers_alike);
    if (overlap_ < span) return;
    throw Error(fmt::format("lacache: overlap {} must be smaller than span {}, which {} layers allow", overlap_, span,
                            shape.layers_alike));
  }

  std::vector<int> keep(const HeadShape& shape, int member, int capacity) const override {
    Cursor start(shape.held_of_first(sinks_));
    return keep_again(shape, member, capacity, start);
  }

  std::unique_ptr<PatternMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<Cursor>(shape.held_of_first(sinks_));
  }

  std::vector<int> keep_again(const HeadShape& shape, int /*member*/, int capacity,
                              PatternMemory& memory) const override {
    auto& cursor = static_cast<Cursor&>(memory);
    const int held = shape.rows();
    const int layers = shape.layers_alike;
    const int layer = shape.layer_among_alike;
    const int sinks = shape.held_of_first(sinks_);
    if (capacity >= held) return range(0, held);
    const auto [rung, kept] = rung_over(layers);
    const int saved = rung - kept;
    if (saved == 0) return sinks_and_recent(sinks, held, capacity);
    capacity += saved / 2;  // so that the mean over layers comes out near the capacity asked for
    if (cursor.grown && capacity >= held) return range(0, held);
    cursor.grown = true;
    const int first = std::min(cursor.row, capacity - layers);
    const int room = capacity - first - layers;
    const int excess = std::max(0, held - capacity);
    const int saved_at_most = room / kept * saved;
    const int rungs = (excess > saved_at_most ? room : divided_up(excess, saved) * kept) / kept;
    std::vector<int> positions = range(0, first);
    add_ladder(positions, first, rungs, rung, kept, layer % (saved + 1), 1);
    add_range(positions, first + rung * rungs, held);
    cursor.row = first + rungs * kept;
    if (excess <= saved_at_most) return positions;

    // Once more from the sinks over what is left, with rungs that are as many times longer as passes would be needed.
    const int passes = divided_up(excess - saved_at_most, (capacity - sinks - layers) / kept * saved);
    const int long_rung = rung + (passes - 1) * (rung - 1);
    const int long_rungs = divided_up(excess - saved_at_most, long_rung - kept);
    std::vector<int> chosen = range(0, sinks);
    add_ladder(chosen, sinks, long_rungs, long_rung, kept, layer % (long_rung - kept + 1), passes);
    add_range(chosen, sinks + long_rung * long_rungs, static_cast<int>(positions.size()));
    cursor.row = sinks + long_rungs * kept;
    std::vector<int> left;
    for (const int index : chosen) {
      if (index < static_cast<int>(positions.size())) left.push_back(positions[static_cast<std::size_t>(index)]);
    }
    std::ranges::sort(left);
    left.erase(std::unique(left.begin(), left.end()), left.end());
    return left;
  }

 private:
  // So many positions of which a layer keeps so many.
  struct Rung {
    int positions;
    int kept;

    int saved() const { return positions - kept; }
  };

  int span_over(int layers) const { return std::min(span_ > 0 ? span_ : std::max(1, layers / 2), layers); }

  Rung rung_over(int layers) const {
    const int span = span_over(layers);
    const int positions = 1 + divided_up(layers - span, span - overlap_);
    return {positions, std::min(divided_up(span, span - overlap_), positions)};
  }

  static std::vector<int> range(int first, int last) {
    std::vector<int> positions;
    add_range(positions, first, last);
    return positions;
  }

  static void add_range(std::vector<int>& positions, int first, int last) {
    for (int position = first; position < last; ++position) positions.push_back(position);
  }

  static void add_ladder(std::vector<int>& positions, int sinks, int rungs, int rung, int kept, int offset, int step) {
    for (int j = 0; j < rungs; ++j) {
      for (int k = 0; k < kept; ++k) positions.push_back(sinks + rung * j + offset + step * k);
    }
  }

  // Where every layer has to keep every rung whole, there is no ladder to draw.
  static std::vector<int> sinks_and_recent(int sinks, int prompt, int capacity) {
    std::vector<int> positions = range(0, sinks);
    add_range(positions, prompt - (capacity - sinks), prompt);
    return positions;
  }

  int sinks_;
  int span_;
  int overlap_;
};

std::vector<Parameter> parameters() {
  return {Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection),
          Parameter::integer("span", 0, 0, "layers that keep the same position; 0: half of the layers")
              .of(Parameter::Step::selection),
          Parameter::integer("overlap", 0, 0, "layers that two rungs have in common").of(Parameter::Step::selection)};
}

std::shared_ptr<const Pattern> pattern_of(const Arguments& a) {
  return std::make_shared<LaCache>(a.integer("sinks"), a.integer("span"), a.integer("overlap"));
}

const MethodRegistration lacache([] {
  return Method{
      .name = "lacache",
      .summary =
          "Keeps sinks, the most recent positions and between them a ladder: every position by a few neighbouring "
          "layers only.",
      .source = "arXiv 2507.14204, section 3",
      .parameters = parameters(),
      .compose = [](const Arguments& a) { return Composition{.rule = pattern_of(a)}; },
  };
});

const MethodRegistration authors_code([] {
  return Method{
      .name = "lacache@lacache",
      .summary =
          "Calls the ladder after every token: a cursor moves along the cache and starts over at the sinks. Keys and "
          "queries are turned to their places in the cache.",
      .source = "github.com/GATECH-EIC/LaCache, LongBench/lacache/kv_cache.py",
      .parameters = parameters(),
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = pattern_of(a), .schedule = Schedule{}, .row_positions = RowPositions::reindexed};
          },
      .variant_of = "lacache",
      .revision = "commit 0f27c33",
  };
});

}  // namespace
}  // namespace kvreplay
