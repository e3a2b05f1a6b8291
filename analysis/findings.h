// The few sentences that a person remembers, computed from the numbers.
#pragma once

#include <string>
#include <vector>

#include "analysis/analysis.h"

namespace kvreplay {

/// The best settings of each capacity, several where they are equally good. None is an oracle, keeps everything, had
/// nothing to choose, is apart, or stores a position in a KV head more than the middle one of its capacity, or several.
std::vector<SettingKey> best_settings(const Analysis& analysis);

/// At most `most` sentences with their numbers, the most important first. They claim a difference only where its
/// interval, corrected for the number of comparisons, excludes 0.
std::vector<std::string> findings(const Analysis& analysis, std::size_t most);

}  // namespace kvreplay
