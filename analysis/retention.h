// What is kept: overlap between policies, heads and eviction positions, and where in the prompt.
#pragma once

#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "analysis/bootstrap.h"
#include "analysis/result_set.h"

namespace kvreplay {

/// Overlap of two policies at a capacity, averaged over traces, eviction positions and query heads.
struct PolicyOverlap {
  std::string capacity_request;
  int layer = -1;  ///< −1: all layers
  std::string policy;
  std::string other;
  double jaccard = 0;
  double containment = 0;
};

/// All pairs in both orders, each policy with itself included, over all layers and per layer. Every trace and eviction
/// position that has both policies weighs the same.
std::vector<PolicyOverlap> policy_overlaps(const ResultSet& results);

/// Which part of each span survives.
struct SpanRecall {
  std::string trace;
  std::string label;
  int start = 0;     ///< where the span begins
  double depth = 0;  ///< the same as a share of the positions before the eviction
  int eviction_position = 0;
  std::string policy;
  std::string capacity_request;
  int layer = -1;     ///< −1: all layers
  double recall = 0;  ///< mean over query heads (and layers)
  /// Of all positions that a layer held, in the mean over those layers: what chance keeps of every span. Files of older
  /// versions do not tell layers apart.
  double kept_share = 0;
  bool oracle = false;
  bool nothing_to_choose = false;  ///< see ReplayResult
  double weight =
      0;  ///< in means over spans: every trace weighs 1, every eviction in it and every span in that the same
};

/// In the order of the results, spans within, all layers before each.
std::vector<SpanRecall> span_recalls(const ResultSet& results);

/// How much more of annotated spans a setting keeps than chance, which keeps the same share of every span as of the
/// prompt.
struct SpanExcess {
  std::string policy;
  std::string capacity_request;
  bool oracle = false;
  bool nothing_to_choose = false;  ///< see ReplayResult
  double recall = 0;               ///< mean over spans
  double kept_share = 0;           ///< of the positions before the eviction
  double mean = 0;                 ///< recall less share
  Interval interval;
  double p_value = std::numeric_limits<double>::quiet_NaN();   ///< that spans are kept like any other position
  double adjusted = std::numeric_limits<double>::quiet_NaN();  ///< corrected for the settings of a capacity (Holm)
  int spans = 0;
};

/// A row per setting with spans, in the order of `recalls`. Spans are what is drawn at random, each with its mean over
/// eviction positions, layers and heads: intervals and p values are Student's t of their weighted mean, and intervals
/// end where the recall would be less than 0 or more than 1. NaN of a single span, and where all are the same.
std::vector<SpanExcess> span_excesses(std::span<const SpanRecall> recalls, double confidence);

/// Rank agreement between a policy's scores and the oracle's importance, over all layers and per layer.
struct RankAgreement {
  std::string policy;
  std::string capacity_request;
  int layer = -1;
  double spearman = 0;  ///< mean over query heads; every trace and eviction position weighs the same
  double kendall = 0;
};

/// None where it was not measured (`replay --rank-agreement`).
std::vector<RankAgreement> rank_agreements(const ResultSet& results);

/// Kept sets of one or several files, of results that a set has.
class RetentionSet {
 public:
  /// Throws Error where a file has no sets of any of `results`, where sets do not fit the result that they are of, or
  /// where two files have different sets for one result. Sets of other results than the chosen are left out, and equal
  /// ones counted once; notes() tells both.
  static RetentionSet open(std::span<const std::filesystem::path> files, const ResultSet& results);

  bool empty() const { return entries_.empty(); }

  struct Entry {
    std::size_t result;  ///< index in the result set
    std::size_t reader;
    std::size_t index;  ///< in the reader
  };

  /// In the order of the results.
  const std::vector<Entry>& entries() const { return entries_; }

  /// Throws Error also where as many positions are kept as the result does not say.
  KeptSets read(const Entry& entry, const ResultSet& results) const;

  /// What whoever reads the numbers has to know, each once.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  std::vector<KeptSetsReader> readers_;
  std::vector<Entry> entries_;
  std::vector<std::string> notes_;
};

/// How far the heads of a layer keep the same.
struct HeadOverlap {
  std::string policy;
  std::string capacity_request;
  int layer = -1;             ///< −1: all layers
  bool within_group = false;  ///< between query heads of one KV head; else between heads of different KV heads
  double jaccard = 0;         ///< mean over pairs of heads; every trace and eviction position weighs the same
};

/// By setting: within groups (at granularity query), then between them, over all layers and then per layer. None of
/// settings that keep everything, and of granularity layer, where all heads keep the same. `kept` is of `results`, and
/// means are over those of them that `averaged` holds as well.
std::vector<HeadOverlap> head_overlaps(const ResultSet& results, const RetentionSet& kept, const ResultSet& averaged);

/// How a policy's kept sets change when the eviction comes later.
struct Stability {
  std::string trace;
  std::string policy;
  std::string capacity_request;
  int layer = -1;       ///< −1: all layers
  int from = 0;         ///< eviction position
  int to = 0;           ///< a later one
  double jaccard = 0;   ///< of what is kept at `from`, and what is kept at `to` of the positions before `from`
  double returned = 0;  ///< share of what `to` keeps of those positions that `from` had already evicted: what a cache
                        ///< that evicts at `from` cannot get back
};

/// Between each eviction position of a trace and the next, and between the first and all later ones: means over query
/// heads (and layers). None of settings that keep everything.
std::vector<Stability> stabilities(const ResultSet& results, const RetentionSet& kept);

/// Where a setting keeps: a row of a raster.
struct KeptRaster {
  std::string trace;
  std::string policy;
  std::string capacity_request;
  int eviction_position = 0;
  int layer = -1;            ///< −1: all layers
  std::vector<float> share;  ///< per bin: of the positions of the bin, over heads (and layers), that are kept
};

/// The bins of a raster over a prompt: at most `most` of equal width (the last may be shorter).
struct RasterBins {
  int positions = 0;  ///< of the prompt before the eviction
  int width = 1;      ///< positions per bin

  int count() const { return (positions + width - 1) / width; }
  static RasterBins of(int positions, int most);
};

/// Rows for all settings with kept sets, over all layers, and per layer where `per_layer`; in at most `most_bins` bins.
std::vector<KeptRaster> kept_rasters(const ResultSet& results, const RetentionSet& kept, int most_bins, bool per_layer);

}  // namespace kvreplay
