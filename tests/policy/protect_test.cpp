// What +protect keeps, of policies with scores and of patterns.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "policy/policy.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsSupersetOf;

class Protect : public testing::Test {
 protected:
  Protect() {
    RandomTrace{.num_layers = 3}.write(folder_ / "t.h5");
    trace_ = std::make_unique<TraceReader>(folder_ / "t.h5");
  }

  const std::vector<Residency>& kept(const std::string& spec, const std::string& capacity) {
    replays_ = replay(*trace_, make_request({spec}, {capacity}));
    return replays_.at(0).results.at(0).kept.sets;
  }

  std::string message_of(const std::string& spec, const std::string& capacity) {
    try {
      kept(spec, capacity);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  }

  TemporaryFolder folder_;
  std::unique_ptr<TraceReader> trace_;
  std::vector<TraceReplay> replays_;
};

TEST_F(Protect, IsInsideTheCapacityWhateverTheScores) {
  for (const std::string policy : {"random", "snapkv(window=4)", "h2o(window=2)", "restkv(window=4)", "knorm", "tova",
                                   "random+adakv", "snapkv(window=4)+pyramid", "snapkv(window=4)+chunks(size=3)",
                                   "streamingllm(sinks=1)", "recent", "lacache(sinks=1)"}) {
    for (const Residency& residency : kept(policy + "+protect(first=3,last=5)", "24")) {
      const std::span<const int> set = residency.kept();
      EXPECT_THAT(set, IsSupersetOf({0, 1, 2, 55, 56, 57, 58, 59})) << policy;
      if (policy.find('+') == std::string::npos && policy.find("lacache") == std::string::npos) {
        EXPECT_EQ(set.size(), 24u) << policy;
      }
    }
  }
}

TEST_F(Protect, TakesWhatIsLeftFromThePatternItself) {
  for (const Residency& set : kept("recent+protect(first=2)", "6")) {
    EXPECT_THAT(set.kept(), ElementsAre(0, 1, 56, 57, 58, 59));
  }
  for (const Residency& set : kept("streamingllm(sinks=4)+protect(first=2,last=1)", "7")) {
    EXPECT_THAT(set.kept(), ElementsAre(0, 1, 2, 3, 57, 58, 59));
  }
}

TEST_F(Protect, ChoosesAsBeforeAmongTheRest) {
  // What the window protects anyway changes nothing.
  const auto plain = kept("snapkv(window=8)", "20");
  EXPECT_EQ(kept("snapkv(window=8)+protect(first=0,last=8)", "20"), plain);
  EXPECT_EQ(kept("snapkv(window=8)+protect(first=0,last=3)", "20"), plain);
  EXPECT_NE(kept("snapkv(window=8)+protect(first=8)", "20"), plain);
}

TEST_F(Protect, IsRefusedWhereItCannotBe) {
  EXPECT_THAT(message_of("random+protect(first=20,last=5)", "24"), HasSubstr("below the 25 positions"));
  EXPECT_THAT(message_of("random+protect(first=0)", "24"), HasSubstr("protects nothing"));
  EXPECT_THAT(message_of("random+protect+protect", "24"), HasSubstr("second protection"));
  EXPECT_THAT(message_of("full+protect", "24"), HasSubstr("does not go by a capacity"));
  EXPECT_THAT(message_of("protect", "24"), HasSubstr("write it after"));
  EXPECT_EQ(make_policy("random+protect(last=2,first=4)").canonical, "random+protect(last=2)");
}

}  // namespace
}  // namespace kvreplay::test
