// Analyses filled with plausible numbers, of any size: what figures and pages are tried with.
#pragma once

#include <string>
#include <vector>

#include "analysis/analysis.h"

namespace kvreplay::test {

struct SampleAnalysis {
  std::vector<std::string> policies = {
      "restkv", "restkv(temporal=mean)", "snapkv", "tova", "streamingllm", "h2o", "recent", "random"};
  std::vector<std::string> capacities = {"64", "128", "25%"};
  std::string oracle = "oracle-reconstruction";  ///< empty: none
  std::vector<std::string> traces = {"play.h5", "letters.h5"};
  int num_layers = 6;
  int num_heads = 8;
  int prompt_length = 1500;
  std::vector<int> eviction_positions = {512, 1024, 1500};
  std::vector<double> alphas = {0.1, 0.3, 0.5, 0.7, 0.9};  ///< of further restkv settings
  std::vector<double> betas = {500, 1000, 2000, 4000};
  bool kept_sets = true;
  bool token_pieces = true;
  bool spans = true;
  bool live = true;  ///< whether the model ran on
  int steps = 900;   ///< of up to 20 of the policies and the oracle, which have a schedule; 0: none has

  Analysis make() const;
};

}  // namespace kvreplay::test
