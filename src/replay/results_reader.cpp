#include "replay/results_reader.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "replay/results_file.h"
#include "trace/file_kind.h"

namespace kvreplay {
namespace {

[[noreturn]] void fail(const hdf5::File& file, std::string_view where, std::string_view reason) {
  throw Error(fmt::format("{}: {}: {}", file.path().string(), where, reason));
}

// Opens a file that ResultStream wrote.
hdf5::File open_complete(const std::filesystem::path& path, std::string_view format, std::string_view what,
                         int newest_version) {
  hdf5::File file = hdf5::File::open(path);
  if (!file.has_attribute("/", "format") || file.read_string("/", "format") != format) {
    fail(file, "/", fmt::format("is not a file of {}, but {}", what, kind_of(file)));
  }
  const std::int64_t version = file.read_int("/", "format_version");
  if (version < kOldestResultsFormatVersion || version > newest_version) {
    fail(file, "/",
         fmt::format("is of version {} of the format, and this kvreplay reads versions {} to {}; {}", version,
                     kOldestResultsFormatVersion, newest_version,
                     version < kOldestResultsFormatVersion ? "replay again" : "update kvreplay"));
  }
  if (!file.has_attribute("/", "complete") || file.read_int("/", "complete") != 1) {
    fail(file, "/", "is unfinished: its attribute 'complete' is not 1; replay again");
  }
  return file;
}

// The groups "0", "1", … below `group`, in their order.
std::vector<std::string> numbered(const hdf5::File& file, const std::string& group) {
  if (!file.exists(group)) fail(file, group, "is missing");
  const std::size_t count = file.list(group).size();
  std::vector<std::string> paths;
  for (std::size_t i = 0; i < count; ++i) {
    paths.push_back(fmt::format("{}/{}", group, i));
    if (!file.exists(paths.back()))
      fail(file, paths.back(), fmt::format("is missing, though there are {} of them", count));
  }
  return paths;
}

int read_count(const hdf5::File& file, const std::string& group, const std::string& name) {
  const std::int64_t number = file.read_int(group, name);
  if (number < 1 || number > std::numeric_limits<int>::max()) {
    fail(file, group, fmt::format("attribute '{}' is {}, which cannot be", name, number));
  }
  return static_cast<int>(number);
}

Granularity read_granularity(const hdf5::File& file, const std::string& group) {
  const std::string name = file.read_string(group, "heads");
  const auto granularity = granularity_named(name);
  if (!granularity) fail(file, group, fmt::format("attribute 'heads' is '{}', not query, kv or layer", name));
  return *granularity;
}

// A name that is shown, and that others are compared with: made printable once, here, so that tables, figures and
// messages call a thing the same whatever the file calls it.
std::string read_name(const hdf5::File& file, const std::string& group, const std::string& name) {
  return printable(file.read_string(group, name));
}

Table read_table(const hdf5::File& file, const std::string& path, std::vector<Index> shape, bool may_be_missing) {
  const hdf5::Dataset dataset = file.dataset(path);
  if (dataset.shape() != shape) {
    fail(file, path,
         fmt::format("is [{}], and the result needs [{}]", fmt::join(dataset.shape(), ", "), fmt::join(shape, ", ")));
  }
  Table table;
  table.shape = std::move(shape);
  table.numbers = file.read_floats(path);
  if (!std::ranges::all_of(table.numbers, [may_be_missing](float number) {
        return std::isfinite(number) || (may_be_missing && std::isnan(number));
      })) {
    fail(file, path, "holds what is not a number");
  }
  return table;
}

// What the layers held and kept. A version of ours that let layers with a sliding window hold everything did not say.
void read_layers(const hdf5::File& file, const std::string& group, StoredResult& result) {
  const auto layers = static_cast<std::size_t>(result.num_layers);
  result.held.assign(layers, result.eviction_position);
  result.kept_per_layer.assign(layers, result.kept);
  if (!file.exists(group + "/held")) return;
  const std::vector<std::int32_t> held = file.read_int32s(group + "/held");
  const bool possible = std::ranges::all_of(
      held, [&result](std::int32_t count) { return count >= 0 && count <= result.eviction_position; });
  if (held.size() != layers || !possible) {
    fail(file, group + "/held",
         fmt::format("is not a number from 0 to {} for each of the {} layers", result.eviction_position, layers));
  }
  result.held.assign(held.begin(), held.end());
  const Table kept = read_table(file, group + "/kept_per_layer", {result.num_layers}, false);
  result.kept_per_layer.assign(kept.numbers.begin(), kept.numbers.end());
}

StoredResult read_identity(const hdf5::File& file, const std::string& group) {
  file.check_strings(group);
  StoredResult result;
  result.trace = read_name(file, group, "trace");
  result.trace_digest = file.read_string(group, "trace_digest");
  result.model = file.read_string(group, "model");
  result.num_layers = read_count(file, group, "num_layers");
  result.num_query_heads = read_count(file, group, "num_query_heads");
  result.num_kv_heads = read_count(file, group, "num_kv_heads");
  if (result.num_query_heads % result.num_kv_heads != 0) {
    fail(file, group,
         fmt::format("{} query heads cannot share {} KV heads", result.num_query_heads, result.num_kv_heads));
  }
  result.prompt_length = read_count(file, group, "prompt_length");
  result.policy = read_name(file, group, "policy");
  result.capacity_request = read_name(file, group, "capacity_request");
  result.capacity = read_count(file, group, "capacity");
  result.kept = file.read_double(group, "kept");
  if (file.has_attribute(group, "bytes_per_token")) {
    result.bytes_per_token = file.read_double(group, "bytes_per_token");
  }
  result.eviction_position = read_count(file, group, "evict_at");
  read_layers(file, group, result);
  result.granularity = read_granularity(file, group);
  const std::string share = file.read_string(group, "share");
  const auto known = share_named(share);
  if (!known) fail(file, group, fmt::format("attribute 'share' is '{}', not mean, max or sum", share));
  result.share = *known;
  result.oracle = file.read_int(group, "oracle") != 0;
  if (file.has_attribute(group, "nothing_to_choose")) {
    result.nothing_to_choose = file.read_int(group, "nothing_to_choose") != 0;
  }
  for (const std::int32_t position : file.read_int32s(group + "/evaluation_positions")) {
    result.evaluation_positions.push_back(position);
  }
  const std::vector<int>& positions = result.evaluation_positions;
  if (positions.empty() || positions.front() < result.eviction_position ||
      !std::ranges::is_sorted(positions, std::less_equal<>())) {
    fail(file, group + "/evaluation_positions", "is not ascending positions from the eviction on");
  }
  if (file.exists(group + "/spans")) {
    for (const hdf5::LabelledRange& range : file.read_labelled_ranges(group + "/spans")) {
      if (range.start < 0 || range.end <= range.start || range.end > std::numeric_limits<int>::max()) {
        fail(file, group + "/spans", fmt::format("a span from {} to {} cannot be", range.start, range.end));
      }
      result.spans.push_back({static_cast<int>(range.start), static_cast<int>(range.end), range.label});
    }
  }
  if (file.exists(group + "/notes")) result.notes = file.read_strings(group + "/notes");
  return result;
}

std::string path_of(std::size_t result, const MeasureTraits& measure) {
  return fmt::format("/results/{}/{}", result, measure.name);
}

std::vector<Index> shape_of(const StoredResult& result, const MeasureTraits& measure) {
  return table_shape(measure, result.num_layers,
                     {.query_heads = result.num_query_heads,
                      .queries = static_cast<Index>(result.evaluation_positions.size()),
                      .spans = static_cast<Index>(result.spans.size())});
}

}  // namespace

StoredResult::Kept StoredResult::kept_in(const std::vector<int>& layers) const {
  double kept_sum = 0;
  double held_sum = 0;
  for (const int layer : layers) {
    kept_sum += kept_per_layer[static_cast<std::size_t>(layer)];
    held_sum += held[static_cast<std::size_t>(layer)];
  }
  const auto count = static_cast<double>(layers.size());
  const double positions = static_cast<int>(layers.size()) == num_layers ? kept : kept_sum / count;
  return {.positions = positions, .share = held_sum == 0 ? 1 : positions * count / held_sum};
}

namespace {

std::uintmax_t text_bytes(const StoredResult& result) {
  std::uintmax_t bytes = result.trace.size() + result.trace_digest.size() + result.model.size() + result.policy.size() +
                         result.capacity_request.size();
  for (const Span& span : result.spans) bytes += span.label.size();
  for (const std::string& note : result.notes) bytes += note.size();
  return bytes;
}

}  // namespace

ResultsReader::ResultsReader(const std::filesystem::path& path)
    : file_(open_complete(path, "kvreplay-results", "results", kResultsFormatVersion)) {
  // Every one of many results may refer to the same text, or have one that is packed: a file of a few megabytes would
  // fill the memory.
  constexpr std::uintmax_t kUnquestionedText = std::uintmax_t{64} << 20;
  const std::uintmax_t most_text = kUnquestionedText + std::filesystem::file_size(path);
  std::uintmax_t text = 0;
  for (const std::string& group : numbered(file_, "/results")) {
    results_.push_back(read_identity(file_, group));
    text += text_bytes(results_.back());
    if (text > most_text) fail(file_, group, "names, spans and notes amount to more than the file could hold");
  }
  for (const std::string& group : numbered(file_, "/overlap")) {
    file_.check_strings(group);
    OverlapTable& table = overlaps_.emplace_back();
    table.trace = read_name(file_, group, "trace");
    table.capacity_request = read_name(file_, group, "capacity_request");
    table.eviction_position = read_count(file_, group, "evict_at");
    table.policies = file_.read_strings(group + "/policies");
    for (std::string& policy : table.policies) policy = printable(policy);
  }
}

bool ResultsReader::has(std::size_t result, Measure measure) const {
  return file_.exists(path_of(result, traits_of(measure)));
}

Table ResultsReader::read(std::size_t result, Measure measure) const {
  const MeasureTraits& traits = traits_of(measure);
  const std::string path = path_of(result, traits);
  if (!file_.exists(path)) return {};
  return read_table(file_, path, shape_of(results_.at(result), traits), traits.may_be_missing);
}

OverlapTable ResultsReader::read_overlap(std::size_t overlap) const {
  OverlapTable table = overlaps_.at(overlap);
  const auto of_this = [&table](const StoredResult& result) {
    return result.trace == table.trace && result.eviction_position == table.eviction_position;
  };
  const std::string group = fmt::format("/overlap/{}", overlap);
  const auto result = std::ranges::find_if(results_, of_this);
  if (result == results_.end()) fail(file_, group, "is of a trace or an eviction that no result is of");
  const auto policies = static_cast<Index>(table.policies.size());
  const std::vector<Index> shape = {policies, policies, result->num_layers, result->num_query_heads};
  table.jaccard = read_table(file_, group + "/jaccard", shape, false);
  table.containment = read_table(file_, group + "/containment", shape, false);
  return table;
}

KeptSetsReader::KeptSetsReader(const std::filesystem::path& path)
    : file_(open_complete(path, "kvreplay-kept", "kept sets", kHiddenRowsFormatVersion)) {
  for (const std::string& group : numbered(file_, "/kept")) {
    file_.check_strings(group);
    StoredKeptSets& kept = kept_.emplace_back();
    kept.trace = read_name(file_, group, "trace");
    if (file_.has_attribute(group, "tokens_digest")) kept.tokens_digest = file_.read_string(group, "tokens_digest");
    kept.policy = read_name(file_, group, "policy");
    kept.capacity_request = read_name(file_, group, "capacity_request");
    kept.eviction_position = read_count(file_, group, "evict_at");
    kept.granularity = read_granularity(file_, group);
    const hdf5::Shape offsets = file_.dataset(group + "/offsets").shape();
    if (offsets.size() != 1 || offsets.front() < 2) fail(file_, group + "/offsets", "is no list of sets");
    kept.num_sets = offsets.front() - 1;
  }
}

KeptSets KeptSetsReader::read(std::size_t index, int num_layers) const {
  const StoredKeptSets& stored = kept_.at(index);
  const std::string group = fmt::format("/kept/{}", index);
  const std::vector<std::int32_t> kept = file_.read_int32s(group + "/kept");
  std::vector<std::int32_t> until;
  if (file_.exists(group + "/until")) until = file_.read_int32s(group + "/until");
  std::vector<std::int32_t> from;
  if (file_.exists(group + "/from")) from = file_.read_int32s(group + "/from");
  const std::vector<std::int64_t> offsets = file_.read_int64s(group + "/offsets");
  if (!from.empty() && (until.empty() || from.size() != kept.size())) {
    fail(file_, group + "/from",
         fmt::format("is not a first query beside a last one for each of {} positions", kept.size()));
  }
  if (!until.empty() && until.size() != kept.size()) {
    fail(file_, group + "/until", fmt::format("is not a last query for each of {} positions", kept.size()));
  }
  if (offsets.size() < 2 || (offsets.size() - 1) % static_cast<std::size_t>(num_layers) != 0) {
    fail(file_, group, fmt::format("holds {} sets, which {} layers cannot share", offsets.size() - 1, num_layers));
  }
  KeptSets sets;
  sets.granularity = stored.granularity;
  sets.sets_per_layer = static_cast<int>((offsets.size() - 1) / static_cast<std::size_t>(num_layers));
  if (offsets.front() != 0 || offsets.back() != static_cast<std::int64_t>(kept.size()) ||
      !std::ranges::is_sorted(offsets)) {
    fail(file_, group + "/offsets", fmt::format("must ascend from 0 to the number of kept positions, {}", kept.size()));
  }
  for (std::size_t set = 0; set + 1 < offsets.size(); ++set) {
    std::vector<int> positions(kept.begin() + offsets[set], kept.begin() + offsets[set + 1]);
    if (!until.empty()) {
      const auto part_of = [&](const std::vector<std::int32_t>& column) {
        return column.empty() ? std::vector<int>()
                              : std::vector<int>(column.begin() + offsets[set], column.begin() + offsets[set + 1]);
      };
      try {
        sets.sets.emplace_back(positions, part_of(until), stored.eviction_position, part_of(from));
      } catch (const Error& error) {
        fail(file_, group, fmt::format("set {}: {}", set, error.what()));
      }
      continue;
    }
    const bool inside = positions.empty() || (positions.front() >= 0 && positions.back() < stored.eviction_position);
    if (!inside || !std::ranges::is_sorted(positions, std::less_equal<>())) {
      fail(file_, group + "/kept",
           fmt::format("set {} is not ascending positions before the eviction at {}", set, stored.eviction_position));
    }
    sets.sets.emplace_back(std::move(positions));
  }
  return sets;
}

}  // namespace kvreplay
