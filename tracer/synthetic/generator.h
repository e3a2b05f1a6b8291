// The elements of a synthetic trace's tensors, row by row: any of them can be made alone, by any thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "base/matrix.h"
#include "tracer/synthetic/synthetic.h"

namespace kvreplay::tracer {

/// Which dimensions of a head carry what.
struct Channels {
  explicit Channels(int head_dim)
      : dim(head_dim),
        pairs(std::max(2, head_dim / 4)),
        sink(2 * pairs),
        heavy(sink + 1),
        evidence(heavy + 1),
        evidence_count(std::max(1, head_dim / 8)),
        content(evidence + evidence_count) {}

  Index dim;
  Index pairs;  ///< the cosines of all pairs come first, then the sines
  Index sink;
  Index heavy;
  Index evidence;
  Index evidence_count;
  Index content;  ///< the rest

  Index content_count() const { return dim - content; }
};

/// How a query head makes its queries.
struct QueryPlan {
  HeadRole role = HeadRole::local;
  float sink = 0;  ///< the query's components, along the channels
  float heavy = 0;
  float evidence = 0;
  std::vector<float> pairs;    ///< their lengths
  std::vector<float> content;  ///< what it likes at any position
  float content_noise = 0;
  bool backward = false;  ///< the way of a drifting region
  std::uint64_t noise = 0;
};

/// How a KV head makes its values: what is the same for all of them.
struct ValuePlan {
  std::uint64_t noise = 0;
  std::uint64_t length = 0;
  std::vector<float> mean;
  std::vector<float> directions;             ///< [kSharedDirections, D]
  std::vector<std::vector<float>> evidence;  ///< per span
};

/// How far each pair of dimensions turns from one position to the next, in radians.
std::vector<double> frequencies_of(const SyntheticTrace& trace);

/// Makes the tensors' elements.
class Generator {
 public:
  /// Throws UsageError as describe() does.
  explicit Generator(const SyntheticTrace& trace);

  const TraceInfo& info() const { return info_; }

  /// Keys [count, D] of the positions from `first` on.
  void keys(int layer, int kv_head, Index first, Index count, float* out) const;

  ValuePlan plan_values(int layer, int kv_head) const;

  /// Values [count, D] of the positions from `first` on.
  void values(const ValuePlan& plan, Index first, Index count, float* out) const;

  QueryPlan plan_queries(int layer, int head) const;

  /// One query [D].
  void query(const QueryPlan& plan, Index position, float* out) const;

  /// Rows [count, H·D] of a layer's output projection from `first` on: normal, with a deviation that keeps lengths, and
  /// rows and columns of different lengths, so that its singular values spread more than those of noise.
  void projection(int layer, Index first, Index count, float* out) const;

 private:
  // How a head that is turned to a position attends around it.
  struct Aim {
    Index first_pair = 0;  // slower ones follow; faster ones would make the band narrower
    double each = 0;       // largest logit of a pair
    double far = 0;        // log of the mean of exp(logit) far from the position
  };

  // Cosines and sines of all frequencies at `count` positions, `step` apart.
  std::vector<float> rotations(Index count, Index step) const;

  // A query turned to position c has the logit a Σ cos(ω (c - n)) for the key at n: largest at c, and far from it,
  // where the pairs are out of step, sometimes large as well. Finds a such that the `width` nearest keys on one side
  // draw `share` times what the farther ones do, or the largest where it takes very large logits.
  Aim aim(Index first_pair, Index width, double share) const;

  // Where a drifting head looks: to and fro between a quarter and 85 % of what came before the query, one way taking
  // kDriftTokens queries, of which half are the prompt's last.
  Index region_centre(const QueryPlan& plan, Index position) const;

  SyntheticTrace trace_;
  Channels channels_;
  TraceInfo info_;
  std::vector<int> heavy_;
  std::vector<double> frequencies_;  // in radians per position
  std::vector<float> key_noise_;     // [D], deviations
  std::array<Aim, 2> bands_;         // of local heads
  Aim region_;                       // of drifting heads
  std::vector<float> fine_;          // rotations of the first positions
  std::vector<float> coarse_;        // of every so many positions
};

}  // namespace kvreplay::tracer
