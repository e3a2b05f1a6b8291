#include "sweep/unit_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <map>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/file_text.h"
#include "base/output_file.h"
#include "hdf5/cache.h"

namespace kvreplay {
namespace {

constexpr std::string_view kFormat = "kvreplay-unit";
constexpr std::string_view kUnitPrefix = "unit-";
constexpr std::string_view kSurveyPrefix = "survey-";
constexpr std::string_view kRunPrefix = "run-";   // FinishedRuns puts them there
constexpr std::string_view kTemporary = ".tmp-";  // as OutputFile names them

// The measures that a unit has numbers of. Where only some settings have them, zeros are stored for the others.
std::vector<MeasureTraits> measures_of(const TraceReplay& outline) {
  std::vector<MeasureTraits> stored;
  std::ranges::copy_if(measures(), std::back_inserter(stored), [&outline](const MeasureTraits& measure) {
    return number_count(measure, outline.extent()) > 0 &&
           std::ranges::any_of(outline.results,
                               [&measure](const ReplayResult& result) { return is_measured(measure, result); });
  });
  return stored;
}

std::string path_of(const MeasureTraits& measure) { return fmt::format("/{}", measure.name); }

constexpr const char* kOutputError = "/output_error";

hdf5::Shape with_settings(const hdf5::Shape& shape, std::size_t settings) {
  hdf5::Shape stacked = {static_cast<Index>(settings)};
  stacked.insert(stacked.end(), shape.begin(), shape.end());
  return stacked;
}

std::string digest_of(std::string_view text) { return fmt::format("{:016x}", XXH64(text.data(), text.size(), 0)); }

// The names of what is in a folder, in the order of their bytes. Not by asking for names that may not be there: network
// file systems remember for a while that they were not.
std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  std::error_code failure;
  for (std::filesystem::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure)) {
    names.push_back(entry->path().filename().string());
  }
  if (failure) throw Error(fmt::format("{}: cannot be read: {}", folder.string(), failure.message()));
  std::ranges::sort(names);
  return names;
}

bool is_ours(const std::string& name) {
  return name.starts_with(kUnitPrefix) || name.starts_with(kSurveyPrefix) || name.starts_with(kRunPrefix) ||
         name == "sweep.toml" || name.find(kTemporary) != std::string::npos;
}

}  // namespace

StoredUnit::StoredUnit(const std::filesystem::path& path, const TraceReplay& outline, const ReplayUnit& unit,
                       const std::string& sweep)
    : file_(hdf5::File::open(path)), outline_(outline) {
  const auto refuse = [&path](std::string_view reason) { return Error(fmt::format("{}: {}", path.string(), reason)); };
  const std::size_t settings = outline.results.size();
  if (file_.read_string("/", "format") != kFormat || file_.read_int("/", "complete") != 1) {
    throw refuse("is not a finished unit of a sweep");
  }
  if (file_.read_string("/", "sweep") != sweep || file_.read_int("/", "replay") != unit.replay ||
      file_.read_int("/", "layer") != unit.layer) {
    throw refuse("is a unit of another sweep");
  }
  const auto open_table = [&](const std::string& name, const hdf5::Shape& shape) {
    tables_.push_back(file_.dataset(name));
    if (tables_.back().shape() != with_settings(shape, settings) || tables_.back().float_type() != DType::float32) {
      throw refuse(fmt::format("{} does not fit the sweep", name));
    }
  };
  for (const MeasureTraits& measure : measures_of(outline)) {
    open_table(path_of(measure), layer_shape(measure, outline.extent()));
  }
  open_table(kOutputError, {1});
  offsets_ = file_.read_int64s("/offsets");
  first_set_.push_back(0);
  for (const ReplayResult& result : outline.results) {
    first_set_.push_back(first_set_.back() + static_cast<std::size_t>(result.kept.sets_per_layer));
  }
  if (offsets_.size() != first_set_.back() + 1 || offsets_.front() != 0 || !std::ranges::is_sorted(offsets_)) {
    throw refuse("/offsets does not fit the sweep");
  }
  for (const char* name : {"/kept", "/until", "/from"}) {
    if (offsets_.back() == 0 || (!positions_.empty() && !file_.exists(name))) break;
    positions_.push_back(file_.dataset(name));
    if (positions_.back().shape() != hdf5::Shape{offsets_.back()} ||
        positions_.back().element_size() != sizeof(std::int32_t)) {
      throw refuse(fmt::format("{} does not fit the sweep", name));
    }
  }
}

