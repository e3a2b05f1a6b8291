#include "analysis/step_effects.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>

#include "analysis/reference.h"
#include "analysis/spec_structure.h"
#include "base/parallel.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

struct Setting {
  std::string policy;
  SpecStructure structure;
};

// The method's first part: "restkv" of "restkv+adakv".
std::string_view first_part(std::string_view method) { return method.substr(0, method.find('+')); }
std::string_view later_parts(std::string_view method) { return method.substr(first_part(method).size()); }

// The step that a parameter belongs to; its name where it belongs to none.
std::string step_of(const SpecStructure& structure, const std::string& parameter) {
  const auto declared = structure.declared.find(parameter);
  const std::string_view step = declared == structure.declared.end() ? "" : name_of(declared->second->step);
  return step.empty() ? parameter : std::string(step);
}

// Parameters that both have at different values. What a nested spec holds is told, not the spec that holds it.
std::vector<std::string> differing(const SpecStructure& a, const SpecStructure& b) {
  std::vector<std::string> names;
  for (const std::string& name : a.order) {
    const auto other = b.parameters.find(name);
    if (other == b.parameters.end() || other->second == a.parameters.at(name)) continue;
    const auto nested = a.nested.find(name);
    const auto other_nested = b.nested.find(name);
    const bool told_inside =
        nested != a.nested.end() && other_nested != b.nested.end() && nested->second == other_nested->second;
    if (!told_inside) names.push_back(name);
  }
  // Within a spec that is another one altogether, nothing is told.
  std::erase_if(names, [&names](const std::string& name) {
    return std::ranges::any_of(names, [&name](const std::string& holder) { return name.starts_with(holder + "."); });
  });
  return names;
}

// How a setting differs from its reference.
struct Change {
  std::string reference;
  std::string changed;
  std::string step;
  std::string change;
};

std::string value_text(const std::string& value) { return value.empty() ? "default" : value; }

std::optional<Change> change_of(const Setting& reference, const Setting& changed) {
  const SpecStructure& a = reference.structure;
  const SpecStructure& b = changed.structure;
  const std::vector<std::string> names = differing(a, b);
  if (a.method == b.method) {
    // Of a method that is not known here, parameters at their defaults are not known either.
    if (names.size() != 1 || a.parameters.size() != b.parameters.size()) return std::nullopt;
    const std::string& name = names.front();
    // Chance is no step: what draws differ in is told apart (analysis/draws.h).
    const auto declared = a.declared.find(name);
    if (declared != a.declared.end() && declared->second->step == Parameter::Step::draw) return std::nullopt;
    return Change{
        reference.policy, changed.policy, step_of(a, name),
        fmt::format("{}: {} → {}", name, value_text(a.parameters.at(name)), value_text(b.parameters.at(name)))};
  }
  // A method may say that it is another one with a step replaced.
  const Method* without = find_method(first_part(b.method));
  if (without == nullptr || without->ablation.of != first_part(a.method) ||
      later_parts(a.method) != later_parts(b.method) || !names.empty()) {
    return std::nullopt;
  }
  // What only the other has, where it is not at its default, is part of what replaces the step.
  std::string added;
  for (const Parameter& parameter : without->parameters) {
    if (a.parameters.contains(parameter.name)) continue;
    const std::string& value = b.parameters.at(parameter.name);
    if (value != parameter.default_value) added += fmt::format(", {}={}", parameter.name, value);
  }
  return Change{reference.policy, changed.policy, std::string(name_of(without->ablation.step)),
                fmt::format("method: {} → {}{}", without->ablation.of, without->name, added)};
}

// The setting nearest to the defaults, of several that from which most others differ in one thing.
const Setting& reference_of(const std::vector<Setting>& settings) {
  std::vector<SpecStructure> structures;
  for (const Setting& setting : settings) structures.push_back(setting.structure);
  const std::vector<std::size_t> nearest = nearest_to_defaults(structures);
  const auto changes = [&settings](std::size_t reference) {
    return std::ranges::count_if(settings, [&](const Setting& other) {
      return other.policy != settings[reference].policy && change_of(settings[reference], other).has_value();
    });
  };
  return nearest.size() == 1 ? settings[nearest.front()] : settings[*std::ranges::max_element(nearest, {}, changes)];
}

// In the order of the steps' table, so that a method's steps come one after the other.
std::vector<Change> changes_in(const ResultSet& results) {
  std::vector<std::string> order;
  std::map<std::string, std::vector<Setting>> methods;
  for (const std::string& policy : results.policies()) {
    SpecStructure structure = spec_structure(policy);
    const std::string method = structure.method;
    if (!methods.contains(method)) order.push_back(method);
    methods[method].push_back({policy, std::move(structure)});
  }
  std::vector<Change> changes;
  for (const std::string& method : order) {
    const Setting& reference = reference_of(methods[method]);
    for (const auto& [other_method, settings] : methods) {
      for (const Setting& setting : settings) {
        if (setting.policy == reference.policy) continue;
        if (const std::optional<Change> change = change_of(reference, setting)) changes.push_back(*change);
      }
    }
  }
  const auto rank = [](const Change& change) {
    constexpr std::array kOrder = {Parameter::Step::score,     Parameter::Step::time,      Parameter::Step::space,
                                   Parameter::Step::window,    Parameter::Step::share,     Parameter::Step::budget,
                                   Parameter::Step::selection, Parameter::Step::protection};
    return std::ranges::find(kOrder, change.step, [](Parameter::Step step) { return name_of(step); }) - kOrder.begin();
  };
  const auto of_reference = [&](const Change& change) {
    return std::ranges::find(order, spec_structure(change.reference).method) - order.begin();
  };
  std::ranges::stable_sort(changes, {}, [&](const Change& c) { return std::tuple(of_reference(c), rank(c), c.step); });
  return changes;
}

