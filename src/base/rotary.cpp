#include "base/rotary.h"

#include <algorithm>
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

using Turn = RotaryAngles::Turn;

// What a position does to a table's pairs, or takes back.
std::vector<Turn> turns_at(const RotaryTable& table, int position, bool back) {
  const double scale = back ? 1 / table.attention_scaling : table.attention_scaling;
  std::vector<Turn> turns;
  for (std::size_t pair = 0; pair < table.inverse_frequencies.size(); ++pair) {
    const double angle = angle_of(table, pair, position);
    turns.push_back({std::cos(angle) * scale, (back ? std::sin(angle) : -std::sin(angle)) * scale});
  }
  return turns;
}

void turn(const RotaryTable& table, const std::vector<Turn>& turns, const float* from, Index head_dim, float* to) {
  for (std::size_t pair = 0; pair < turns.size(); ++pair) {
    const auto [a, b] = table.dimensions_of(pair);
    const auto x = static_cast<double>(from[a]);
    const auto y = static_cast<double>(from[b]);
    to[a] = static_cast<float>(x * turns[pair].cosine + y * turns[pair].sine);
    to[b] = static_cast<float>(y * turns[pair].cosine - x * turns[pair].sine);
  }
  if (to != from) std::copy(from + table.rotated_dims(), from + head_dim, to + table.rotated_dims());
}

void turn_rows(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix>& rows, bool back) {
  for (std::size_t n = 0; n < positions.size(); ++n) {
    float* const row = rows.data() + static_cast<Index>(n) * rows.outerStride();
    turn(table, turns_at(table, positions[n], back), row, rows.cols(), row);
  }
}

}  // namespace

const std::vector<Turn>& RotaryAngles::turns_of(int position) {
  const auto place = static_cast<std::size_t>(position);
  if (turns_.size() <= place) turns_.resize(place + 1);
  if (turns_[place].empty()) turns_[place] = turns_at(table_, position, false);
  return turns_[place];
}

void RotaryAngles::rotate(int position, const float* from, Index head_dim, float* to) {
  turn(table_, turns_of(position), from, head_dim, to);
}

void unrotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows) {
  turn_rows(table, positions, rows, true);
}

void rotate(const RotaryTable& table, std::span<const int> positions, Eigen::Ref<Matrix> rows) {
  turn_rows(table, positions, rows, false);
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