void StoredUnit::verify() const {
  const auto check = [this](const hdf5::Dataset& dataset) {
    if (dataset.compute_xxh64() != file_.read_string(dataset.path(), "xxh64")) {
      throw Error(fmt::format("{}: {} does not match its digest", file_.path().string(), dataset.path()));
    }
  };
  for (const hdf5::Dataset& table : tables_) check(table);
  for (const hdf5::Dataset& positions : positions_) check(positions);
  check(file_.dataset("/offsets"));
}

std::vector<LayerResult> StoredUnit::read(std::size_t first, std::size_t count) const {
  std::vector<LayerResult> results(count);
  std::vector<std::byte> bytes;
  // Reads a table of all of these settings, and returns how many numbers there are of each.
  const auto read_table = [&](const hdf5::Dataset& table) {
    hdf5::Shape begin(table.shape().size(), 0);
    begin.front() = static_cast<Index>(first);
    hdf5::Shape shape = table.shape();
    shape.front() = static_cast<Index>(count);
    const auto numbers = static_cast<std::size_t>(hdf5::elements(shape));
    bytes.resize(numbers * sizeof(float));
    table.read_raw(begin, shape, bytes.data());
    return numbers / count;
  };
  const std::vector<MeasureTraits> stored = measures_of(outline_);
  for (std::size_t m = 0; m < stored.size(); ++m) {
    const std::size_t each = read_table(tables_[m]);
    for (std::size_t i = 0; i < count; ++i) {
      if (!is_measured(stored[m], outline_.results[first + i])) continue;
      std::vector<float>& numbers = results[i].measures[stored[m].measure];
      numbers.resize(each);
      to_float32(DType::float32, bytes.data() + i * each * sizeof(float), numbers);
    }
  }
  read_table(tables_.back());
  for (std::size_t i = 0; i < count; ++i) {
    to_float32(DType::float32, bytes.data() + i * sizeof(float), {&results[i].output_error, 1});
  }
  read_kept(first, count, results);
  return results;
}

std::vector<Residency> StoredUnit::read_kept(std::size_t setting) const {
  std::vector<LayerResult> results(1);
  read_kept(setting, 1, results);
  return std::move(results.front().kept);
}

void StoredUnit::read_kept(std::size_t first, std::size_t count, std::vector<LayerResult>& results) const {
  const std::int64_t start = offsets_[first_set_[first]];
  const std::int64_t end = offsets_[first_set_[first + count]];
  // Positions and, where they are told, until when and from when on.
  std::vector<std::vector<std::int32_t>> columns(positions_.size());
  for (std::size_t c = 0; c < columns.size(); ++c) {
    columns[c].resize(static_cast<std::size_t>(end - start));
    if (columns[c].empty()) continue;
    positions_[c].read_raw({start}, {end - start}, reinterpret_cast<std::byte*>(columns[c].data()));
  }
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t set = first_set_[first + i]; set < first_set_[first + i + 1]; ++set) {
      const auto part_of = [&](const std::vector<std::int32_t>& column) {
        return std::vector<int>(column.begin() + (offsets_[set] - start), column.begin() + (offsets_[set + 1] - start));
      };
      if (columns.size() >= 2) {
        results[i].kept.emplace_back(part_of(columns[0]), part_of(columns[1]), outline_.eviction_position,
                                     columns.size() == 3 ? part_of(columns[2]) : std::vector<int>());
      } else {
        results[i].kept.emplace_back(columns.empty() ? std::vector<int>() : part_of(columns[0]));
      }
    }
  }
}

UnitStore::UnitStore(const std::filesystem::path& output, const std::vector<TraceReplay>& outlines,
                     SweepIdentity identity)
    : output_(output),
      folder_(with_suffix(output, ".units")),
      outlines_(outlines),
      identity_(std::move(identity)),
      sweep_(digest_of(identity_.text())) {}

UnitStore::~UnitStore() {
  if (lock_ >= 0) ::close(lock_);
}

std::filesystem::path UnitStore::place_of(const ReplayUnit& unit) const {
  return folder_ / fmt::format("{}{}-{}.h5", kUnitPrefix, unit.replay, unit.layer);
}

std::filesystem::path UnitStore::place_of_survey(const ReplayUnit& unit) const {
  return folder_ / fmt::format("{}{}-{}.h5", kSurveyPrefix, unit.replay, unit.layer);
}

