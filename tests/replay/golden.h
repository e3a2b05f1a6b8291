// Golden calls: what published implementations keep on synthetic traces.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hdf5/hdf5.h"
#include "policy/policy.h"
#include "replay/replay.h"

namespace kvreplay::test {

/// One call of a published implementation and what came of it.
struct GoldenCall {
  std::filesystem::path file;
  std::string id;
  std::string spec;  ///< what the call is in our terms; empty where the method is not here
  int capacity = 0;
  Granularity granularity = Granularity::query;
  KeptSets kept;
  std::optional<std::vector<float>> scores;  ///< [L, sets, ranked positions]
  std::vector<float> head_error;
  std::vector<float> layer_error;
  std::vector<float> attention_recall;
};

/// All golden files there are.
std::vector<std::filesystem::path> golden_files();

/// All calls of a golden file.
std::vector<GoldenCall> golden_calls(const std::filesystem::path& path);

}  // namespace kvreplay::test
