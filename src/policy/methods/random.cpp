// Positions drawn at random: what a policy must beat to have learnt anything.
#include "policy/policy.h"

namespace kvreplay {
namespace {

// SplitMix64's output function: every bit of the input moves every bit of the output.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

class Random : public Ranking {
 public:
  explicit Random(int seed) : seed_(static_cast<std::uint64_t>(seed)) {}

  // A score is a function of seed, layer, query head and position alone, so that no order of work can change it.
  void score(const Head& head, int member, std::span<float> scores) const override {
    const HeadShape& shape = head.shape();
    const std::uint64_t stream = mix(mix(mix(seed_) ^ static_cast<std::uint64_t>(shape.layer)) ^
                                     static_cast<std::uint64_t>(shape.query_head(member)));
    for (std::size_t row = 0; row < scores.size(); ++row) {
      const auto position = static_cast<std::uint64_t>(head.positions()[static_cast<int>(row)]);
      scores[row] = static_cast<float>(mix(stream ^ position) >> 40);
    }
  }

 private:
  std::uint64_t seed_;
};

const MethodRegistration random([] {
  return Method{
      .name = "random",
      .summary = "Keeps positions drawn uniformly, each head its own; the same seed draws the same positions.",
      .source = "baseline",
      .parameters = {Parameter::integer("seed", 0, 0, "which draw").of(Parameter::Step::draw)},
      .compose = [](const Arguments& a) { return Composition{.rule = std::make_shared<Random>(a.integer("seed"))}; },
      .baseline = Method::Baseline::floor,
  };
});

}  // namespace
}  // namespace kvreplay