void UnitStore::save_survey(const ReplayUnit& unit, const std::vector<LayerSurvey>& surveys) const {
  std::vector<float> numbers;
  std::vector<std::int64_t> offsets = {0};
  for (const LayerSurvey& heads : surveys) {
    for (const std::vector<float>& head : heads) {
      numbers.insert(numbers.end(), head.begin(), head.end());
      offsets.push_back(static_cast<std::int64_t>(numbers.size()));
    }
  }
  const std::filesystem::path path = place_of_survey(unit);
  OutputFile output(path);
  hdf5::File file = hdf5::File::create(output.temporary(), path);
  file.write_string("/", "sweep", sweep_);
  for (const hdf5::Dataset& dataset : {file.write("/numbers", numbers, {static_cast<Index>(numbers.size())}),
                                       file.write("/offsets", offsets, {static_cast<Index>(offsets.size())})}) {
    file.write_string(dataset.path(), "xxh64", dataset.compute_xxh64());
  }
  file.write_int("/", "complete", 1);
  file.close();
  output.commit();
}

std::optional<std::vector<LayerSurvey>> UnitStore::read_survey(const ReplayUnit& unit) const {
  const std::filesystem::path path = place_of_survey(unit);
  const std::vector<std::string> names = names_in(folder_);
  if (std::ranges::find(names, path.filename().string()) == names.end()) return std::nullopt;
  const TraceReplay& outline = outlines_[static_cast<std::size_t>(unit.replay)];
  const auto kv_heads = static_cast<std::size_t>(outline.model.num_key_value_heads);
  try {
    const hdf5::File file = hdf5::File::open(path);
    if (file.read_int("/", "complete") != 1 || file.read_string("/", "sweep") != sweep_) return std::nullopt;
    for (const std::string dataset : {"/numbers", "/offsets"}) {
      if (file.dataset(dataset).compute_xxh64() != file.read_string(dataset, "xxh64")) return std::nullopt;
    }
    const std::vector<float> numbers = file.read_floats("/numbers");
    const std::vector<std::int64_t> offsets = file.read_int64s("/offsets");
    if (offsets.size() != outline.results.size() * kv_heads + 1) return std::nullopt;
    std::vector<LayerSurvey> surveys(outline.results.size(), LayerSurvey(kv_heads));
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      surveys[i / kv_heads][i % kv_heads].assign(numbers.begin() + offsets[i], numbers.begin() + offsets[i + 1]);
    }
    return surveys;
  } catch (const Error&) {
    return std::nullopt;
  }
}

void UnitStore::open(bool resume) {
  const auto refuse = [this](std::string_view reason) {
    return Error(fmt::format("{}: {}", folder_.string(), reason));
  };
  std::error_code failure;
  bool has_manifest = false;
  if (!std::filesystem::create_directory(folder_, failure)) {
    if (failure) throw refuse(fmt::format("cannot be made: {}", failure.message()));
    const std::vector<std::string> names = names_in(folder_);
    has_manifest = std::ranges::find(names, "sweep.toml") != names.end();
    if (!std::ranges::all_of(names, is_ours)) {
      throw refuse("is not a sweep's folder; remove or rename it, or choose another output");
    }
    if (!resume) {
      const auto units = std::ranges::count_if(names, [](const std::string& name) {
        return (name.starts_with(kUnitPrefix) || name.starts_with(kRunPrefix)) && name.ends_with(".h5");
      });
      throw refuse(fmt::format(
          "holds {} finished unit{} of an earlier sweep; go on with --resume, or remove the folder to begin "
          "again",
          units, units == 1 ? "" : "s"));
    }
  }
  if (has_manifest) {
    SweepIdentity before;
    try {
      before = SweepIdentity::from_text(file_text(manifest()), manifest().string());
    } catch (const Error& error) {
      throw refuse(fmt::format("cannot be resumed, remove it to begin again ({})", error.what()));
    }
    const std::string differs = difference(before, identity_);
    if (!differs.empty()) {
      throw refuse(
          fmt::format("holds units of a sweep that differs: {}; ask for the same, choose another output, or remove the "
                      "folder",
                      differs));
    }
  } else {
    OutputFile::write_text(manifest(), identity_.text());
  }
  lock();
}

// The lock goes with the process, however it ends.
void UnitStore::lock() {
  lock_ = ::open(manifest().c_str(), O_RDONLY | O_CLOEXEC);
  if (lock_ < 0) throw Error(fmt::format("{}: cannot be opened: {}", manifest().string(), std::strerror(errno)));
  // File systems without locks have to do without.
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    throw Error(fmt::format("{}: another kvreplay works in this folder; wait for it, or choose another output",
                            folder_.string()));
  }
}

