// Reads the files that ResultsWriter and KeptSetsWriter write.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hdf5/hdf5.h"
#include "replay/measure.h"
#include "replay/overlap.h"
#include "replay/result.h"

namespace kvreplay {

/// What a results file says of one of its results, beside the numbers.
struct StoredResult {
  std::string trace;         ///< file name as given to the replay
  std::string trace_digest;  ///< which capture it was
  std::string model;
  int num_layers = 0;       ///< L
  int num_query_heads = 0;  ///< H
  int num_kv_heads = 0;
  int prompt_length = 0;
  std::string policy;            ///< canonical spec
  std::string capacity_request;  ///< as asked for: "128", "25%"; kAllPositions for full
  int capacity = 0;              ///< granted on average
  double kept = 0;               ///< mean positions in a kept set
  double bytes_per_token = 0;    ///< that the kept sets cost; 0 where the file does not say, being of an older version
  int eviction_position = 0;
  std::vector<int> held;               ///< [L] positions that a layer held; in files that do not say, all
  std::vector<double> kept_per_layer;  ///< [L] mean positions in a kept set; in files that do not say, `kept`
  Granularity granularity = Granularity::kv;
  Share share = Share::mean;
  bool oracle = false;
  std::optional<bool> nothing_to_choose;  ///< see ReplayResult; none where an older file does not say
  std::vector<int> evaluation_positions;  ///< [E]
  std::vector<Span> spans;                ///< [S]
  std::vector<std::string> notes;

  /// Whether a layer held the whole prompt.
  bool holds_everything(int layer) const { return held[static_cast<std::size_t>(layer)] == eviction_position; }

  /// Mean positions in a kept set of some layers, at least one, and the share of what these layers held.
  struct Kept {
    double positions = 0;
    double share = 0;
  };
  Kept kept_in(const std::vector<int>& layers) const;
};

/// Reads what ResultsWriter wrote: identities at once, numbers on request. Traces, policies and capacities are
/// printable. Members throw Error as "file: path: reason", also for numbers whose shape does not fit the result, and
/// for NaN in measures that are of everything.
class ResultsReader {
 public:
  /// Throws Error where the file is not a complete results file of this version.
  explicit ResultsReader(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_.path(); }
  const std::vector<StoredResult>& results() const { return results_; }

  /// The numbers of a measure as measures() describes them; empty where it was not measured.
  Table read(std::size_t result, Measure measure) const;

  /// Whether it was measured.
  bool has(std::size_t result, Measure measure) const;

  /// Overlap between policies, without their numbers.
  const std::vector<OverlapTable>& overlaps() const { return overlaps_; }

  /// One of them with its numbers.
  OverlapTable read_overlap(std::size_t overlap) const;

 private:
  hdf5::File file_;
  std::vector<StoredResult> results_;
  std::vector<OverlapTable> overlaps_;
};

/// Whose kept sets they are.
struct StoredKeptSets {
  std::string trace;
  std::string tokens_digest;  ///< of the tokens before the eviction; empty: the file is older and does not say
  std::string policy;
  std::string capacity_request;
  int eviction_position = 0;
  Granularity granularity = Granularity::kv;  ///< query or kv: what one set is for
  Index num_sets = 0;                         ///< of all layers
};

/// Reads what KeptSetsWriter wrote, like ResultsReader.
class KeptSetsReader {
 public:
  /// Throws Error where the file is not a complete file of kept sets of this version.
  explicit KeptSetsReader(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_.path(); }
  const std::vector<StoredKeptSets>& kept() const { return kept_; }

  /// The sets of one of them, layer-major. `num_layers` says how many sets there are per layer. Throws Error also where
  /// a set is not ascending positions before the eviction, or no Residency where it tells until when.
  KeptSets read(std::size_t index, int num_layers) const;

 private:
  hdf5::File file_;
  std::vector<StoredKeptSets> kept_;
};

}  // namespace kvreplay
