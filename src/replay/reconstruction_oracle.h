// Kept sets improved with hindsight: what the layer error could be at the same capacity.
#pragma once

#include <map>
#include <vector>

#include "policy/policy.h"
#include "replay/eviction.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// What the cost and the memory of exchanges in a layer depend on.
struct ExchangeShape {
  Granularity granularity = Granularity::kv;
  int positions = 0;               ///< that the layer holds
  Index tokens = 0;                ///< positions up to the last evaluation query
  Index queries = 0;               ///< evaluation queries
  bool output_projection = false;  ///< whether the layer has one: without it query heads do not touch each other
};

/// The operations of `exchanges` in every kept set of a layer, and of what is calculated before them.
double exchange_operations(const ModelInfo& model, const ExchangeShape& shape, int exchanges);

/// The most bytes that a LayerExchanges takes while it improves sets.
Index exchange_memory(const ModelInfo& model, const ExchangeShape& shape);

/// Exchanges positions of a layer's kept sets as long as that lowers the mean squared layer error over the evaluation
/// queries. Method, cost, and what is not guaranteed: docs/oracles.md. Arithmetic is float64.
class LayerExchanges {
 public:
  /// Reads the layer. Throws Error as the run's read() does.
  LayerExchanges(const CapturedRun& trace, int layer, const Eviction& eviction);
  LayerExchanges(const LayerExchanges&) = delete;
  LayerExchanges& operator=(const LayerExchanges&) = delete;
  ~LayerExchanges();

  /// `sets` after at most `exchanges` per set; sizes stay as they are. They are as in KeptSets: one per query head at
  /// granularity query, else one per KV head, all equal at granularity layer; all of positions that the layer holds, as
  /// are those that come in.
  std::vector<std::vector<int>> improve(Granularity granularity, std::vector<std::vector<int>> sets, int exchanges);

 private:
  using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  struct Head;
  struct Sharing;
  class SharedSet;

  MatrixD no_error() const;
  void read_heads(const CapturedRun& trace, int layer, int kv_head, const Eviction& eviction);
  const std::vector<Sharing>& sharing(Granularity granularity);

  int group_size_;
  int first_held_;
  std::vector<MatrixD> values_;                          // [KV head]: [R, D] of the positions that are held
  std::vector<Head> heads_;                              // [query head]
  Eigen::VectorXd importance_;                           // [Q]: what a query's squared error counts in the objective
  std::map<Granularity, std::vector<Sharing>> sharing_;  // who keeps the same positions
};

}  // namespace kvreplay
