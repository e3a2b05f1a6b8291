#include "policy/parameter.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

std::string shortest(double value) { return fmt::format("{}", value); }

double parse_number(const std::string& text, bool& valid) {
  double number = 0;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
  valid = failure == std::errc() && end == text.data() + text.size() && std::isfinite(number);
  return number;
}

Parameter make(std::string name, Parameter::Kind kind, std::string default_value, std::string description) {
  Parameter parameter;
  parameter.name = std::move(name);
  parameter.kind = kind;
  parameter.default_value = std::move(default_value);
  parameter.description = std::move(description);
  return parameter;
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

}  // namespace

Parameter Parameter::integer(std::string name, int default_value, int minimum, std::string description) {
  Parameter parameter = make(std::move(name), Kind::integer, fmt::format("{}", default_value), std::move(description));
  parameter.minimum = minimum;
  parameter.maximum = std::numeric_limits<int>::max();
  return parameter;
}

Parameter Parameter::odd_integer(std::string name, int default_value, int minimum, std::string description) {
  Parameter parameter = integer(std::move(name), default_value, minimum, std::move(description));
  parameter.odd = true;
  return parameter;
}

Parameter Parameter::real(std::string name, double default_value, double minimum, double maximum,
                          std::string description) {
  Parameter parameter = make(std::move(name), Kind::real, shortest(default_value), std::move(description));
  parameter.minimum = minimum;
  parameter.maximum = maximum;
  return parameter;
}

Parameter Parameter::flag(std::string name, bool default_value, std::string description) {
  return make(std::move(name), Kind::flag, default_value ? "true" : "false", std::move(description));
}

Parameter Parameter::choice(std::string name, std::vector<std::string> choices, std::string description) {
  Parameter parameter = make(std::move(name), Kind::choice, choices.front(), std::move(description));
  parameter.choices = std::move(choices);
  return parameter;
}

Parameter Parameter::spec(std::string name, std::string default_value, std::string description) {
  return make(std::move(name), Kind::spec, std::move(default_value), std::move(description));
}

Parameter Parameter::file(std::string name, std::string description) {
  return make(std::move(name), Kind::file, "", std::move(description));
}

Parameter Parameter::of(Step belongs_to) const {
  Parameter parameter = *this;
  parameter.step = belongs_to;
  return parameter;
}

Parameter Parameter::or_unnamed() const {
  Parameter parameter = *this;
  parameter.unnamed = true;
  return parameter;
}

std::string_view name_of(Parameter::Step step) {
  switch (step) {
    case Parameter::Step::score:
      return "indicator";
    case Parameter::Step::time:
      return "temporal smoothing";
    case Parameter::Step::space:
      return "spatial smoothing";
    case Parameter::Step::window:
      return "observation window";
    case Parameter::Step::share:
      return "sharing";
    case Parameter::Step::budget:
      return "budget";
    case Parameter::Step::selection:
      return "selection";
    case Parameter::Step::protection:
      return "protection";
    case Parameter::Step::schedule:
      return "schedule";
    case Parameter::Step::draw:
      return "draw";
    case Parameter::Step::none:
    case Parameter::Step::other:
      return "";
  }
  return "";
}

std::string Parameter::legal_values() const {
  const auto bounds = [this](std::string_view noun) {
    std::string text(noun);
    if (std::isfinite(minimum)) text += " >= " + shortest(minimum);
    if (std::isfinite(maximum) && (kind == Kind::real || maximum < std::numeric_limits<int>::max())) {
      text += (std::isfinite(minimum) ? " and <= " : " <= ") + shortest(maximum);
    }
    return text;
  };
  switch (kind) {
    case Kind::integer:
      return bounds(odd ? "odd integer" : "integer");
    case Kind::real:
      return bounds("number");
    case Kind::flag:
      return "true | false";
    case Kind::choice:
      return fmt::format("{}", fmt::join(choices, " | "));
    case Kind::spec:
      return "a policy spec";
    case Kind::file:
      return "a file";
  }
  return "";
}

std::string Parameter::canonical(const std::string& value, const std::string& method) const {
  const auto refuse = [&]() {
    return UsageError(fmt::format("{}: parameter '{}' is {}, not '{}'", method, name, legal_values(), value));
  };
  switch (kind) {
    case Kind::integer:
    case Kind::real: {
      bool valid = false;
      const double number = parse_number(value, valid);
      if (!valid || number < minimum || number > maximum) throw refuse();
      if (kind == Kind::real) return shortest(number == 0 ? 0.0 : number);
      if (number != std::floor(number) || (odd && std::fmod(number, 2) == 0)) throw refuse();
      return fmt::format("{}", static_cast<int>(number));
    }
    case Kind::flag:
      if (value != "true" && value != "false") throw refuse();
      return value;
    case Kind::choice:
      if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
        throw UsageError(fmt::format("{}: parameter '{}' is one of {}, not '{}'.{}", method, name, legal_values(),
                                     value, suggestion(value, choices)));
      }
      return value;
    case Kind::spec:
      return make_policy(value).canonical;
    case Kind::file:
      return value;
  }
  throw refuse();
}

Arguments::Arguments(const SpecPart& part, const std::vector<Parameter>& parameters) {
  std::vector<std::string> names;
  for (const Parameter& parameter : parameters) {
    names.push_back(parameter.name);
    values_[parameter.name] = parameter.default_value;
  }
  for (const auto& [written, value] : part.arguments) {
    if (written.empty() && (parameters.empty() || !parameters.front().unnamed)) {
      throw UsageError(fmt::format(
          "{}: '{}' is no parameter=value; {}", part.name, value,
          names.empty() ? "it has no parameters" : fmt::format("its parameters are: {}", fmt::join(names, ", "))));
    }
    const std::string& key = written.empty() ? names.front() : written;
    const auto found = std::find(names.begin(), names.end(), key);
    if (found == names.end()) {
      throw UsageError(names.empty() ? fmt::format("{} has no parameters, but '{}' is given", part.name, key)
                                     : fmt::format("{} has no parameter '{}'.{} Its parameters are: {}", part.name, key,
                                                   suggestion(key, names), fmt::join(names, ", ")));
    }
    values_[key] = parameters[static_cast<std::size_t>(found - names.begin())].canonical(value, part.name);
  }
  std::vector<std::string> differing;
  for (const Parameter& parameter : parameters) {
    const std::string& value = values_[parameter.name];
    if (value != parameter.default_value) differing.push_back(parameter.name + "=" + quote_value(value));
  }
  canonical_ = differing.empty() ? part.name : fmt::format("{}({})", part.name, fmt::join(differing, ","));
}

int Arguments::integer(std::string_view name) const { return static_cast<int>(real(name)); }

double Arguments::real(std::string_view name) const {
  bool valid = false;
  return parse_number(text(name), valid);
}

bool Arguments::flag(std::string_view name) const { return text(name) == "true"; }

const std::string& Arguments::text(std::string_view name) const { return values_.find(name)->second; }

std::string suggestion(std::string_view name, const std::vector<std::string>& candidates) {
  std::size_t best = std::max<std::size_t>(2, name.size() / 3) + 1;
  std::string nearest;
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(name, candidate);
    if (distance < best || (distance == best && nearest.empty() && candidate.starts_with(name))) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest.empty() ? "" : fmt::format(" Did you mean '{}'?", nearest);
}

}  // namespace kvreplay
