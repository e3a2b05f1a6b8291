// A policy's spec taken apart into what can differ between two settings.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "policy/parameter.h"
#include "policy/policy.h"

namespace kvreplay {

/// A spec without its arguments, and these with all their defaults.
struct SpecStructure {
  std::string method;                             ///< parts alone: "restkv+adakv"
  std::map<std::string, std::string> parameters;  ///< every parameter at its value, by its path: "alpha"; "adakv.floor"
                                                  ///< of a later part; "base.window" within a nested spec
  std::map<std::string, std::string> nested;      ///< the method of every parameter that is a spec, by its path
  std::vector<std::string> order;                 ///< paths as declared
  std::map<std::string, const Parameter*> declared;  ///< by path; not of a method that is not known here
};

/// Of a policy that is not known here, as that of a plug-in which is not loaded, what is known is what its spec says;
/// a text that is no spec is a method without parameters.
SpecStructure spec_structure(const std::string& spec);

/// What a policy is to others: its method's baseline, where nothing but a protection stands behind it.
Method::Baseline baseline_of(const std::string& spec);

/// The protection that a spec asks for, with what is not at its default: "+protect(last=8)"; empty where it asks for
/// none.
std::string protection_of(const std::string& spec);

/// The number that all of a parameter's value is, if it is one.
std::optional<double> number_in(const std::string& value);

}  // namespace kvreplay
