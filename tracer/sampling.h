// Which token a model writes next.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <string>

namespace kvreplay::tracer {

/// How the next token is chosen.
struct SamplingOptions {
  double temperature = 0;  ///< what logits are divided by before the softmax; 0: the most likely token is taken
  int top_k = 0;           ///< draws from the so many most likely tokens alone; 0: from all
  double top_p = 1;        ///< and of these from the fewest most likely ones that have this share of their probability
  std::uint64_t seed = 0;  ///< of what is drawn
};

/// Throws UsageError where there is no such distribution.
void check_sampling(const SamplingOptions& options);

/// Such as "greedy decoding", or "sampling at temperature 0.7, top-p 0.9, seed 3".
std::string description(const SamplingOptions& options);

/// Chooses the tokens of one text, one after the other: the same ones for the same logits and seed on every machine
/// whose exponential function is the same, since numbers are drawn by std::mt19937_64, the upper 53 bits of each of
/// which are one in [0, 1).
class Sampler {
 public:
  /// Precondition: check_sampling() has nothing against them.
  explicit Sampler(const SamplingOptions& options) : options_(options), generator_(options.seed) {}

  /// The token whose part of the cumulative distribution, in the order of ids, the next number falls into. Of equally
  /// likely tokens that top_k and top_p do not all leave, the lowest ids stay. `logits` are finite and not empty.
  std::int32_t next(std::span<const float> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 generator_;
};

}  // namespace kvreplay::tracer
