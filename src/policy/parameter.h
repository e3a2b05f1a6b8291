// What a method's parameters are, and the values that a spec gives them.
#pragma once

#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "policy/spec.h"

namespace kvreplay {

/// One parameter of a method: enough to check a value, to print it canonically and to explain it.
struct Parameter {
  enum class Kind { integer, real, flag, choice, spec, file };

  /// The step of a policy that a parameter belongs to, as an ablation would say it.
  enum class Step {
    none,        ///< nobody said; no method here leaves it at that
    score,       ///< what a position is worth
    time,        ///< how the window's queries are combined
    space,       ///< how neighbouring positions are combined
    window,      ///< how many queries are looked at
    share,       ///< how heads agree
    budget,      ///< how many positions layers and heads get
    selection,   ///< which positions a set holds
    protection,  ///< which positions are kept whatever their score
    schedule,    ///< when it is evicted
    draw,        ///< which draw of what is left to chance: a seed
    other,       ///< none of them
  };

  std::string name;
  Kind kind = Kind::integer;
  Step step = Step::none;
  std::string default_value;  ///< canonical text; empty: the parameter must be given, or the method decides
  double minimum = -std::numeric_limits<double>::infinity();
  double maximum = std::numeric_limits<double>::infinity();
  bool odd = false;  ///< integers only: even values are refused
  std::vector<std::string> choices;
  bool unnamed = false;     ///< the first of a method's: may be given without its name
  std::string description;  ///< one line, with the unit

  static Parameter integer(std::string name, int default_value, int minimum, std::string description);
  static Parameter odd_integer(std::string name, int default_value, int minimum, std::string description);
  static Parameter real(std::string name, double default_value, double minimum, double maximum,
                        std::string description);
  static Parameter flag(std::string name, bool default_value, std::string description);
  static Parameter choice(std::string name, std::vector<std::string> choices, std::string description);
  static Parameter spec(std::string name, std::string default_value, std::string description);
  static Parameter file(std::string name, std::string description);

  /// The same parameter as one of this step.
  Parameter of(Step belongs_to) const;

  /// The same parameter, to be given without its name as well.
  Parameter or_unnamed() const;

  /// The canonical text of a value: 0.30 becomes 0.3. Throws UsageError where the value is not one of this parameter;
  /// `method` names whose parameter it is.
  std::string canonical(const std::string& value, const std::string& method) const;

  /// What values are legal, for a person: "integer >= 1", "ema | mean".
  std::string legal_values() const;
};

/// A step in words: "indicator", "temporal smoothing", "spatial smoothing", "observation window", "sharing", "budget",
/// "selection", "protection", "schedule", "draw"; empty for none and other.
std::string_view name_of(Parameter::Step step);

/// A method's parameters with their values: given ones checked and canonical, the others at their defaults.
class Arguments {
 public:
  /// Throws UsageError for an unknown name (suggesting the nearest) and for an illegal value.
  Arguments(const SpecPart& part, const std::vector<Parameter>& parameters);

  int integer(std::string_view name) const;
  double real(std::string_view name) const;
  bool flag(std::string_view name) const;
  const std::string& text(std::string_view name) const;  ///< of a choice, spec or file; empty if not given

  /// "name(key=value,…)" with the values that differ from the defaults, in the order of declaration.
  const std::string& canonical() const { return canonical_; }

 private:
  std::map<std::string, std::string, std::less<>> values_;
  std::string canonical_;
};

/// " Did you mean 'x'?" with the candidate nearest to `name`, or nothing where none is near.
std::string suggestion(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace kvreplay