std::vector<ResultPair> pairs_of(const ResultSet& results, const Change& change, const std::string& capacity) {
  std::vector<ResultPair> pairs;
  for (const std::size_t i : results.of_setting({change.changed, capacity})) {
    for (const std::size_t j : results.of_setting({change.reference, capacity})) {
      const StoredResult& a = results.results()[i];
      const StoredResult& b = results.results()[j];
      // What keeps the same whatever its parameters tells nothing of them.
      if (*a.nothing_to_choose || *b.nothing_to_choose) return {};
      if (a.trace == b.trace && a.eviction_position == b.eviction_position) pairs.emplace_back(i, j);
    }
  }
  return pairs;
}

// Corrects the p values of all rows, capacity by capacity.
void correct(std::vector<StepEffect>& effects) {
  std::vector<double> p_values;
  std::vector<std::string> asked_at;
  for (const StepEffect& effect : effects) {
    p_values.push_back(effect.difference.p_value);
    asked_at.push_back(effect.capacity_request);
  }
  p_values = holm_within(p_values, asked_at);
  for (std::size_t i = 0; i < effects.size(); ++i) effects[i].difference.adjusted = p_values[i];
}

}  // namespace

std::vector<StepEffect> step_effects(const ResultSet& results, Measure measure, const BootstrapOptions& bootstrap) {
  struct Task {
    Change change;
    std::string capacity;
    std::vector<ResultPair> pairs;
    std::vector<std::pair<int, PairedDifference>> differences;
  };
  std::vector<Task> tasks;
  for (const Change& change : changes_in(results)) {
    for (const std::string& capacity : results.capacities()) {
      std::vector<ResultPair> pairs = pairs_of(results, change, capacity);
      if (!pairs.empty()) tasks.push_back({change, capacity, std::move(pairs), {}});
    }
  }
  parallel_for(static_cast<int>(tasks.size()), [&](int i) {
    Task& task = tasks[static_cast<std::size_t>(i)];
    task.differences = paired_differences(results, task.pairs, measure, bootstrap);
  });
  std::vector<StepEffect> over_all;
  std::vector<StepEffect> per_layer;
  for (const Task& task : tasks) {
    for (const auto& [layer, difference] : task.differences) {
      (layer < 0 ? over_all : per_layer)
          .push_back({task.change.reference, task.change.changed, task.change.step, task.change.change, task.capacity,
                      layer, difference});
    }
  }
  correct(over_all);
  correct(per_layer);
  std::ranges::move(per_layer, std::back_inserter(over_all));
  return over_all;
}

std::vector<ParameterPoint> parameter_points(std::span<const ComparisonRow> rows) {
  // Settings that differ in numbers alone belong together.
  struct Family {
    std::string method;
    std::vector<std::string> order;
    std::map<std::string, std::set<std::string>> values;
    std::vector<std::pair<const ComparisonRow*, SpecStructure>> members;
  };
  std::vector<Family> families;
  std::map<std::string, std::size_t> place;
  for (const ComparisonRow& row : rows) {
    if (row.nothing_to_choose) continue;
    SpecStructure structure = spec_structure(row.key.policy);
    std::string key = structure.method;
    for (const std::string& name : structure.order) {
      const auto nested = structure.nested.find(name);
      const std::string& value = structure.parameters.at(name);
      key += fmt::format("\n{}={}", name,
                         nested != structure.nested.end() ? nested->second
                         : number_in(value)               ? std::string("a number")
                                                          : fmt::format("'{}'", value));
    }
    const auto [found, is_new] = place.try_emplace(key, families.size());
    if (is_new) families.push_back({structure.method, structure.order, {}, {}});
    Family& family = families[found->second];
    for (const auto& [name, value] : structure.parameters) family.values[name].insert(value);
    family.members.emplace_back(&row, std::move(structure));
  }
  std::vector<ParameterPoint> points;
  for (const Family& family : families) {
    const SpecStructure& first = family.members.front().second;
    std::vector<std::string> varying;
    std::string fixed;
    const SpecStructure defaults = spec_structure(family.method);
    for (const std::string& name : family.order) {
      if (first.nested.contains(name)) continue;
      if (family.values.at(name).size() > 1) {
        varying.push_back(name);
        continue;
      }
      const auto found = defaults.parameters.find(name);
      const std::string& value = first.parameters.at(name);
      if (found == defaults.parameters.end() || found->second != value) {
        fixed += fmt::format("{}{}={}", fixed.empty() ? "" : ",", name, value);
      }
    }
    if (varying.empty()) continue;
    for (const auto& [row, structure] : family.members) {
      ParameterPoint& point = points.emplace_back();
      point.policy = row->key.policy;
      point.method = fixed.empty() ? family.method : fmt::format("{}({})", family.method, fixed);
      point.capacity_request = row->key.capacity_request;
      point.mean = row->distribution.mean;
      point.interval = row->interval;
      for (const std::string& name : varying) {
        point.parameters.emplace_back(name, *number_in(structure.parameters.at(name)));
      }
    }
  }
  return points;
}

}  // namespace kvreplay
