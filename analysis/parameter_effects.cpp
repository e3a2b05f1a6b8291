#include "analysis/parameter_effects.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "analysis/spec_structure.h"

namespace kvreplay {
namespace {

// A setting of one method.
struct Member {
  const PolicyRow* row;
  const SpecStructure* structure;
};

// All of a parameter's values: ascending where they are numbers, else as they come.
std::vector<std::string> values_of(const std::string& parameter, const std::vector<Member>& members) {
  std::vector<std::string> values;
  std::set<std::string> seen;
  bool numbers = true;
  for (const Member& member : members) {
    const std::string& value = member.structure->parameters.at(parameter);
    if (!seen.insert(value).second) continue;
    values.push_back(value);
    numbers = numbers && number_in(value);
  }
  if (numbers) std::ranges::sort(values, {}, [](const std::string& text) { return *number_in(text); });
  return values;
}

// All that two settings have to agree in for `parameter` to be what they differ by.
std::string others_of(const std::string& parameter, const Member& member) {
  std::string others = fmt::format("{}\n{}", member.row->capacity_request, member.row->same_places);
  for (const std::string& key : member.structure->order) {
    // What a nested spec holds belongs to its value; what holds the parameter contains it.
    if (key == parameter || key.starts_with(parameter + ".") || parameter.starts_with(key + ".")) continue;
    others += fmt::format("\n{}={}", key, member.structure->parameters.at(key));
  }
  return others;
}

ParameterEffect effect_of(const std::string& method, const std::string& parameter, std::vector<std::string> values,
                          const std::vector<Member>& members) {
  std::map<std::string, std::map<std::string, double>> groups;
  for (const Member& member : members) {
    groups[others_of(parameter, member)][member.structure->parameters.at(parameter)] = member.row->layer_error;
  }
  ParameterEffect effect{.method = method, .parameter = parameter, .groups = 0, .values = {}, .range = 0};
  for (std::string& value : values) effect.values.push_back({std::move(value), 0, 0});
  for (const auto& [others, errors] : groups) {
    if (errors.size() < effect.values.size()) continue;
    ++effect.groups;
    for (ParameterValue& value : effect.values) value.layer_error += errors.at(value.value);
  }
  if (effect.groups == 0) return effect;
  for (ParameterValue& value : effect.values) value.layer_error /= effect.groups;
  const auto [best, worst] = std::ranges::minmax(effect.values, {}, &ParameterValue::layer_error);
  for (ParameterValue& value : effect.values) value.difference = value.layer_error - best.layer_error;
  effect.range = worst.layer_error - best.layer_error;
  return effect;
}

}  // namespace

std::vector<ParameterEffect> parameter_effects(const std::vector<PolicyRow>& rows) {
  std::map<std::string, SpecStructure> structures;
  std::map<std::string, std::vector<Member>> methods;
  std::vector<std::string> order;
  for (const PolicyRow& row : rows) {
    if (row.nothing_to_choose) continue;
    const auto [found, is_new] = structures.try_emplace(row.policy);
    if (is_new) found->second = spec_structure(row.policy);
    std::vector<Member>& members = methods[found->second.method];
    if (members.empty()) order.push_back(found->second.method);
    members.push_back({&row, &found->second});
  }
  std::vector<ParameterEffect> effects;
  for (const std::string& method : order) {
    const std::vector<Member>& members = methods[method];
    // Parameters that all settings of the method have; those of nested specs only where these are of one method.
    for (const std::string& parameter : members.front().structure->order) {
      const auto has_it = [&](const Member& m) { return m.structure->parameters.contains(parameter); };
      if (!std::ranges::all_of(members, has_it)) continue;
      const bool one_nested_method = std::ranges::all_of(members, [&](const Member& member) {
        return std::ranges::all_of(member.structure->nested, [&](const auto& entry) {
          if (!parameter.starts_with(entry.first + ".")) return true;
          const auto& first = members.front().structure->nested;
          return first.contains(entry.first) && first.at(entry.first) == entry.second;
        });
      });
      if (!one_nested_method) continue;
      // A nested spec differs where its method does; where only its parameters do, they are told themselves.
      const auto& nested = members.front().structure->nested;
      if (nested.contains(parameter) && std::ranges::all_of(members, [&](const Member& member) {
            return member.structure->nested.contains(parameter) &&
                   member.structure->nested.at(parameter) == nested.at(parameter);
          })) {
        continue;
      }
      std::vector<std::string> values = values_of(parameter, members);
      if (values.size() > 1) effects.push_back(effect_of(method, parameter, std::move(values), members));
    }
  }
  return effects;
}

RankingExcerpt excerpt(const std::vector<PolicyRow>& rows, std::size_t limit, std::size_t best) {
  std::map<std::string, std::size_t> of_capacity;
  std::map<std::string, std::set<std::string>> of_method;
  std::map<std::string, std::string> method_of;
  for (const PolicyRow& row : rows) {
    ++of_capacity[row.capacity_request];
    const auto [found, is_new] = method_of.try_emplace(row.policy);
    if (is_new) found->second = spec_structure(row.policy).method;
    of_method[found->second].insert(row.policy);
  }
  RankingExcerpt excerpt;
  std::map<std::string, std::size_t> shown;
  for (const PolicyRow& row : rows) {
    if (of_capacity[row.capacity_request] <= limit || shown[row.capacity_request]++ < best ||
        of_method[method_of[row.policy]].size() == 1) {
      excerpt.rows.push_back(row);
    } else {
      ++excerpt.left_out;
    }
  }
  return excerpt;
}

}  // namespace kvreplay