std::vector<ReplayUnit> UnitStore::finished(std::vector<std::string>& notes) {
  std::map<std::string, ReplayUnit> expected;
  for (std::size_t r = 0; r < outlines_.size(); ++r) {
    for (int layer = 0; layer < outlines_[r].model.num_layers; ++layer) {
      const ReplayUnit unit{static_cast<int>(r), layer};
      expected.emplace(place_of(unit).filename().string(), unit);
    }
  }
  std::vector<ReplayUnit> units;
  for (const std::string& name : names_in(folder_)) {
    if (name == manifest().filename() || name.starts_with(kSurveyPrefix)) continue;
    std::string reason;
    const auto found = expected.find(name);
    if (found == expected.end()) {
      if (name.find(kTemporary) == std::string::npos)
        reason = fmt::format("{}: is no unit of this sweep", (folder_ / name).string());
    } else {
      try {
        read(found->second).verify();
        units.push_back(found->second);
        continue;
      } catch (const Error& error) {
        reason = error.what();
      }
    }
    // What was being written when a process was killed is expected and needs no word.
    if (!reason.empty()) notes.push_back(fmt::format("{}; it is removed and done again", reason));
    std::error_code failure;
    std::filesystem::remove(folder_ / name, failure);
    if (failure) throw Error(fmt::format("{}: cannot be removed: {}", (folder_ / name).string(), failure.message()));
  }
  std::ranges::sort(units);
  return units;
}

void UnitStore::save(const ReplayUnit& unit, const std::vector<LayerResult>& results) const {
  const TraceReplay& outline = outlines_[static_cast<std::size_t>(unit.replay)];
  const std::filesystem::path path = place_of(unit);
  OutputFile output(path);
  hdf5::File file = hdf5::File::create(output.temporary(), path);
  file.write_string("/", "format", kFormat);
  file.write_string("/", "sweep", sweep_);
  file.write_int("/", "replay", unit.replay);
  file.write_int("/", "layer", unit.layer);
  const auto write_table = [&](const std::string& name, const hdf5::Shape& shape, const auto& numbers_of) {
    hdf5::Dataset dataset = file.create_dataset(name, DType::float32, with_settings(shape, results.size()));
    std::vector<std::byte> bytes(static_cast<std::size_t>(hdf5::elements(shape)) * sizeof(float));
    hdf5::Shape first(shape.size() + 1, 0);
    for (const LayerResult& result : results) {
      std::ranges::fill(bytes, std::byte{0});
      from_float32(DType::float32, numbers_of(result), bytes.data());
      dataset.write_raw(first, with_settings(shape, 1), bytes.data());
      ++first.front();
    }
    file.write_string(name, "xxh64", dataset.compute_xxh64());
  };
  for (const MeasureTraits& measure : measures_of(outline)) {
    write_table(path_of(measure), layer_shape(measure, outline.extent()),
                [&measure](const LayerResult& result) { return std::span(result.measures[measure.measure]); });
  }
  write_table(kOutputError, {1}, [](const LayerResult& result) { return std::span(&result.output_error, 1); });
  FlatResidencies flat;
  for (const LayerResult& result : results) flat.add(result.kept, outline.eviction_position);
  const auto write_column = [&file](const std::string& name, const auto& numbers) {
    if (numbers.empty()) return;
    const hdf5::Dataset dataset = file.write(name, numbers, {static_cast<Index>(numbers.size())});
    file.write_string(name, "xxh64", dataset.compute_xxh64());
  };
  write_column("/kept", flat.positions);
  write_column("/until", flat.until);
  write_column("/from", flat.from);
  write_column("/offsets", flat.offsets);
  file.write_int("/", "complete", 1);
  file.close();
  output.commit();
}

StoredUnit UnitStore::read(const ReplayUnit& unit) const {
  return {place_of(unit), outlines_[static_cast<std::size_t>(unit.replay)], unit, sweep_};
}

void UnitStore::remove() {
  std::error_code failure;
  for (const std::string& name : names_in(folder_)) {
    // The manifest last: as long as there are units it says whose they are.
    if (is_ours(name) && name != manifest().filename()) std::filesystem::remove(folder_ / name, failure);
  }
  std::filesystem::remove(manifest(), failure);
  std::filesystem::remove(folder_, failure);
}

