#include "base/rotary.h"

#include <cmath>

namespace kvreplay {
namespace {

double angle_of(const RotaryTable& table, std::size_t pair, int position) {
  return static_cast<double>(table.inverse_frequencies[pair] * static_cast<float>(position));
}

}  // namespace

std::pair<Index, Index> RotaryTable::dimensions_of(std::size_t pair) const {
  const auto i = static_cast<Index>(pair);
  if (layout == Layout::interleaved) return {2 * i, 2 * i + 1};
  return {i, i + static_cast<Index>(inverse_frequencies.size())};
}

RotaryTable RotaryTable::plain(double theta, int head_dim) {
  RotaryTable table;
  for (int i = 0; i < head_dim / 2; ++i) {
    table.inverse_frequencies.push_back(static_cast<float>(std::pow(theta, -2.0 * i / head_dim)));
  }
  return table;
}

namespace {

// By the angles of `positions`, or back by them where `back`.
void turn(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix>& rows, bool back) {
  const double scale = back ? 1 / table.attention_scaling : table.attention_scaling;
  for (std::size_t pair = 0; pair < table.inverse_frequencies.size(); ++pair) {
    const auto [a, b] = table.dimensions_of(pair);
    for (std::size_t n = 0; n < positions.size(); ++n) {
      const auto row = static_cast<Index>(n);
      const double angle = angle_of(table, pair, positions[n]);
      const double cosine = std::cos(angle) * scale;
      const double sine = (back ? std::sin(angle) : -std::sin(angle)) * scale;
      const auto x = static_cast<double>(rows(row, a));
      const auto y = static_cast<double>(rows(row, b));
      rows(row, a) = static_cast<float>(x * cosine + y * sine);
      rows(row, b) = static_cast<float>(y * cosine - x * sine);
    }
  }
}

}  // namespace

void unrotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows) {
  turn(table, positions, rows, true);
}

void rotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows) {
  turn(table, positions, rows, false);
}

Eigen::MatrixXd mean_rotation(const RotaryTable& table, int first, int count, int head_dim) {
  Eigen::MatrixXd rotation = Eigen::MatrixXd::Identity(head_dim, head_dim);
  for (std::size_t pair = 0; pair < table.inverse_frequencies.size(); ++pair) {
    const auto [a, b] = table.dimensions_of(pair);
    double cosine = 0;
    double sine = 0;
    for (int position = first; position < first + count; ++position) {
      cosine += std::cos(angle_of(table, pair, position));
      sine += std::sin(angle_of(table, pair, position));
    }
    cosine *= table.attention_scaling / count;
    sine *= table.attention_scaling / count;
    rotation(a, a) = rotation(b, b) = cosine;
    rotation(a, b) = -sine;
    rotation(b, a) = sine;
  }
  return rotation;
}

}  // namespace kvreplay
