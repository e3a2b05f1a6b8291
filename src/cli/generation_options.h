// The options that say how a model writes.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tracer/sampling.h"
#include "tracer/stop_tokens.h"

namespace CLI {
class App;
}  // namespace CLI

namespace kvreplay::cli {

/// As they were given.
struct GenerationOptions {
  double temperature = 0;
  std::optional<int> top_k;
  std::optional<double> top_p;
  std::optional<int> seed;
  std::vector<std::string> stops;
  bool ignore_stop = false;
};

void add_generation_options(CLI::App& command, GenerationOptions& options);

/// The first of them that was given; empty: none.
std::string_view given_option(const GenerationOptions& options);

/// Throws UsageError where something is said of drawing tokens and none is drawn.
tracer::SamplingOptions sampling_of(const GenerationOptions& options);

tracer::StopOptions stop_of(const GenerationOptions& options);

}  // namespace kvreplay::cli
