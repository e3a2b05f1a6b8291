// What a sweep is asked for, as a file: to be written by a person, and to tell whether two sweeps are the same.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "replay/request.h"
#include "trace/reader.h"

namespace kvreplay {

/// One `key = value` or `key = [value, …]`, values as text whatever their type.
struct ConfigurationEntry {
  std::string key;
  std::vector<std::string> values;
  bool list = false;
  int line = 0;  ///< in the file, from 1
};

/// Reads TOML whose values are strings, numbers, true and false, and arrays of these. Entries come in the order of the
/// file. Throws UsageError as "`shown_as`: line 3: …" for tables, other values and what is not TOML.
std::vector<ConfigurationEntry> read_configuration(std::string_view text, const std::string& shown_as);

/// The same as TOML, every value a string. Throws UsageError for a value that is not UTF-8.
std::string write_configuration(const std::vector<ConfigurationEntry>& entries);

/// A file that results depend on.
struct FileIdentity {
  std::string file;  ///< as given, but printable
  std::int64_t size = 0;
  std::string content;  ///< a digest

  bool operator==(const FileIdentity&) const = default;
};

/// Of a trace: its content is all metadata with the digests that its datasets bring; where one brings none, the time of
/// the last change stands for it, as everything else would take as long as reading it. Throws Error.
FileIdentity identity_of(const TraceReader& trace);

/// Of a small file, from all its bytes. Throws Error where it cannot be read.
FileIdentity identity_of(const std::filesystem::path& file);

/// All that the results of a sweep follow from.
struct SweepIdentity {
  std::string version;  ///< of kvreplay
  std::vector<std::string> policies;
  std::vector<std::string> capacities;
  std::vector<std::string> eviction_positions;
  std::string evaluate_from;  ///< a position or "prompt"; empty: not given
  std::string heads;          ///< empty: the policies' own
  std::string share;
  bool rank_agreement = false;
  std::vector<std::string> live;  ///< of a live run, what else was asked of it, as in "--generate 8"; none of a sweep
  std::vector<FileIdentity> traces;
  std::vector<FileIdentity> files;  ///< plug-ins, and what policies read

  SweepIdentity() = default;
  SweepIdentity(const ReplayRequest& request, const std::vector<TraceReader>& readers,
                const std::vector<std::filesystem::path>& other_files);

  /// As a file, and back. from_text throws UsageError where that is not one.
  std::string text() const;
  static SweepIdentity from_text(std::string_view text, const std::string& shown_as);
};

/// Exactly what differs, for a person: which option, before and now; which file, size or content. Empty for the same.
std::string difference(const SweepIdentity& before, const SweepIdentity& now);

}  // namespace kvreplay
