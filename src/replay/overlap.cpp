#include "replay/overlap.h"

#include <algorithm>

#include "base/parallel.h"

namespace kvreplay {

SetOverlap overlap(std::span<const int> a, std::span<const int> b) {
  if (a.empty() && b.empty()) return {};
  std::size_t common = 0;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i] == b[j]) ++common;
    const bool advance_a = a[i] <= b[j];
    const bool advance_b = b[j] <= a[i];
    i += advance_a ? 1 : 0;
    j += advance_b ? 1 : 0;
  }
  const auto shared = static_cast<float>(common);
  const std::size_t smaller = std::min(a.size(), b.size());
  return {.jaccard = shared / static_cast<float>(a.size() + b.size() - common),
          .containment = smaller == 0 ? 1.0f : shared / static_cast<float>(smaller)};
}

SetOverlap overlap(const Residency& a, const Residency& b, std::span<const int> queries) {
  if (a.is_one_eviction() && b.is_one_eviction()) return overlap(a.kept(), b.kept());
  // What both have changes only after a last query of one of them.
  SetOverlap now;
  int unchanged_until = -1;
  double jaccard = 0;
  double containment = 0;
  for (const int query : queries) {
    if (query > unchanged_until) {
      unchanged_until = Residency::kNever;
      const auto still_kept = [&](const Residency& residency) {
        std::vector<int> kept;
        for (std::size_t i = 0; i < residency.kept().size(); ++i) {
          const int until = residency.is_one_eviction() ? Residency::kNever : residency.until()[i];
          if (until < query) continue;
          kept.push_back(residency.kept()[i]);
          unchanged_until = std::min(unchanged_until, until);
        }
        return kept;
      };
      now = overlap(still_kept(a), still_kept(b));
    }
    jaccard += static_cast<double>(now.jaccard);
    containment += static_cast<double>(now.containment);
  }
  const auto count = static_cast<double>(queries.size());
  return {.jaccard = static_cast<float>(jaccard / count), .containment = static_cast<float>(containment / count)};
}

std::vector<OverlapTable> overlaps(const TraceReplay& replay) {
  const ModelInfo& model = replay.model;
  std::vector<const ReplayResult*> whole;  // kept whatever the capacity, and so compared at each
  for (const ReplayResult& result : replay.results) {
    if (result.capacity_request == kAllPositions) whole.push_back(&result);
  }
  std::vector<std::vector<const ReplayResult*>> groups;
  for (const ReplayResult& result : replay.results) {
    if (result.capacity_request == kAllPositions) continue;
    const auto group = std::ranges::find_if(
        groups, [&result](const auto& g) { return g.back()->capacity_request == result.capacity_request; });
    if (group == groups.end()) {
      groups.push_back(whole);
      groups.back().push_back(&result);
    } else {
      group->push_back(&result);
    }
  }
  std::vector<OverlapTable> tables;
  for (const auto& group : groups) {
    const auto policies = static_cast<Index>(group.size());
    const std::vector<Index> shape = {policies, policies, model.num_layers, model.num_attention_heads};
    OverlapTable table{.trace = replay.trace,
                       .capacity_request = group.back()->capacity_request,
                       .eviction_position = replay.eviction_position,
                       .policies = {},
                       .jaccard = Table::of_shape(shape),
                       .containment = Table::of_shape(shape)};
    for (const ReplayResult* result : group) table.policies.push_back(result->policy);
    parallel_for(model.num_layers, [&](int layer) {
      for (Index a = 0; a < policies; ++a) {
        for (Index b = 0; b < policies; ++b) {
          for (int head = 0; head < model.num_attention_heads; ++head) {
            const auto kept = [&](Index policy) -> const Residency& {
              return group[static_cast<std::size_t>(policy)]->kept.of_query_head(layer, head, model.group_size());
            };
            const SetOverlap found = overlap(kept(a), kept(b), replay.evaluation_positions);
            const auto at = static_cast<std::size_t>(
                ((a * policies + b) * model.num_layers + layer) * model.num_attention_heads + head);
            table.jaccard.numbers[at] = found.jaccard;
            table.containment.numbers[at] = found.containment;
          }
        }
      }
    });
    tables.push_back(std::move(table));
  }
  return tables;
}

}  // namespace kvreplay
