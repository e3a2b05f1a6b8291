#include "analysis/weighing.h"

namespace kvreplay {

Mean MeanOverTraces::mean() const {
  Mean mean;
  for (const auto& [trace, of_trace] : of_traces_) mean.add(of_trace.value());
  return mean;
}

std::vector<double> weights_of(std::span<const EvictionKey> members) {
  std::map<std::string, std::map<int, int>> counts;
  for (const EvictionKey& member : members) ++counts[member.trace][member.eviction_position];
  std::vector<double> weights;
  for (const EvictionKey& member : members) {
    const std::map<int, int>& evictions = counts.at(member.trace);
    weights.push_back(1.0 / (static_cast<double>(counts.size()) * static_cast<double>(evictions.size()) *
                             evictions.at(member.eviction_position)));
  }
  return weights;
}

}  // namespace kvreplay
