#include "analysis/parameter_effects.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "policy/policy.h"
#include "policy/spec.h"

namespace kvreplay {
namespace {

// A spec without its arguments, nested ones included: "criticalkv(base=snapkv)".
struct Structure {
  std::string method;                             // parts alone: "criticalkv"
  std::map<std::string, std::string> parameters;  // every parameter by its path, at its value
  std::map<std::string, std::string> nested;      // the method of every parameter that is a spec, by its path
  std::vector<std::string> order;                 // paths as declared
};

void add_spec(const std::string& spec, const std::string& path, Structure& structure, std::string& method) {
  bool first = true;
  for (const SpecPart& part : parse_spec(spec)) {
    const std::string name = first ? part.name : fmt::format("+{}", part.name);
    const std::string prefix = first ? path : fmt::format("{}{}.", path, part.name);
    first = false;
    method += name;
    const Method& found = *find_method(name);
    const Arguments arguments(part, found.parameters);
    for (const Parameter& parameter : found.parameters) {
      const std::string& value = arguments.text(parameter.name);
      const std::string key = prefix + parameter.name;
      structure.parameters[key] = value;
      structure.order.push_back(key);
      if (parameter.kind != Parameter::Kind::spec || value.empty()) continue;
      std::string inner;
      add_spec(value, key + ".", structure, inner);
      structure.nested[key] = inner;
    }
  }
}

Structure structure_of(const std::string& spec) {
  Structure structure;
  add_spec(spec, "", structure, structure.method);
  return structure;
}

std::optional<double> number_from(const std::string& text) {
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, failure] = std::from_chars(text.data(), end, number);
  if (failure != std::errc() || stop != end) return std::nullopt;
  return number;
}

// A setting of one method.
struct Member {
  const PolicyRow* row;
  const Structure* structure;
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
    numbers = numbers && number_from(value);
  }
  if (numbers) std::ranges::sort(values, {}, [](const std::string& text) { return *number_from(text); });
  return values;
}

// All that two settings have to agree in for `parameter` to be what they differ by.
std::string others_of(const std::string& parameter, const Member& member) {
  std::string others = member.row->capacity_request;
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
  std::map<std::string, Structure> structures;
  std::map<std::string, std::vector<Member>> methods;
  std::vector<std::string> order;
  for (const PolicyRow& row : rows) {
    const auto [found, is_new] = structures.try_emplace(row.policy);
    if (is_new) found->second = structure_of(row.policy);
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
    if (is_new) found->second = structure_of(row.policy).method;
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
