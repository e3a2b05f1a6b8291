// Golden runs: what published implementations keep at every step over a synthetic trace's tokens.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "policy/policy.h"

namespace kvreplay::test {

/// One run of a published implementation.
struct GoldenRun {
  std::filesystem::path file;
  std::string id;
  std::string spec;   ///< what the run is in our terms; with {noise} in place of a file of noise, where there is some
  std::string noise;  ///< where it lies in `file`, or empty
  int capacity = 0;
  Granularity granularity = Granularity::kv;
  int sets_per_layer = 1;                  ///< that are stored: H, K or 1
  bool tie_dependent = false;              ///< equal scores occur, and their order has consequences
  bool masked_at_once = false;             ///< the query of a step is masked by the step's own eviction
  std::vector<int> steps;                  ///< [events]: positions after which there was an eviction
  std::vector<std::vector<int>> kept;      ///< [event · L · sets]
  std::vector<std::vector<int>> in_order;  ///< the same as the cache holds them; empty: ascending
  std::vector<float> head_error;           ///< [L, H, E], as the published code has positions
  std::vector<float> layer_error;          ///< [L, E]
  std::vector<float> attention_recall;     ///< [L, H, E]
  std::vector<int> cache_size;             ///< [L, sets, E]
};

/// All files there are: the bundled ones, or those of the folder that KVREPLAY_GOLDEN_DECODE_DIR names.
std::vector<std::filesystem::path> golden_decode_files();

std::vector<GoldenRun> golden_runs(const std::filesystem::path& path);

}  // namespace kvreplay::test