void note_stored_outputs(std::vector<TraceReplay>& outlines, const UnitStore& store) {
  for (std::size_t r = 0; r < outlines.size(); ++r) {
    std::vector<double> errors;
    for (int layer = 0; layer < outlines[r].model.num_layers; ++layer) {
      const LayerResult first = store.read({static_cast<int>(r), layer}).read(0, 1).front();
      errors.push_back(static_cast<double>(first.output_error));
    }
    note_outputs(outlines[r], errors);
  }
}

void note_stored_frozen_caches(std::vector<TraceReplay>& outlines, const UnitStore& store) {
  for (std::size_t r = 0; r < outlines.size(); ++r) {
    TraceReplay& outline = outlines[r];
    std::vector<bool> frozen;
    for (const ReplayResult& result : outline.results) frozen.push_back(result.scheduled);
    for (int layer = 0; layer < outline.model.num_layers; ++layer) {
      if (std::ranges::find(frozen, true) == frozen.end()) break;
      const StoredUnit unit = store.read({static_cast<int>(r), layer});
      for (std::size_t i = 0; i < frozen.size(); ++i) {
        if (!frozen[i]) continue;
        frozen[i] = std::ranges::all_of(unit.read_kept(i), [&](const Residency& cache) {
          return is_frozen_on_prompt(cache, outline.held[static_cast<std::size_t>(layer)]);
        });
      }
    }
    note_frozen_caches(outline, frozen);
  }
}

void for_each_result(const std::vector<TraceReplay>& outlines, const UnitStore& store, Index bytes,
                     const std::function<void(const TraceReplay&, const ReplayResult&)>& take) {
  for (std::size_t r = 0; r < outlines.size(); ++r) {
    const TraceReplay& outline = outlines[r];
    const std::size_t settings = outline.results.size();
    const auto at_once = static_cast<std::size_t>(std::max<Index>(bytes / memory_of_result({&outline, 1}), 1));
    TraceReplay some = outline;
    some.results = {};
    for (std::size_t first = 0; first < settings; first += at_once) {
      const std::size_t count = std::min(at_once, settings - first);
      some.results.assign(outline.results.begin() + static_cast<std::ptrdiff_t>(first),
                          outline.results.begin() + static_cast<std::ptrdiff_t>(first + count));
      allocate_tables(some);
      // One file after the other: each that is open takes memory of its own.
      for (int layer = 0; layer < outline.model.num_layers; ++layer) {
        store_layer(some, layer, store.read({static_cast<int>(r), layer}).read(first, count));
      }
      settle_capacities(some);
      for (const ReplayResult& result : some.results) take(some, result);
    }
  }
}

Index memory_of_result(std::span<const TraceReplay> outlines) {
  constexpr Index kVector = 64;  // what a vector takes beside its elements
  Index most = 0;
  for (const TraceReplay& outline : outlines) {
    // All layers, and one as it is stored and as it was handed out.
    const Index layers = outline.model.num_layers + 2;
    const Index tables = 4 * static_cast<Index>(measures().size());  // with their shapes, and as they were handed out
    for (const ReplayResult& result : outline.results) {
      const Index numbers = layers * numbers_per_layer(outline.extent(), result.rank_agreement);
      const Index sets = layers * result.kept.sets_per_layer;
      most = std::max(most, numbers * static_cast<Index>(sizeof(float)) + tables * kVector +
                                sets * (kVector + static_cast<Index>(sizeof(Residency)) +
                                        result.most_kept * static_cast<Index>(sizeof(int))) +
                                static_cast<Index>(sizeof(ReplayResult)));
    }
  }
  return most;
}

Index memory_of_reading(std::span<const TraceReplay> outlines) {
  constexpr Index kNames = 256;  // of a result: trace, policy, capacity
  Index most = 0;
  for (const TraceReplay& outline : outlines) {
    const auto settings = static_cast<Index>(outline.results.size());
    Index sets = 0;
    for (const ReplayResult& result : outline.results) sets += result.kept.sets_per_layer;
    most = std::max(most, (sets + settings) * static_cast<Index>(sizeof(std::int64_t)) +
                              settings * (static_cast<Index>(sizeof(ReplayResult)) + kNames));
  }
  // As they are stored and as they are used; and a result while it becomes a row of a table, or is sorted.
  return 2 * most + 3 * memory_of_result(outlines) + hdf5::kFileMemory;
}

}  // namespace kvreplay
