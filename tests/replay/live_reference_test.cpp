// What docs/measures.md says of the layer error and of the model's own loss, from the kept sets that both were measured
// with: tests/data/reference-needle-live.h5 holds them in the layout of `replay --kept`, each with `kl`, `agree` and
// `nll` of an independent float32 forward pass of the demo model over tests/data/reference-needle.h5.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

#include "hdf5/hdf5.h"
#include "replay/replay.h"
#include "support/places.h"

namespace kvreplay::test {
namespace {

const std::filesystem::path kData = test_data();
constexpr int kAnswer = 5;  // the first queries after the prompt, which lead to the digits that were asked for

TEST(LiveReference, ThePageOfMeasuresShowsWhatTheKeptSetsCost) {
  const std::filesystem::path live = kData / "reference-needle-live.h5";
  const hdf5::File file = hdf5::File::open(live);
  std::vector<std::string> specs;
  const std::size_t count = file.list("/kept").size();
  for (std::size_t i = 0; i < count; ++i) specs.push_back(fmt::format("kept(file={},index={})", live.string(), i));
  const auto replays = replay(TraceReader(kData / "reference-needle.h5"), make_request(specs, {"64"}));
  const std::vector<ReplayResult>& results = replays.at(0).results;
  ASSERT_EQ(results.size(), count);

  std::set<std::string> measured;  // rows of the page's table
  for (std::size_t i = 0; i < count; ++i) {
    const std::string group = fmt::format("/kept/{}", i);
    const Table& errors = results[i].measures[Measure::layer_error];
    const Index queries = errors.shape[1];
    double mean = 0;
    double answer = 0;
    for (Index at = 0; at < errors.shape[0] * queries; ++at) {
      const double error = static_cast<double>(errors.numbers[static_cast<std::size_t>(at)]);
      mean += error / static_cast<double>(errors.shape[0] * queries);
      if (at % queries < kAnswer) answer += error / static_cast<double>(errors.shape[0] * kAnswer);
    }
    const std::vector<float> kl = file.read_floats(group + "/kl");
    ASSERT_EQ(static_cast<Index>(kl.size()), queries);
    const std::vector<std::int32_t> agree = file.read_int32s(group + "/agree");
    measured.insert(fmt::format("| `{}` | {} | {:.3f} | {:.3f} | {} | {:.4f} |", file.read_string(group, "policy"),
                                file.read_int(group, "capacity"), mean, answer,
                                std::accumulate(agree.begin(), agree.begin() + kAnswer, 0),
                                std::accumulate(kl.begin(), kl.end(), 0.0) / static_cast<double>(queries)));
  }

  std::ifstream page(project_folder() / "docs/measures.md");
  ASSERT_TRUE(page);
  int rows = 0;
  for (std::string line; std::getline(page, line);) {
    if (!line.starts_with("| `")) continue;
    ++rows;
    EXPECT_THAT(measured, testing::Contains(line));
  }
  EXPECT_EQ(rows, 9);
}

}  // namespace
}  // namespace kvreplay::test
