// Results at full resolution, as HDF5, one at a time.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/output_file.h"
#include "hdf5/hdf5.h"
#include "replay/overlap.h"
#include "replay/result.h"

namespace kvreplay {

/// The `format_version` of results and kept sets that are written, and the oldest that is read. Kept sets of which some
/// were evicted more than once are of a newer one, so that no reader takes them for what one eviction left, and those
/// of which some were hidden and came back of a newer one still.
constexpr int kResultsFormatVersion = 3;
constexpr int kOldestResultsFormatVersion = 2;
constexpr int kResidencyFormatVersion = 4;
constexpr int kHiddenRowsFormatVersion = 5;

/// An HDF5 file in which results are stored one after the other, so that never more than one has to be in memory. It is
/// complete or absent: destroyed before finish(), it leaves nothing behind. All members throw Error.
class ResultStream {
 public:
  ResultStream(const std::filesystem::path& path, std::string_view format);

  hdf5::File& file() { return file_; }

  /// Puts the file in its place.
  void finish(int version = kResultsFormatVersion);

 private:
  OutputFile output_;  // outlives the file, which is closed before its temporary name is removed
  hdf5::File file_;
};

/// Writes results.h5 (docs/results-format.md): `/results/<i>` for every result, `/overlap/<i>` for every overlap table,
/// both in the order in which they are added.
class ResultsWriter {
 public:
  /// `replays` are those whose results will be added; their numbers are not looked at.
  ResultsWriter(const std::filesystem::path& path, std::span<const TraceReplay> replays);

  /// Adds one of the results of `replay`. Throws Error.
  void add(const TraceReplay& replay, const ReplayResult& result);

  /// Adds an overlap table, once all results are there. Throws Error.
  void add(const OverlapTable& table);

  /// Puts the file in its place. Throws Error.
  void finish() { stream_.finish(); }

 private:
  ResultStream stream_;
  int results_ = 0;
  int overlaps_ = 0;
};

/// Writes the kept sets of results: `/kept/<i>` with `kept` and `offsets`; set s (layer-major, then head) is
/// `kept[offsets[s]:offsets[s+1]]`. Beside them `until`, the last query that sees each of these positions, where there
/// was more than one eviction, and `from`, the first one, where some were hidden for a while.
class KeptSetsWriter {
 public:
  explicit KeptSetsWriter(const std::filesystem::path& path) : stream_(path, "kvreplay-kept") {}

  /// Adds those of one of the results of `replay`. Throws Error.
  void add(const TraceReplay& replay, const ReplayResult& result);

  /// Puts the file in its place. Throws Error.
  void finish() { stream_.finish(version_); }

 private:
  ResultStream stream_;
  int results_ = 0;
  int version_ = kResultsFormatVersion;
};

/// Writes a whole replay at once. Throws Error.
void write_results(const std::filesystem::path& path, const std::vector<TraceReplay>& replays,
                   const std::vector<OverlapTable>& overlaps);

/// The same for its kept sets. Throws Error.
void write_kept_sets(const std::filesystem::path& path, const std::vector<TraceReplay>& replays);

}  // namespace kvreplay
