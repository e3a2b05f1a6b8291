#include "analysis/draws.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "policy/policy.h"
#include "policy/spec.h"

namespace kvreplay {

std::string without_draw(const std::string& spec) {
  std::string text;
  try {
    for (const SpecPart& part : parse_spec(spec)) {
      const std::string name = text.empty() ? part.name : "+" + part.name;
      const Method* const method = find_method(name);
      std::vector<std::string> arguments;
      for (const auto& [key, value] : part.arguments) {
        const auto numbers_draw = [&key = key](const Parameter& parameter) {
          return parameter.name == key && parameter.step == Parameter::Step::draw;
        };
        if (method != nullptr && std::ranges::any_of(method->parameters, numbers_draw)) continue;
        arguments.push_back(fmt::format("{}={}", key, quote_value(value)));
      }
      text += arguments.empty() ? name : fmt::format("{}({})", name, fmt::join(arguments, ","));
    }
  } catch (const UsageError&) {
    return spec;  // written by another version of a method, or by hand
  }
  return text;
}

std::vector<DrawSummary> draw_summaries(std::span<const ComparisonRow> rows) {
  std::vector<std::pair<DrawSummary, std::vector<double>>> found;
  for (const ComparisonRow& row : rows) {
    const std::string policy = without_draw(row.key.policy);
    auto own = std::ranges::find_if(found, [&](const auto& each) {
      return each.first.policy == policy && each.first.capacity_request == row.key.capacity_request;
    });
    if (own == found.end()) {
      own =
          found.insert(found.end(), {DrawSummary{.policy = policy, .capacity_request = row.key.capacity_request}, {}});
    }
    if (!std::isnan(row.distribution.mean)) own->second.push_back(row.distribution.mean);
  }
  std::vector<DrawSummary> summaries;
  for (auto& [summary, means] : found) {
    if (means.size() < 2) continue;
    summary.draws = static_cast<int>(means.size());
    double sum = 0;
    for (const double mean : means) sum += mean;
    summary.mean = sum / summary.draws;
    double squares = 0;
    for (const double mean : means) squares += (mean - summary.mean) * (mean - summary.mean);
    summary.deviation = std::sqrt(squares / (summary.draws - 1));
    summary.smallest = std::ranges::min(means);
    summary.largest = std::ranges::max(means);
    summaries.push_back(std::move(summary));
  }
  return summaries;
}

}  // namespace kvreplay
