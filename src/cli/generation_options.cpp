#include "cli/generation_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <limits>

#include "base/error.h"
#include "cli/options.h"

namespace kvreplay::cli {

void add_generation_options(CLI::App& command, GenerationOptions& options) {
  constexpr int kMost = std::numeric_limits<int>::max();
  command
      .add_option("--temperature", options.temperature,
                  "Draw the tokens that are generated, at this temperature (default: 0, the most likely ones)")
      ->check(number_that([](double value) { return value >= 0; }, "a temperature: a number, at least 0"))
      ->type_name("T");
  command.add_option("--top-k", options.top_k, "Draw from the K most likely tokens alone (default: from all)")
      ->check(integer_in(1, kMost, "a number of tokens"))
      ->type_name("K");
  command
      .add_option("--top-p", options.top_p,
                  "Draw from the fewest most likely tokens whose probabilities come to P (default: 1, from all)")
      ->check(number_that([](double value) { return value > 0 && value <= 1; }, "a share: a number above 0, at most 1"))
      ->type_name("P");
  command.add_option("--seed", options.seed, "Seed of what is drawn; the same one gives the same tokens (default: 0)")
      ->check(integer_in(0, kMost, "a seed"))
      ->type_name("N");
  command
      .add_option("--stop", options.stops,
                  "A further token to stop after, by id or by text that is a single token; may be repeated")
      ->allow_extra_args(false)
      ->type_name("ID|TEXT");
  command.add_flag("--ignore-stop", options.ignore_stop, "Go on where the model would end its text");
}

std::string_view given_option(const GenerationOptions& options) {
  if (options.temperature > 0) return "--temperature";
  if (options.top_k) return "--top-k";
  if (options.top_p) return "--top-p";
  if (options.seed) return "--seed";
  if (!options.stops.empty()) return "--stop";
  return options.ignore_stop ? "--ignore-stop" : "";
}

tracer::SamplingOptions sampling_of(const GenerationOptions& options) {
  if (options.temperature == 0 && (options.top_k || options.top_p || options.seed)) {
    throw UsageError(
        fmt::format("{} is of tokens that are drawn: ask for that with --temperature, as in "
                    "--temperature 0.7",
                    given_option(options)));
  }
  return {.temperature = options.temperature,
          .top_k = options.top_k.value_or(0),
          .top_p = options.top_p.value_or(1),
          .seed = static_cast<std::uint64_t>(options.seed.value_or(0))};
}

tracer::StopOptions stop_of(const GenerationOptions& options) {
  for (const std::string& stop : options.stops) {
    if (stop.empty()) throw UsageError("--stop: an empty text is no token");
  }
  return {.by_model = !options.ignore_stop, .others = options.stops};
}

}  // namespace kvreplay::cli
