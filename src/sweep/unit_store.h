// The finished units of a sweep, on disk, so that nothing that was calculated is ever lost.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "hdf5/hdf5.h"
#include "replay/engine.h"
#include "sweep/configuration.h"

namespace kvreplay {

/// The stored results of one unit.
class StoredUnit {
 public:
  /// Throws Error where the file is not what UnitStore::save wrote for this unit of this sweep, digests of the numbers
  /// excepted.
  StoredUnit(const std::filesystem::path& path, const TraceReplay& outline, const ReplayUnit& unit,
             const std::string& sweep);

  /// Compares all numbers with their digests. Throws Error on damage.
  void verify() const;

  /// The results of `count` settings, as the engine handed them out. Throws Error on damage that shows.
  std::vector<LayerResult> read(std::size_t first, std::size_t count) const;

  /// What one setting keeps alone. Throws Error as read() does.
  std::vector<Residency> read_kept(std::size_t setting) const;

 private:
  void read_kept(std::size_t first, std::size_t count, std::vector<LayerResult>& results) const;

  hdf5::File file_;
  const TraceReplay& outline_;
  std::vector<std::size_t> first_set_;  // [R + 1]: of each setting among all sets
  std::vector<std::int64_t> offsets_;   // [sets + 1]
  std::vector<hdf5::Dataset> tables_;   // of the measures that are stored, then the outputs' error
  std::vector<hdf5::Dataset>
      positions_;  // `kept`; `until` and `from` where they are stored; none where nothing is kept
};

/// A folder that holds one file per finished unit and the manifest of the sweep that they belong to.
/// Several processes may save units at once, each unit one of them.
class UnitStore {
 public:
  /// Of a sweep whose results will be `output`. Touches nothing. `outlines` must outlive it.
  UnitStore(const std::filesystem::path& output, const std::vector<TraceReplay>& outlines, SweepIdentity identity);
  ~UnitStore();
  UnitStore(const UnitStore&) = delete;
  UnitStore& operator=(const UnitStore&) = delete;

  const std::filesystem::path& folder() const { return folder_; }

  /// Makes the folder, or takes the one that is there if `resume` says so, for this process and those that it works
  /// with. Throws Error, and changes nothing, where there is one and `resume` is false, where it belongs to a sweep
  /// that differs (naming what), and where another process works in it.
  void open(bool resume);

  /// The units that are there and undamaged, in their order. Removes what is damaged or half-written and says so in
  /// `notes`. After open(), before anybody saves.
  std::vector<ReplayUnit> finished(std::vector<std::string>& notes);

  /// Stores a unit's results, one per setting of its outline: complete or not at all. Throws Error.
  void save(const ReplayUnit& unit, const std::vector<LayerResult>& results) const;

  /// Opens what was saved. Throws Error.
  StoredUnit read(const ReplayUnit& unit) const;

  /// Stores what budgets found out about a unit's layer, of every setting: complete or not at all. Throws Error.
  void save_survey(const ReplayUnit& unit, const std::vector<LayerSurvey>& surveys) const;

  /// What save_survey() stored; nothing where none did, or where it is damaged. Throws Error.
  std::optional<std::vector<LayerSurvey>> read_survey(const ReplayUnit& unit) const;

  /// Removes the folder with what this class has put there; what else stands in it stays.
  void remove();

 private:
  std::filesystem::path manifest() const { return folder_ / "sweep.toml"; }
  std::filesystem::path place_of(const ReplayUnit& unit) const;
  std::filesystem::path place_of_survey(const ReplayUnit& unit) const;
  void lock();

  std::filesystem::path output_;
  std::filesystem::path folder_;
  const std::vector<TraceReplay>& outlines_;
  SweepIdentity identity_;
  std::string sweep_;  ///< digest of the identity: which sweep a unit is of
  int lock_ = -1;
};

/// Adds to the notes of `outlines`, which are those of the store, what their units tell of the traces' outputs. Every
/// unit must be there. Throws Error.
void note_stored_outputs(std::vector<TraceReplay>& outlines, const UnitStore& store);

/// The same of policies that froze on the prompt, of whose settings one at a time is read.
void note_stored_frozen_caches(std::vector<TraceReplay>& outlines, const UnitStore& store);

/// Hands out every result of `outlines` whole, in the order of the outlines, with the outline that it belongs to. Reads
/// as many at a time as `bytes` hold, or one. Every unit must be there. Throws Error.
void for_each_result(const std::vector<TraceReplay>& outlines, const UnitStore& store, Index bytes,
                     const std::function<void(const TraceReplay&, const ReplayResult&)>& take);

/// The bytes that one whole result takes, and that for_each_result() takes beside those of the results: the most of all
/// outlines.
Index memory_of_result(std::span<const TraceReplay> outlines);
Index memory_of_reading(std::span<const TraceReplay> outlines);

}  // namespace kvreplay
