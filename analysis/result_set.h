// The results of one or several files, as one set that can be compared.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "replay/results_reader.h"

namespace kvreplay {

/// Which results to look at. Empty members choose everything.
struct ResultFilter {
  std::vector<std::string> policies;    ///< canonical specs, or names of methods ("restkv": all its settings)
  std::vector<std::string> capacities;  ///< as asked for; "all" is always chosen
  std::vector<std::string> traces;      ///< file names, with or without folder and suffix
  std::vector<int> eviction_positions;
  std::vector<int> layers;
};

/// A policy at a capacity as it was asked for.
struct SettingKey {
  std::string policy;
  std::string capacity_request;

  auto operator<=>(const SettingKey&) const = default;
};

/// Results of several files, numbers read on request.
class ResultSet {
 public:
  /// Throws Error where they cannot be compared: a file that is not a complete results file of this version; two
  /// captures under one trace name; results of one trace and eviction position with other evaluation queries, spans or
  /// shapes; a policy, capacity, trace and eviction position twice, at different `heads` or `share`, or with different
  /// numbers (equal ones are counted once, which notes() tells). Throws UsageError, naming what there is, where
  /// `filter` leaves nothing or names what is not there.
  static ResultSet open(std::span<const std::filesystem::path> files, const ResultFilter& filter = {});

  /// In the order of the files; those that keep everything included.
  const std::vector<StoredResult>& results() const { return results_; }

  /// Numbers of one of them, of the layers chosen: the first extent is layers().size(), or the result's layers.
  Table read(std::size_t result, Measure measure) const;

  /// Every policy and capacity, in the order of their first result.
  const std::vector<SettingKey>& settings() const { return settings_; }

  /// The results of a setting, one per trace and eviction position that has it.
  const std::vector<std::size_t>& of_setting(const SettingKey& key) const;

  /// The layers that read() gives of a result.
  std::vector<int> layers_of(const StoredResult& result) const;

  /// Overlap tables of the files, with their numbers, of what was chosen (all layers and heads).
  std::vector<OverlapTable> overlaps() const;

  /// What whoever reads the numbers has to know, each once.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  std::vector<ResultsReader> readers_;
  std::vector<StoredResult> results_;
  std::vector<std::pair<std::size_t, std::size_t>> place_;  // of each result: reader, index in it
  std::vector<SettingKey> settings_;
  std::vector<std::vector<std::size_t>> of_setting_;
  std::vector<int> layers_;
  std::vector<std::string> notes_;
};

}  // namespace kvreplay
