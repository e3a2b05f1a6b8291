#include "analysis/parameter_grid.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <utility>

namespace kvreplay {
namespace {

using At = std::vector<double>;

// Where a point lies on the axes, and what all its other parameters are.
std::pair<At, std::string> placed(const ParameterPoint& point, std::span<const std::string> axes) {
  At at(axes.size(), 0.0);
  std::string others;
  for (const auto& [name, value] : point.parameters) {
    const auto axis = std::ranges::find(axes, name);
    if (axis != axes.end()) {
      at[static_cast<std::size_t>(axis - axes.begin())] = value;
    } else {
      others += fmt::format("{}{}={}", others.empty() ? "" : ", ", name, value);
    }
  }
  return {std::move(at), std::move(others)};
}

// How much a map of two parameters tells: its cells, times the share of them that it has.
double told_by(const std::vector<GridCell>& cells) {
  std::set<double> rows;
  std::set<double> columns;
  for (const GridCell& cell : cells) {
    rows.insert(cell.at[0]);
    columns.insert(cell.at[1]);
  }
  const auto count = static_cast<double>(cells.size());
  return cells.empty() ? 0 : count * count / static_cast<double>(rows.size() * columns.size());
}

bool has_two_values_of_each(const std::vector<GridCell>& cells, std::size_t axes) {
  for (std::size_t axis = 0; axis < axes; ++axis) {
    std::set<double> values;
    for (const GridCell& cell : cells) values.insert(cell.at[axis]);
    if (values.size() < 2) return false;
  }
  return true;
}

}  // namespace

ParameterGrid parameter_grid(std::span<const ParameterPoint* const> points, std::span<const std::string> axes) {
  // By what the others are, in the order of the points: what is there on the axes.
  std::vector<std::string> order;
  std::map<std::string, std::map<At, const ParameterPoint*>> of_others;
  for (const ParameterPoint* point : points) {
    auto [at, others] = placed(*point, axes);
    if (!of_others.contains(others)) order.push_back(others);
    of_others[others][std::move(at)] = point;
  }
  const auto cells_of = [&of_others](const std::string& others) {
    std::vector<At> cells;
    for (const auto& [at, point] : of_others.at(others)) cells.push_back(at);
    return cells;
  };
  ParameterGrid grid;
  if (order.empty()) return grid;
  const auto largest =
      std::ranges::max_element(order, {}, [&](const std::string& others) { return of_others.at(others).size(); });
  const std::vector<At> cells = cells_of(*largest);
  for (const At& at : cells) grid.cells.push_back({at, 0, {}, 0});
  for (const std::string& others : order) {
    if (cells_of(others) != cells) {
      grid.left_out += of_others.at(others).size();
      continue;
    }
    grid.others.push_back(others);
    std::size_t i = 0;
    for (const auto& [at, point] : of_others.at(others)) {
      GridCell& cell = grid.cells[i++];
      cell.mean += point->mean;
      cell.interval = point->interval;
      ++cell.settings;
      grid.points.push_back(point);
    }
  }
  for (GridCell& cell : grid.cells) {
    cell.mean /= cell.settings;
    if (cell.settings > 1) cell.interval = {};
  }
  return grid;
}

std::vector<std::string> widest_pair(std::span<const ParameterPoint* const> points) {
  std::vector<std::string> widest;
  double most = 0;
  if (points.empty()) return widest;
  const auto& parameters = points.front()->parameters;
  for (std::size_t a = 0; a < parameters.size(); ++a) {
    for (std::size_t b = a + 1; b < parameters.size(); ++b) {
      const std::vector<std::string> pair = {parameters[a].first, parameters[b].first};
      const ParameterGrid grid = parameter_grid(points, pair);
      const double told = told_by(grid.cells);
      if (told <= most || !has_two_values_of_each(grid.cells, pair.size())) continue;
      most = told;
      widest = pair;
    }
  }
  return widest;
}

}  // namespace kvreplay
