// Step 2 of a policy: smoothing of scores in time (over the observation window) and in space (over positions).
#pragma once

#include <span>
#include <string>
#include <vector>

#include "policy/head.h"

namespace kvreplay {

/// How the queries of the observation window are combined.
enum class Temporal {
  ema,           ///< exponential moving average, oldest first, started at the oldest (ReST-KV, arXiv 2605.08840)
  mean,          ///< all alike
  last,          ///< the last query alone
  reversed_ema,  ///< the moving average from the newest to the oldest
};

/// "ema", "mean", "last" or "reversed-ema"; any other text is a std::invalid_argument.
Temporal temporal_named(const std::string& name);

/// The weight of every query of a window, oldest first; they sum to 1. Every temporal smoothing is this one linear
/// combination: for ema, (1 − α)^(window−1) for the oldest and α(1 − α)^age for the others.
std::vector<float> temporal_weights(Temporal temporal, double alpha, int window);

/// Each query of a window of `window` alone, oldest first, with distances from its own output.
std::vector<WindowCombination> each_query_alone(int window, WindowCombination::Distance distance, bool whole_cache);

/// How scores of neighbouring positions are combined.
enum class Spatial {
  none,
  average,   ///< mean over `kernel` positions; beyond the edges count as 0, and in the divisor (PyTorch's avg_pool1d)
  maximum,   ///< maximum over `kernel` positions
  adaptive,  ///< ReST-KV's adaptive window; see AdaptiveWindow
};

/// "none", "avg", "max" or "adaptive"; any other text is a std::invalid_argument.
Spatial spatial_named(const std::string& name);

/// Those of `scores` [R] that an observation window of `window` queries does not protect: of rows before its positions.
std::span<float> before_window(const Head& head, std::span<float> scores, int window);

/// Pools `scores` in place, over an odd `kernel`. Not for Spatial::adaptive, which pool_adaptive does.
void pool(Spatial spatial, int kernel, std::span<float> scores);

/// Width and shift of the averaging window of ReST-KV's spatial smoothing.
struct AdaptiveWindow {
  int width = 1;
  int shift = 0;

  /// From the drift D_front − D_rear of the most attended positions between the first and the second half of the
  /// observation window: width = max(kernel, 2⌊|drift|/β⌋ + 1), shift = ⌊drift/β⌋ for a positive drift and
  /// ⌊drift/β⌋ + 1 otherwise (arXiv 2605.08840; the floor of a quotient as the authors' code takes it).
  static AdaptiveWindow from_drift(double drift, double beta, int kernel);
};

/// D_front − D_rear: how far the most attended positions lie back in the window's second half compared with its first.
/// D is the mean position of the `count` most attended ones of the prompt, over the queries of half a window of
/// `window` queries. 0 where there is nothing to compare (no positions, or a window of one query).
double attention_drift(const Head& head, int member, int window, int count);

/// Replaces each score by the mean over `window.width` positions centred at its own plus `window.shift`; positions
/// beyond an edge take the edge's score.
void pool_adaptive(AdaptiveWindow window, std::span<float> scores);

/// Pools, of `scores` [R], those of the positions before a window of `window` queries in place, over `kernel`
/// positions; for Spatial::adaptive with the drift of the capacity − window most attended positions, in units of
/// `beta`.
void smooth_in_space(Spatial spatial, int kernel, double beta, const Head& head, int member, int window, int capacity,
                     std::span<float> scores);

/// The error of removing a position that has all of the attention in float32: above any other score, and still finite
/// when it is weighed and summed.
constexpr float kIrreplaceable = 1e30f;

/// How far an output moves when a position with attention a goes: a/(1 − a) times the distance of its value from the
/// output. With a = 1 that is infinity times nothing; PyTorch's top-k, on which the authors' code relies, puts infinity
/// and NaN before all else, so kIrreplaceable stands for both.
inline float removal_error(float attention, float distance) {
  return attention < 1 ? attention / (1 - attention) * distance : kIrreplaceable;
}

/// How lengths count in a reconstruction error.
struct LengthRule {
  double tau = 1;          ///< exponent
  bool normalize = false;  ///< divided by the length of the output first
};

/// ReST-KV's score of one head, a/(1 − a) · ‖W (o − v)‖^τ, for every position that `window` tells the distance of.
void reconstruction_errors(const CombinedAttention& window, LengthRule rule, std::span<float> errors);

}  // namespace kvreplay
