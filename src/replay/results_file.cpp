#include "replay/results_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

#include "replay/measure.h"

namespace kvreplay {
namespace {

void write_table(hdf5::File& file, const std::string& path, const Table& table) {
  file.write(path, table.numbers, table.shape);
}

// What tells one result from another, wherever it is stored, with other strings that are stored beside it.
void write_identity(hdf5::File& file, const std::string& group, const ReplayResult& result,
                    const std::vector<hdf5::NamedString>& others) {
  std::vector<hdf5::NamedString> strings = {{"trace", result.trace},
                                            {"policy", result.policy},
                                            {"capacity_request", result.capacity_request},
                                            {"share", std::string(name_of(result.share))}};
  strings.insert(strings.end(), others.begin(), others.end());
  file.create_group(group);
  file.write_strings(group, strings);
  file.write_int(group, "capacity", result.capacity);
  file.write_int(group, "evict_at", result.eviction_position);
}

void write_spans(hdf5::File& file, const std::string& path, const std::vector<Span>& spans) {
  std::vector<hdf5::LabelledRange> ranges;
  for (const Span& span : spans) ranges.push_back({span.start, span.end, span.label});
  file.write(path, ranges);
}

}  // namespace

ResultStream::ResultStream(const std::filesystem::path& path, std::string_view format)
    : output_(path), file_(hdf5::File::create(output_.temporary(), path)) {
  file_.write_strings("/", {{"format", std::string(format)}, {"created_by", "kvreplay " KVREPLAY_VERSION}});
}

void ResultStream::finish(int version) {
  file_.write_int("/", "format_version", version);
  file_.write_int("/", "complete", 1);
  file_.close();
  output_.commit();
}

ResultsWriter::ResultsWriter(const std::filesystem::path& path, std::span<const TraceReplay> replays)
    : stream_(path, "kvreplay-results") {
  hdf5::File& file = stream_.file();
  const bool same_queries = std::ranges::all_of(replays, [&replays](const TraceReplay& replay) {
    return replay.evaluation_positions == replays.front().evaluation_positions;
  });
  if (same_queries && !replays.empty()) {
    const std::vector<std::int32_t>& positions = replays.front().evaluation_positions;
    file.write("/evaluation_positions", positions, {static_cast<Index>(positions.size())});
  }
  file.create_group("/results");
  file.create_group("/overlap");
}

namespace {

void write_generation(hdf5::File& file, const std::string& path, const Generation& generation) {
  file.create_group(path);
  file.write_strings(path, {{"text", generation.text}});
  file.write_int(path, "ended", generation.ended ? 1 : 0);
  if (generation.first_difference) file.write_int(path, "first_difference", *generation.first_difference);
  file.write_double(path, "repeated_4grams", generation.repeated_4grams);
  if (generation.answered) file.write_int(path, "answered", *generation.answered ? 1 : 0);
  file.write(path + "/ids", generation.ids, {static_cast<Index>(generation.ids.size())});
}

}  // namespace

void ResultsWriter::add(const TraceReplay& replay, const ReplayResult& result) {
  hdf5::File& file = stream_.file();
  const std::string group = fmt::format("/results/{}", results_++);
  write_identity(file, group, result,
                 {{"heads", std::string(name_of(result.granularity))},
                  {"trace_digest", replay.trace_digest},
                  {"model", replay.model.name}});
  file.write_int(group, "num_layers", replay.model.num_layers);
  file.write_int(group, "num_query_heads", replay.model.num_attention_heads);
  file.write_int(group, "num_kv_heads", replay.model.num_key_value_heads);
  file.write_int(group, "prompt_length", replay.prompt_length);
  file.write_int(group, "oracle", result.oracle ? 1 : 0);
  file.write_int(group, "nothing_to_choose", result.nothing_to_choose ? 1 : 0);
  file.write_double(group, "kept", mean_kept(result));
  file.write_double(group, "bytes_per_token", bytes_per_token(replay, result));
  if (!result.measures[Measure::cache_size].numbers.empty()) {
    file.write_double(group, "peak", peak_cache_size(result));
    file.write_double(group, "footprint", cache_footprint(result));
  }
  std::vector<float> kept;
  for (int layer = 0; layer < replay.model.num_layers; ++layer) {
    kept.push_back(static_cast<float>(result.kept.mean_size(layer)));
  }
  file.write(group + "/kept_per_layer", kept, {replay.model.num_layers});
  file.write(group + "/held", std::vector<std::int32_t>(replay.held.begin(), replay.held.end()),
             {replay.model.num_layers});
  const std::vector<std::int32_t>& positions = replay.evaluation_positions;
  file.write(group + "/evaluation_positions", positions, {static_cast<Index>(positions.size())});
  for (const MeasureTraits& measure : measures()) {
    const Table& table = result.measures[measure.measure];
    if (!table.numbers.empty()) write_table(file, fmt::format("{}/{}", group, measure.name), table);
  }
  if (result.generation) write_generation(file, group + "/generation", *result.generation);
  if (replay.generation) write_generation(file, group + "/full_generation", *replay.generation);
  if (!replay.spans.empty()) write_spans(file, group + "/spans", replay.spans);
  if (!replay.notes.empty()) {
    file.write(group + "/notes", replay.notes, {static_cast<Index>(replay.notes.size())});
  }
}

void ResultsWriter::add(const OverlapTable& table) {
  hdf5::File& file = stream_.file();
  const std::string group = fmt::format("/overlap/{}", overlaps_++);
  file.create_group(group);
  file.write_strings(group, {{"trace", table.trace}, {"capacity_request", table.capacity_request}});
  file.write_int(group, "evict_at", table.eviction_position);
  file.write(group + "/policies", table.policies, {static_cast<Index>(table.policies.size())});
  write_table(file, group + "/jaccard", table.jaccard);
  write_table(file, group + "/containment", table.containment);
}

void KeptSetsWriter::add(const TraceReplay& replay, const ReplayResult& result) {
  hdf5::File& file = stream_.file();
  const std::string group = fmt::format("/kept/{}", results_++);
  write_identity(file, group, result,
                 {{"heads", std::string(name_of(result.kept.granularity))},
                  {"trace_digest", replay.trace_digest},
                  {"tokens_digest", replay.tokens_digest}});
  const FlatResidencies flat(result.kept.sets, replay.eviction_position);
  const std::vector<std::int32_t>& kept = flat.positions;
  const std::vector<std::int64_t>& offsets = flat.offsets;
  file.write(group + "/kept", kept, {static_cast<Index>(kept.size())});
  if (!flat.until.empty()) {
    file.write(group + "/until", flat.until, {static_cast<Index>(kept.size())});
    version_ = std::max(version_, kResidencyFormatVersion);
  }
  if (!flat.from.empty()) {
    file.write(group + "/from", flat.from, {static_cast<Index>(kept.size())});
    version_ = std::max(version_, kHiddenRowsFormatVersion);
  }
  file.write(group + "/offsets", offsets, {static_cast<Index>(offsets.size())});
}

void write_results(const std::filesystem::path& path, const std::vector<TraceReplay>& replays,
                   const std::vector<OverlapTable>& overlaps) {
  ResultsWriter writer(path, replays);
  for (const TraceReplay& replay : replays) {
    for (const ReplayResult& result : replay.results) writer.add(replay, result);
  }
  for (const OverlapTable& table : overlaps) writer.add(table);
  writer.finish();
}

void write_kept_sets(const std::filesystem::path& path, const std::vector<TraceReplay>& replays) {
  KeptSetsWriter writer(path);
  for (const TraceReplay& replay : replays) {
    for (const ReplayResult& result : replay.results) writer.add(replay, result);
  }
  writer.finish();
}

}  // namespace kvreplay
