// The results of one or several files, as one set that can be compared.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "replay/results_reader.h"

namespace kvreplay {

/// Which results to look at. Empty members choose everything.
struct ResultFilter {
  std::vector<std::string> policies = {};  ///< specs, or names of methods ("restkv": all its settings; "restkv()": one)
  std::vector<std::string> capacities = {};  ///< as asked for; "all" is always chosen
  std::vector<std::string> traces = {};  ///< file names, with or without folder and suffix, or paths in trace_digests
  std::map<std::string, std::string> trace_digests = {};  ///< of those of `traces` that are files: which capture it is
  std::vector<int> eviction_positions = {};
  std::vector<int> layers = {};
  bool full_layers = false;  ///< of them only those that held the whole prompt
};

/// A policy at a capacity as it was asked for.
struct SettingKey {
  std::string policy;
  std::string capacity_request;

  bool operator==(const SettingKey&) const = default;
  bool operator<(const SettingKey& other) const {
    return std::tie(policy, capacity_request) < std::tie(other.policy, other.capacity_request);
  }
};

/// Whether a setting is one of these.
bool contains(std::span<const SettingKey> settings, const SettingKey& key);

/// Results of several files, numbers read on request.
class ResultSet {
 public:
  /// Throws Error where they cannot be compared: a file that is not a complete results file of this version; two
  /// captures under one trace name; results of one trace and eviction position with other spans or shapes; a setting at
  /// different `heads` or `share`; a policy, capacity, trace, eviction position and evaluation twice with different
  /// numbers (equal ones are counted once, with the measures of all, which notes() tells). One capture under two names
  /// goes by the first of them, which is told too. Throws UsageError, naming what there is, where `filter` leaves
  /// nothing or names what is not there.
  static ResultSet open(std::span<const std::filesystem::path> files, const ResultFilter& filter = {});

  /// Those of them that `wanted` is true of, with the same notes.
  ResultSet only(const std::function<bool(const StoredResult&)>& wanted) const;

  /// Those that can be compared with each other and averaged together; notes tell what is left out. Of a trace these
  /// are the results of one set of evaluation queries: of that which most of its settings were evaluated on, of equally
  /// many the one that begins last, since tokens between the eviction and the first query stay for free. And where some
  /// eviction positions have all of the trace's settings, what keeps everything apart, those positions alone. Throws
  /// Error where nothing is left to be compared, or nothing of a policy or capacity that `filter` named.
  ResultSet comparable() const;

  /// The same where eviction positions are told apart, so that each may have evaluation queries of its own.
  ResultSet comparable_at_each_eviction() const;

  /// Those of `results`, which one set has, that its comparable() leaves, also where it would throw.
  static std::vector<StoredResult> comparable(std::span<const StoredResult> results);

  /// In the order of the files; those that keep everything included. Each says whether there was nothing to choose: of
  /// files that do not, as its spec has it.
  const std::vector<StoredResult>& results() const { return results_; }

  /// Numbers of one of them, of the layers chosen: the first extent is that of layers_of(). Of a measure of the whole
  /// model all of them, [E]. Empty where the measure was not taken.
  Table read(std::size_t result, Measure measure) const;

  /// Whether a measure was taken.
  bool has(std::size_t result, Measure measure) const;

  /// Every policy and capacity, in the order of their first result.
  const std::vector<SettingKey>& settings() const { return settings_; }

  /// The results of a setting, one per trace and eviction position that has it; none for a setting that there is not.
  const std::vector<std::size_t>& of_setting(const SettingKey& key) const;

  /// Policies and requested capacities, each once, in the order of their first result.
  std::vector<std::string> policies() const;
  std::vector<std::string> capacities() const;

  /// The policy that `text` means: a spec, written canonically or not, or the name of a method that one policy has.
  /// Throws UsageError, naming those that there are; Error for one that comparable() left out.
  std::string policy_named(const std::string& text) const;

  /// What a trace goes by whose file says `name`.
  const std::string& trace_called(const std::string& name) const;

  /// The layers that read() gives of a result: at least one.
  std::vector<int> layers_of(const StoredResult& result) const;

  /// Overlap tables of the files, with their numbers, of the policies, capacities, traces and eviction positions that
  /// were chosen; of all layers and heads.
  std::vector<OverlapTable> overlaps() const;

  /// What whoever reads the numbers has to know, each once.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  using Place = std::pair<std::size_t, std::size_t>;  // reader, index in it

  // The first result of each kind, while files are read.
  struct Known {
    std::map<std::string, std::size_t> captures;                   // by digest
    std::map<std::string, std::size_t> names;                      // of traces, as in the files
    std::map<std::pair<std::string, int>, std::size_t> evictions;  // trace, eviction position
    std::map<SettingKey, std::size_t> settings;
    std::map<std::vector<int>, std::size_t> evaluations;  // numbered by their queries
    std::map<std::tuple<SettingKey, std::pair<std::string, int>, std::size_t>, std::size_t> results;
  };

  // What was left out since it is of other evaluation queries, and why.
  struct NotComparable {
    SettingKey setting;
    std::string why;
  };

  void add(std::size_t reader, std::size_t index, Known& known);
  void count_once(std::size_t result, Place place);
  Table read_all_layers(std::size_t result, Measure measure) const;
  void choose(const ResultFilter& filter);
  void note_results();

  void index_settings();
  void keep(const std::function<bool(std::size_t)>& wanted);
  void leave_out_other_evaluations(bool evictions_apart);
  void leave_out_partial_evictions();
  void require_two_policies_of(const ResultSet& all) const;
  std::string results_text(const std::vector<std::size_t>& which) const;
  void require_what_was_named() const;

  std::vector<std::shared_ptr<const ResultsReader>> readers_;
  std::vector<StoredResult> results_;
  std::vector<std::vector<Place>> places_;  // of each result: where a measure stands first, it is read
  std::vector<SettingKey> settings_;
  std::map<SettingKey, std::vector<std::size_t>> of_setting_;
  std::map<std::string, std::string> called_;  // traces by the names that files have for them
  std::vector<int> layers_;                    // chosen; empty: all
  bool full_layers_ = false;
  ResultFilter filter_;
  std::vector<NotComparable> not_comparable_;
  std::size_t repetitions_ = 0;
  std::vector<std::string> notes_;
};

/// Whether a policy is what `text` means in a ResultFilter.
bool is_policy(const std::string& policy, const std::string& text);

}  // namespace kvreplay
