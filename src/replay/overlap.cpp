#include "replay/overlap.h"

#include <algorithm>
#include <utility>

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

SetOverlap overlap(const Residency& a, const Residency& b, std::span<const int> queries, int eviction_position) {
  if (a.is_one_eviction() && b.is_one_eviction()) return overlap(a.kept(), b.kept());
  using Stay = Residency::Stay;
  const std::vector<Stay> of_a = a.seen_between(queries.front(), queries.back(), eviction_position);
  const std::vector<Stay> of_b = b.seen_between(queries.front(), queries.back(), eviction_position);
  // By how much the sizes of the two, and of what they have in common, change at each query.
  struct Change {
    int a = 0;
    int b = 0;
    int both = 0;
  };
  std::vector<Change> changes(queries.size() + 1);
  const auto count = [&](int Change::*what, int position, int from, int until) {
    const auto first = std::ranges::lower_bound(queries, std::max(from, position + 1)) - queries.begin();
    const auto end = std::ranges::upper_bound(queries, until) - queries.begin();
    if (first >= end) return;
    ++(changes[static_cast<std::size_t>(first)].*what);
    --(changes[static_cast<std::size_t>(end)].*what);
  };
  for (const Stay& stay : of_a) count(&Change::a, stay.position, stay.from, stay.until);
  for (const Stay& stay : of_b) count(&Change::b, stay.position, stay.from, stay.until);
  auto first = of_b.begin();
  for (const Stay& stay : of_a) {
    while (first != of_b.end() && first->position < stay.position) ++first;
    for (auto other = first; other != of_b.end() && other->position == stay.position; ++other) {
      count(&Change::both, stay.position, std::max(stay.from, other->from), std::min(stay.until, other->until));
    }
  }
  Change now;
  double jaccard = 0;
  double containment = 0;
  for (std::size_t query = 0; query < queries.size(); ++query) {
    now.a += changes[query].a;
    now.b += changes[query].b;
    now.both += changes[query].both;
    const int either = now.a + now.b - now.both;
    const int smaller = std::min(now.a, now.b);
    jaccard += either == 0 ? 1 : static_cast<double>(now.both) / either;
    containment += smaller == 0 ? 1 : static_cast<double>(now.both) / smaller;
  }
  const auto steps = static_cast<double>(queries.size());
  return {.jaccard = static_cast<float>(jaccard / steps), .containment = static_cast<float>(containment / steps)};
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
        for (Index b = a; b < policies; ++b) {
          std::pair<const Residency*, const Residency*> before;
          SetOverlap found;
          for (int head = 0; head < model.num_attention_heads; ++head) {
            const auto kept = [&](Index policy) {
              return &group[static_cast<std::size_t>(policy)]->kept.of_query_head(layer, head, model.group_size());
            };
            // Query heads that share both sets share what these have in common.
            if (const std::pair sets(kept(a), kept(b)); sets != before) {
              found = overlap(*sets.first, *sets.second, replay.evaluation_positions, replay.eviction_position);
              before = sets;
            }
            for (const auto& [one, other] : {std::pair(a, b), std::pair(b, a)}) {
              const auto at = static_cast<std::size_t>(
                  ((one * policies + other) * model.num_layers + layer) * model.num_attention_heads + head);
              table.jaccard.numbers[at] = found.jaccard;
              table.containment.numbers[at] = found.containment;
            }
          }
        }
      }
    });
    tables.push_back(std::move(table));
  }
  return tables;
}

}  // namespace kvreplay
