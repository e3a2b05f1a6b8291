#include "replay/stored_replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>

#include "base/error.h"
#include "replay/results_reader.h"

namespace kvreplay {
namespace {

std::optional<Generation> read_generation(const hdf5::File& file, const std::string& path) {
  if (!file.exists(path)) return std::nullopt;
  Generation generation;
  generation.ids = file.read_int32s(path + "/ids");
  generation.text = file.read_string(path, "text");
  generation.ended = file.read_int(path, "ended") != 0;
  if (file.has_attribute(path, "first_difference")) {
    generation.first_difference = static_cast<int>(file.read_int(path, "first_difference"));
  }
  generation.repeated_4grams = file.read_double(path, "repeated_4grams");
  if (file.has_attribute(path, "answered")) generation.answered = file.read_int(path, "answered") != 0;
  return generation;
}

}  // namespace

TraceReplay read_replay(const ModelInfo& model, const std::filesystem::path& results,
                        const std::filesystem::path& kept) {
  const ResultsReader reader(results);
  const KeptSetsReader sets(kept);
  if (reader.results().empty() || reader.results().size() != sets.kept().size()) {
    throw Error(fmt::format("{}: holds {} results, and {} kept sets of {}", results.string(), reader.results().size(),
                            kept.string(), sets.kept().size()));
  }
  const hdf5::File file = hdf5::File::open(results);
  const StoredResult& first = reader.results().front();
  TraceReplay replay;
  replay.trace = first.trace;
  replay.trace_digest = first.trace_digest;
  replay.tokens_digest = sets.kept().front().tokens_digest;
  replay.model = model;
  replay.prompt_length = first.prompt_length;
  replay.eviction_position = first.eviction_position;
  replay.evaluate_from = first.evaluation_positions.front();
  replay.held = first.held;
  replay.evaluation_positions = first.evaluation_positions;
  replay.spans = first.spans;
  replay.notes = first.notes;
  replay.generation = read_generation(file, "/results/0/full_generation");
  for (std::size_t i = 0; i < reader.results().size(); ++i) {
    const StoredResult& stored = reader.results()[i];
    ReplayResult& result = replay.results.emplace_back();
    result.trace = stored.trace;
    result.policy = stored.policy;
    result.capacity_request = stored.capacity_request;
    result.capacity = stored.capacity;
    result.eviction_position = stored.eviction_position;
    result.granularity = stored.granularity;
    result.share = stored.share;
    result.oracle = stored.oracle;
    result.nothing_to_choose = stored.nothing_to_choose.value_or(false);
    result.kept = sets.read(i, model.num_layers);
    result.generation = read_generation(file, fmt::format("/results/{}/generation", i));
    for (const MeasureTraits& measure : measures()) {
      result.measures[measure.measure] = reader.read(i, measure.measure);
    }
    const auto measured = [&result](Measure measure) { return !result.measures[measure].numbers.empty(); };
    result.rank_agreement = measured(Measure::spearman);
    result.residual_norms = measured(Measure::residual_error);
    result.residual_sum = measured(Measure::residual_sum);
    result.live = measured(Measure::kl);
    result.replayed = measured(Measure::layer_error);
    for (const Residency& set : result.kept.sets) {
      result.most_kept = std::max(result.most_kept, static_cast<int>(set.kept().size()));
    }
  }
  return replay;
}

}  // namespace kvreplay
