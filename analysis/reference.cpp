#include "analysis/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace kvreplay {
namespace {

// What a path is at in the settings that have it.
struct Axis {
  const Parameter* parameter = nullptr;
  std::set<double> values;  // those that are numbers
};

double place_of(double number, bool logarithmic) { return logarithmic ? std::log2(number) : number; }

// In steps of the grid; 1 where there are no steps to count.
double steps_between(double number, double other, const Axis& axis) {
  const std::set<double>& values = axis.values;
  if (number == other) return 0;
  const bool logarithmic = axis.parameter->minimum > 0;
  const double range = place_of(*values.rbegin(), logarithmic) - place_of(*values.begin(), logarithmic);
  if (!(range > 0)) return 1;
  const double step = range / static_cast<double>(values.size() - 1);
  return std::abs(place_of(number, logarithmic) - place_of(other, logarithmic)) / step;
}

double distance_in(const SpecStructure& setting, const std::string& path, const Axis& axis) {
  const std::string& value = setting.parameters.at(path);
  const std::string& usual = axis.parameter->default_value;
  if (value == usual) return 0;
  const auto nested = setting.nested.find(path);
  if (nested != setting.nested.end()) return spec_structure(usual).method == nested->second ? 0 : 1;
  const std::optional<double> number = number_in(value);
  const std::optional<double> default_number = number_in(usual);
  return number && default_number ? steps_between(*number, *default_number, axis) : 1;
}

}  // namespace

std::vector<double> distances_from_defaults(std::span<const SpecStructure> settings) {
  std::map<std::string, Axis> axes;
  for (const SpecStructure& setting : settings) {
    for (const auto& [path, parameter] : setting.declared) {
      Axis& axis = axes[path];
      axis.parameter = parameter;
      if (const std::optional<double> number = number_in(setting.parameters.at(path))) axis.values.insert(*number);
    }
  }
  std::vector<double> distances;
  for (const SpecStructure& setting : settings) {
    auto distance = static_cast<double>(setting.parameters.size() - setting.declared.size());
    for (const auto& [path, parameter] : setting.declared) distance += distance_in(setting, path, axes.at(path));
    distances.push_back(distance);
  }
  return distances;
}

std::vector<std::size_t> nearest_to_defaults(std::span<const SpecStructure> settings) {
  constexpr double kRounding = 1e-9;
  const std::vector<double> distances = distances_from_defaults(settings);
  double least = std::numeric_limits<double>::infinity();
  for (const double distance : distances) least = std::min(least, distance);
  std::vector<std::size_t> nearest;
  for (std::size_t i = 0; i < distances.size(); ++i) {
    if (distances[i] <= least + kRounding) nearest.push_back(i);
  }
  return nearest;
}

std::vector<std::string> policies_nearest_to_defaults(std::span<const std::string> policies) {
  std::vector<std::string> methods;
  std::map<std::string, std::pair<std::vector<std::string>, std::vector<SpecStructure>>> of_method;
  for (const std::string& policy : policies) {
    SpecStructure structure = spec_structure(policy);
    if (!of_method.contains(structure.method)) methods.push_back(structure.method);
    auto& [specs, structures] = of_method[structure.method];
    specs.push_back(policy);
    structures.push_back(std::move(structure));
  }
  std::vector<std::string> nearest;
  for (const std::string& method : methods) {
    const auto& [specs, structures] = of_method[method];
    nearest.push_back(specs[nearest_to_defaults(structures).front()]);
  }
  return nearest;
}

}  // namespace kvreplay
