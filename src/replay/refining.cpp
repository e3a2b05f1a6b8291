#include "replay/refining.h"

#include <algorithm>
#include <memory>

#include "replay/measurement.h"

namespace kvreplay {
namespace {

double mean_square(const std::vector<float>& layer_error) {
  double sum = 0;
  for (const float error : layer_error) sum += static_cast<double>(error) * static_cast<double>(error);
  return sum / static_cast<double>(layer_error.size());
}

}  // namespace

void refine_sets(const CapturedRun& trace, const LayerSource& source, const Eviction& eviction,
                 std::span<const Setting> settings, std::vector<LayerResult>& results, Index at_once, int threads) {
  const int held = source.shape().rows();
  // The first of those with the least error.
  const auto best_of = [&](std::span<const LayerResidencies* const> sets) {
    if (sets.size() == 1) return sets.front();
    const LayerResidencies* best = nullptr;
    double least = 0;
    while (!sets.empty()) {
      const auto some = sets.first(std::min(sets.size(), static_cast<std::size_t>(at_once)));
      sets = sets.subspan(some.size());
      const std::vector<LayerMeasures> measures =
          measure_layer(trace, source.shape().layer, eviction, {}, {some.begin(), some.end()}, threads);
      for (std::size_t i = 0; i < some.size(); ++i) {
        const double error = mean_square(measures[i].numbers[Measure::layer_error]);
        if (best != nullptr && !(error < least)) continue;
        best = some[i];
        least = error;
      }
    }
    return best;
  };

  // What was read of the layer serves all capacities of a policy, whose settings follow each other.
  const Refinement* reader = nullptr;
  std::unique_ptr<LayerRefinement> layer;
  for (std::size_t refined = 0; refined < settings.size(); ++refined) {
    const Setting& setting = settings[refined];
    if (!setting.policy->refinement || setting.keeps_all(held)) continue;
    std::vector<const LayerResidencies*> candidates = {&results[refined].kept};
    for (std::size_t i = 0; i < settings.size(); ++i) {
      const bool comparable =
          i != refined && settings[i].granularity == setting.granularity &&
          std::ranges::all_of(results[i].kept, [&setting, held](const Residency& set) {
            return set.is_one_eviction() && static_cast<int>(set.kept().size()) == setting.capacity(held);
          });
      if (comparable) candidates.push_back(&results[i].kept);
    }
    const LayerResidencies start = *best_of(candidates);
    LayerSets sets;
    for (const Residency& each : start) sets.emplace_back(each.kept().begin(), each.kept().end());
    if (setting.policy->refinement.get() != reader) {
      layer.reset();
      reader = setting.policy->refinement.get();
      layer = reader->begin(source);
    }
    const LayerSets found = layer->refine(setting.granularity, std::move(sets));
    const LayerResidencies improved(found.begin(), found.end());
    // Measured like any other sets: where rounding made it worse, the start stays.
    const std::vector<const LayerResidencies*> both = {&start, &improved};
    results[refined].kept = *best_of(both);
  }
}

}  // namespace kvreplay
