// The few sentences that a person remembers, computed from the numbers.
#pragma once

#include <string>
#include <vector>

#include "analysis/analysis.h"

namespace kvreplay {

/// At most `most` sentences with their numbers, the most important first. They claim a difference only where its
/// interval, corrected for the number of comparisons, excludes 0.
std::vector<std::string> findings(const Analysis& analysis, std::size_t most);

}  // namespace kvreplay
