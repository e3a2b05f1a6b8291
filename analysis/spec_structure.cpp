#include "analysis/spec_structure.h"

#include <fmt/format.h>

#include <charconv>
#include <utility>

#include "base/error.h"
#include "policy/policy.h"
#include "policy/spec.h"

namespace kvreplay {
namespace {

void add_spec(const std::string& spec, const std::string& path, SpecStructure& structure, std::string& method);

void add_parameter(const std::string& path, const std::string& value, const Parameter* parameter,
                   SpecStructure& structure) {
  structure.parameters[path] = value;
  structure.order.push_back(path);
  if (parameter != nullptr) structure.declared[path] = parameter;
  if (parameter == nullptr || parameter->kind != Parameter::Kind::spec || value.empty()) return;
  std::string inner;
  add_spec(value, path + ".", structure, inner);
  structure.nested[path] = inner;
}

void add_spec(const std::string& spec, const std::string& path, SpecStructure& structure, std::string& method) {
  bool first = true;
  for (const SpecPart& part : parse_spec(spec)) {
    const std::string name = first ? part.name : fmt::format("+{}", part.name);
    const std::string prefix = first ? path : fmt::format("{}{}.", path, part.name);
    first = false;
    method += name;
    const Method* found = find_method(name);
    if (found == nullptr) {
      for (const auto& [key, value] : part.arguments) add_parameter(prefix + key, value, nullptr, structure);
      continue;
    }
    const Arguments arguments(part, found->parameters);
    for (const Parameter& parameter : found->parameters) {
      add_parameter(prefix + parameter.name, arguments.text(parameter.name), &parameter, structure);
    }
  }
}

}  // namespace

SpecStructure spec_structure(const std::string& spec) {
  try {
    SpecStructure structure;
    add_spec(spec, "", structure, structure.method);
    return structure;
  } catch (const UsageError&) {
    // Written by another version of a method, or by hand.
    SpecStructure whole;
    whole.method = spec;
    return whole;
  }
}

Method::Baseline baseline_of(const std::string& spec) {
  try {
    const std::vector<SpecPart> parts = parse_spec(spec);
    const Method* method = find_method(parts.front().name);
    for (std::size_t i = 1; i < parts.size(); ++i) {
      const Method* step = find_method(fmt::format("+{}", parts[i].name));
      if (step == nullptr || step->step != Method::Step::protection) return Method::Baseline::none;
    }
    return method == nullptr ? Method::Baseline::none : method->baseline;
  } catch (const UsageError&) {
    return Method::Baseline::none;
  }
}

std::string protection_of(const std::string& spec) {
  try {
    const std::vector<SpecPart> parts = parse_spec(spec);
    for (std::size_t i = 1; i < parts.size(); ++i) {
      const Method* step = find_method(fmt::format("+{}", parts[i].name));
      if (step == nullptr || step->step != Method::Step::protection) continue;
      return fmt::format("+{}", Arguments(parts[i], step->parameters).canonical());
    }
  } catch (const UsageError&) {
    // Written by another version of a method, or by hand.
  }
  return "";
}

std::optional<double> number_in(const std::string& value) {
  double number = 0;
  const char* end = value.data() + value.size();
  const auto [stop, failure] = std::from_chars(value.data(), end, number);
  if (failure != std::errc() || stop != end) return std::nullopt;
  return number;
}

}  // namespace kvreplay
