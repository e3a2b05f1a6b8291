// Retention overlap: how far two policies keep the same positions.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "replay/result.h"

namespace kvreplay {

/// Overlap of two kept sets.
struct SetOverlap {
  float jaccard = 1;      ///< |a ∩ b| / |a ∪ b|; 1 for two empty sets
  float containment = 1;  ///< |a ∩ b| / min(|a|, |b|): the share of the smaller one that the other also has
};

/// Both sets ascending.
SetOverlap overlap(std::span<const int> a, std::span<const int> b);

/// After one eviction, at `eviction_position`, that of the kept sets. Where one of the two was evicted more often, of
/// all that each of the queries, ascending and not before the eviction, sees beside its own position, mean over them.
SetOverlap overlap(const Residency& a, const Residency& b, std::span<const int> queries, int eviction_position);

/// Overlap between all policies of a run at one capacity, mean over the evaluation queries.
struct OverlapTable {
  std::string trace;
  std::string capacity_request;
  int eviction_position = 0;
  std::vector<std::string> policies;  ///< N canonical specs
  Table jaccard;                      ///< [N, N, L, H]
  Table containment;                  ///< [N, N, L, H]
};

/// One table per capacity asked for, in the order of the results, of all policies of the run; those that keep
/// everything come first in each.
std::vector<OverlapTable> overlaps(const TraceReplay& replay);

}  // namespace kvreplay
