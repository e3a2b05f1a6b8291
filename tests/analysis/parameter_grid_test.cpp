// Maps of two parameters, of grids with holes.
#include "analysis/parameter_grid.h"

#include <gmock/gmock.h>

#include <cmath>

namespace kvreplay {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

// A setting of three parameters; its mean is what `mean` says.
ParameterPoint point(double window, double alpha, double beta, double mean) {
  return {.policy = "",
          .method = "restkv",
          .capacity_request = "64",
          .parameters = {{"window", window}, {"alpha", alpha}, {"beta", beta}},
          .mean = mean,
          .interval = {mean - 0.01, mean + 0.01}};
}

std::vector<const ParameterPoint*> pointers(const std::vector<ParameterPoint>& points) {
  std::vector<const ParameterPoint*> all;
  for (const ParameterPoint& each : points) all.push_back(&each);
  return all;
}

const std::vector<std::string> kAxes = {"alpha", "beta"};

TEST(ParameterGrid, ACellIsTheMeanOverTheSameOthersAsItsNeighbours) {
  // Windows of 16 and 64 were tried at one alpha and beta alone, where they did much worse.
  std::vector<ParameterPoint> points = {point(16, 0.3, 2000, 0.9), point(64, 0.3, 2000, 0.8)};
  for (const double alpha : {0.1, 0.3}) {
    for (const double beta : {100.0, 2000.0}) points.push_back(point(32, alpha, beta, alpha));
  }
  const ParameterGrid grid = parameter_grid(pointers(points), kAxes);
  ASSERT_THAT(grid.cells, SizeIs(4));
  for (const GridCell& cell : grid.cells) {
    EXPECT_EQ(cell.mean, cell.at[0]) << "and nothing of windows 16 and 64";
    EXPECT_EQ(cell.settings, 1);
    EXPECT_EQ(cell.interval.low, cell.mean - 0.01);
  }
  EXPECT_THAT(grid.others, ElementsAre("window=32"));
  EXPECT_EQ(grid.left_out, 2u);
}

TEST(ParameterGrid, AFullProductIsAveragedOverAllOthers) {
  std::vector<ParameterPoint> points;
  for (const double window : {16.0, 32.0}) {
    for (const double alpha : {0.1, 0.3}) {
      for (const double beta : {100.0, 2000.0}) points.push_back(point(window, alpha, beta, alpha + window));
    }
  }
  const ParameterGrid grid = parameter_grid(pointers(points), kAxes);
  ASSERT_THAT(grid.cells, SizeIs(4));
  EXPECT_DOUBLE_EQ(grid.cells[0].mean, 0.1 + 24);
  EXPECT_EQ(grid.cells[0].settings, 2);
  EXPECT_TRUE(std::isnan(grid.cells[0].interval.low));
  EXPECT_EQ(grid.left_out, 0u);
}

TEST(ParameterGrid, ThePairIsThatOfTheMostCells) {
  std::vector<ParameterPoint> points;
  for (const double alpha : {0.1, 0.3}) points.push_back(point(16, alpha, 2000, 0.5));
  for (const double alpha : {0.1, 0.3, 0.5}) {
    for (const double beta : {100.0, 2000.0}) points.push_back(point(32, alpha, beta, 0.5));
  }
  EXPECT_THAT(widest_pair(pointers(points)), ElementsAre("alpha", "beta"));
  EXPECT_THAT(widest_pair(pointers({point(16, 0.1, 100, 0.5), point(16, 0.3, 100, 0.5)})), IsEmpty());
}

TEST(ParameterGrid, AFullGridGoesBeforeOneWithGaps) {
  std::vector<ParameterPoint> points;
  for (const double alpha : {0.1, 0.3, 0.5}) {
    for (const double beta : {100.0, 2000.0}) points.push_back(point(32, alpha, beta, 0.5));
  }
  // With these, window and alpha have seven cells of fifteen.
  for (const double window : {8.0, 16.0, 64.0, 128.0}) points.push_back(point(window, 0.3, 2000, 0.5));
  EXPECT_THAT(widest_pair(pointers(points)), ElementsAre("alpha", "beta"));
}

}  // namespace
}  // namespace kvreplay
