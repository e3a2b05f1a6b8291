// Sweeps by several processes that MPI's launcher starts; only in a build with MPI.
#ifdef KVREPLAY_MPIEXEC
#include <gmock/gmock.h>

#include <csignal>
#include <limits>

#include "cli/sweep_commands.h"
#include "support/sample_trace.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using testing::AllOf;
using testing::HasSubstr;

class SweepWithMpi : public test::Interrupted {
 protected:
  static std::vector<std::string> launcher(int processes) {
    return {KVREPLAY_MPIEXEC,         "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n",
            std::to_string(processes)};
  }
};

TEST_F(SweepWithMpi, AnyNumberOfProcessesGivesTheSameBytes) {
  for (const int processes : {1, 2, 3}) {
    SCOPED_TRACE(processes);
    const test::Outcome outcome =
        run({.arguments = test::words(command_ + "s.h5 --threads 1"), .launcher = launcher(processes)});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_TRUE(bytes("s.h5") == whole_);
    EXPECT_FALSE(there("s.h5.units"));
    const std::size_t first = outcome.output.find("wrote s.h5");
    ASSERT_NE(first, std::string::npos);
    EXPECT_EQ(outcome.output.find("wrote s.h5", first + 1), std::string::npos) << "one process speaks";
  }
}

TEST_F(SweepWithMpi, FailsTogetherInOneLine) {
  const auto failed = [&](const std::string& arguments, const std::string& line) {
    const test::Outcome outcome = run({.arguments = test::words(arguments), .launcher = launcher(3)});
    EXPECT_NE(outcome.exit_code, 0);
    EXPECT_EQ(outcome.output, "");
    const std::size_t first = outcome.errors.find("kvreplay: " + line);
    ASSERT_NE(first, std::string::npos) << outcome.errors;
    EXPECT_EQ(outcome.errors.find("kvreplay: ", first + 1), std::string::npos) << outcome.errors;
  };
  failed("sweep a.h5 --policy full --capacity 20", "--output is required");
  failed("sweep a.h5 --polcy full", "unknown option --polcy");
  failed("sweep nowhere.h5 --policy full --capacity 20 -o s.h5", "nowhere.h5: cannot be opened");
}

TEST_F(SweepWithMpi, WhatOneProcessFindsDamagedEndsAllOfThem) {
  RandomTrace{.num_layers = 6}.write(folder_ / "bad.h5");
  test::edit(folder_ / "bad.h5", [](auto file) {
    test::poke(file, "/layers/5/values", {1, 37, 3}, std::numeric_limits<float>::quiet_NaN());
  });
  const test::Outcome outcome =
      run({.arguments = test::words("sweep bad.h5 --policy recent --capacity 20 -o s.h5"), .launcher = launcher(3)});
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, AllOf(HasSubstr("kvreplay: bad.h5: /layers/5/values: NaN"), HasSubstr("--resume")));
  EXPECT_FALSE(there("s.h5"));
}

TEST_F(SweepWithMpi, KilledItGoesOnWithAnyNumberOfProcesses) {
  const test::Outcome outcome = interrupt({.arguments = test::words(command_ + "s.h5 --threads 1"),
                                           .interrupt_when = "unit-1-1.h5",
                                           .interrupt_with = SIGTERM,
                                           .launcher = launcher(2)},
                                          "s.h5");
  EXPECT_NE(outcome.exit_code, 0);
  succeed(test::words(command_ + "s.h5 --resume"));
  EXPECT_TRUE(bytes("s.h5") == whole_);
}

}  // namespace
}  // namespace kvreplay
#endif
