// A whole replay back from its files.
#pragma once

#include <filesystem>

#include "replay/result.h"

namespace kvreplay {

/// What ResultsWriter and KeptSetsWriter wrote of one replay of a run by `model`, every number of it. Throws Error
/// where one of the files is damaged or is of something else.
TraceReplay read_replay(const ModelInfo& model, const std::filesystem::path& results,
                        const std::filesystem::path& kept);

}  // namespace kvreplay
