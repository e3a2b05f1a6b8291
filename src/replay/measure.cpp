#include "replay/measure.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/error.h"
#include "policy/parameter.h"

namespace kvreplay {
namespace {

using Per = MeasureTraits::Per;

constexpr MeasureTraits kMeasures[] = {
    {Measure::layer_error, "layer_error", "layer error", &ReplayResult::layer_error, Per::query, true},
    {Measure::head_error, "head_error", "head error", &ReplayResult::head_error, Per::head_and_query, true},
    {Measure::attention_recall, "attention_recall", "attention recall", &ReplayResult::attention_recall,
     Per::head_and_query, false},
    {Measure::cosine, "cosine", "cosine", &ReplayResult::cosine, Per::head_and_query, false},
    {Measure::span_recall, "span_recall", "span recall", &ReplayResult::span_recall, Per::head_and_span, false, true},
    {Measure::spearman, "spearman", "rank agreement (Spearman)", &ReplayResult::spearman, Per::head, false, true},
    {Measure::kendall, "kendall", "rank agreement (Kendall)", &ReplayResult::kendall, Per::head, false, true},
};

}  // namespace

std::span<const MeasureTraits> measures() { return kMeasures; }

const MeasureTraits& traits_of(Measure measure) {
  return *std::ranges::find(kMeasures, measure, &MeasureTraits::measure);
}

Measure measure_named(std::string_view name) {
  const auto* found = std::ranges::find(kMeasures, name, &MeasureTraits::name);
  if (found != std::end(kMeasures)) return found->measure;
  std::vector<std::string> names;
  for (const MeasureTraits& traits : kMeasures) names.emplace_back(traits.name);
  throw UsageError(
      fmt::format("unknown measure '{}'.{} Measures: {}", name, suggestion(name, names), fmt::join(names, ", ")));
}

}  // namespace kvreplay
