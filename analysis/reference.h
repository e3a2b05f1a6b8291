// Which of a method's settings stands for the method: the one that is nearest to its defaults.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "analysis/spec_structure.h"

namespace kvreplay {

/// How far settings of one method are from its defaults: the sum over parameters. A number is as far as it takes steps
/// of its grid, whose step is the mean one between neighbouring values that the settings have, as differences or, of a
/// parameter that is always above 0, as ratios. Anything else is 0 or one step away, and so is a number whose default
/// is none. What a nested spec holds counts, not the spec, unless it is of another method. Of a method that is not
/// known here, whose defaults are not either, every parameter that is given is one step.
std::vector<double> distances_from_defaults(std::span<const SpecStructure> settings);

/// Those of the settings that are nearest to the defaults, as indices: more than one where distances are equal but for
/// rounding.
std::vector<std::size_t> nearest_to_defaults(std::span<const SpecStructure> settings);

/// The policy of each method that is nearest to its defaults, the first one of equally near ones; methods in the order
/// of their first policies.
std::vector<std::string> policies_nearest_to_defaults(std::span<const std::string> policies);

}  // namespace kvreplay
