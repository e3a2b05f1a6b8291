// Live runs by several processes that MPI's launcher starts; only in a build with MPI.
#ifdef KVREPLAY_MPIEXEC
#include <fmt/format.h>
#include <gmock/gmock.h>

#include "cli/command.h"
#include "support/tiny_model.h"

namespace kvreplay {
namespace {

using testing::HasSubstr;

class LiveWithMpi : public test::Commands {};

TEST_F(LiveWithMpi, AnyNumberOfProcessesGivesTheSameBytes) {
  test::TinyModel({}).write(folder_ / "tiny");
  std::string traces;
  for (const int length : {40, 61, 50}) {
    std::string ids;
    for (int i = 0; i < length; ++i) ids += fmt::format("{} ", (i * i * 7 + i * length + 5) % 97);
    test::write_file(folder_ / "ids", ids);
    const std::string trace = fmt::format("{}.h5", length);
    succeed(test::words("capture --model tiny --tokens ids --generate 6 -o " + trace));
    traces += " " + trace;
  }
  const std::string line = "live --model tiny --trace" + traces + " -p recent,knorm -c 16,32 --generate 3 --threads 1 ";
  succeed(test::words(line + "-o whole.h5 --kept whole-kept.h5"));
  for (const int processes : {2, 4}) {
    SCOPED_TRACE(processes);
    const test::Outcome outcome = run({.arguments = test::words(line + "-o live.h5 --kept kept.h5"),
                                       .launcher = {KVREPLAY_MPIEXEC, "--allow-run-as-root", "--oversubscribe",
                                                    "--bind-to", "none", "-n", std::to_string(processes)}});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_EQ(test::read_file(folder_ / "live.h5"), test::read_file(folder_ / "whole.h5"));
    EXPECT_EQ(test::read_file(folder_ / "kept.h5"), test::read_file(folder_ / "whole-kept.h5"));
    EXPECT_FALSE(std::filesystem::exists(folder_ / "live.h5.units"));
    const std::size_t first = outcome.output.find("wrote live.h5");
    ASSERT_NE(first, std::string::npos);
    EXPECT_EQ(outcome.output.find("wrote live.h5", first + 1), std::string::npos) << "one process speaks";
  }
}

}  // namespace
}  // namespace kvreplay
#endif
