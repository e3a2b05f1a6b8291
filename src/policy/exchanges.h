// Kept sets improved with hindsight: what the layer error could be at the same capacity.
#pragma once

#include <map>
#include <vector>

#include "policy/decision.h"
#include "policy/policy.h"

namespace kvreplay {

/// The operations of `exchanges` in every kept set of a layer, and of what is calculated before them. Without an output
/// projection query heads do not touch each other.
double exchange_operations(const RefinementShape& shape, int exchanges);

/// The most bytes that a LayerExchanges takes while it improves sets.
Index exchange_memory(const RefinementShape& shape);

/// Exchanges positions of a layer's kept sets as long as that lowers the mean squared layer error over the evaluation
/// queries. Method, cost, and what is not guaranteed: docs/oracles.md. Arithmetic is float64.
class LayerExchanges {
 public:
  /// Reads the layer, whose positions follow each other. Throws Error as its heads do.
  explicit LayerExchanges(const LayerSource& layer);
  LayerExchanges(const LayerExchanges&) = delete;
  LayerExchanges& operator=(const LayerExchanges&) = delete;
  ~LayerExchanges();

  /// `sets` after at most `exchanges` per set; sizes stay as they are. At granularity layer all are equal; all are of
  /// positions that the layer holds, as are those that come in.
  LayerSets improve(Granularity granularity, LayerSets sets, int exchanges);

 private:
  using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  struct Head;
  struct Sharing;
  class SharedSet;

  MatrixD no_error() const;
  void read_heads(const HeadSource& source);
  const std::vector<Sharing>& sharing(Granularity granularity);

  int group_size_;
  int first_held_;
  std::vector<MatrixD> values_;                          // [KV head]: [R, D] of the positions that are held
  std::vector<Head> heads_;                              // [query head]
  Eigen::VectorXd importance_;                           // [Q]: what a query's squared error counts in the objective
  std::map<Granularity, std::vector<Sharing>> sharing_;  // who keeps the same positions
};

}  // namespace kvreplay
