// Rotary position embedding: how positions turn keys and queries, and how to turn them back.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// How positions turn the keys and queries of a layer (arXiv 2104.09864). The first rotated_dims() dimensions of a head
/// turn in pairs: pair i by inverse_frequencies[i] radians per position, and is multiplied by attention_scaling.
struct RotaryTable {
  /// Which dimensions are a pair.
  enum class Layout {
    half,         ///< i and i + R/2
    interleaved,  ///< 2i and 2i + 1
  };

  std::string name;                        ///< in a trace's /rotary
  std::vector<float> inverse_frequencies;  ///< [R/2]
  double attention_scaling = 1;
  Layout layout = Layout::half;

  int rotated_dims() const { return 2 * static_cast<int>(inverse_frequencies.size()); }  ///< R

  /// The two dimensions of pair i.
  std::pair<Index, Index> dimensions_of(std::size_t pair) const;

  bool operator==(const RotaryTable&) const = default;

  /// The plain one: pair i turns by theta^(−2i/D), all D dimensions do, nothing is scaled.
  static RotaryTable plain(double theta, int head_dim);
};

/// Takes the rotation off `rows` [n, D], of which row i was turned at positions[i] and is turned back in place; the
/// scaling is undone too. Angles are float32 products, as models compute them; all else is double.
void unrotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows);

/// Turns `rows` [n, D] as the model does, row i at positions[i], in place: the inverse of unrotate().
void rotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows);

/// The same for who turns vectors to the same positions again and again: what a position does is calculated once. Not
/// for use by several threads at once.
class RotaryAngles {
 public:
  /// Of a pair, its attention scaling included.
  struct Turn {
    double cosine;
    double sine;
  };

  explicit RotaryAngles(RotaryTable table) : table_(std::move(table)) {}

  /// Turns a vector of D dimensions at `position`, not below 0, into `to`.
  void rotate(int position, const float* from, Index head_dim, float* to);

 private:
  const std::vector<Turn>& turns_of(int position);

  RotaryTable table_;
  std::vector<std::vector<Turn>> turns_;  // [position][pair]; none: not asked for yet
};

/// The mean of what positions first … first + count − 1 do to a vector of D dimensions, as a matrix [D, D]. It is no
/// rotation: cosines and sines are averaged.
Eigen::MatrixXd mean_rotation(const RotaryTable& table, int first, int count, int head_dim);

}  // namespace kvreplay
