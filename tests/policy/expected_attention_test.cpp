// Expected attention with statistics of its own prompt and of other traces; kvpress' scores are among the golden calls.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "replay/query_statistics.h"
#include "replay/replay.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay::test {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::StartsWith;

class ExpectedAttention : public testing::Test {
 protected:
  std::vector<Residency> kept(const std::string& trace, const std::string& spec) {
    return replay(TraceReader(folder_ / trace), make_request({spec}, {"20"})).at(0).results.at(0).kept.sets;
  }

  std::string message_of(const std::string& trace, const std::string& spec) {
    try {
      kept(trace, spec);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  }

  std::string with_statistics(const std::string& file) const {
    return "expected-attention(statistics=\"" + (folder_ / file).string() + "\")";
  }

  TemporaryFolder folder_;
};

TEST_F(ExpectedAttention, StatisticsOfTheTraceItselfChangeNothing) {
  RandomTrace().write(folder_ / "t.h5");
  const TraceReader trace(folder_ / "t.h5");
  write_query_statistics(folder_ / "own.h5", std::span(&trace, 1), 4);
  EXPECT_EQ(kept("t.h5", with_statistics("own.h5")), kept("t.h5", "expected-attention"));
}

// Traces of version 1 have the base alone.
TEST_F(ExpectedAttention, SaysWhatRotationItTakesWhereTheTraceHasNone) {
  RandomTrace().write(folder_ / "t.h5");
  const auto notes =
      replay(TraceReader(folder_ / "t.h5"), make_request({"expected-attention", "knorm"}, {"20"})).at(0).notes;
  EXPECT_THAT(notes, Contains(StartsWith("expected-attention: the trace does not say how positions turned its queries; "
                                         "the plain rotation of base 10000 is taken")));
}

TEST_F(ExpectedAttention, OtherTracesReplaceTheQueriesOfThisOne) {
  RandomTrace first;
  first.write(folder_ / "a.h5");
  first.seed = 7;
  first.write(folder_ / "b.h5");
  RandomTrace without = first;
  without.captured_prompt_queries = 0;
  without.write(folder_ / "c.h5");
  std::vector<TraceReader> traces;
  traces.emplace_back(folder_ / "a.h5");
  traces.emplace_back(folder_ / "b.h5");
  write_query_statistics(folder_ / "both.h5", traces, 4);
  EXPECT_THAT(message_of("c.h5", "expected-attention"), HasSubstr("needs all 60 queries before the eviction"));
  EXPECT_EQ(message_of("c.h5", with_statistics("both.h5")), "");
  EXPECT_NE(kept("c.h5", with_statistics("both.h5")), kept("b.h5", "expected-attention"));
}

TEST_F(ExpectedAttention, RefusesStatisticsOfAnotherModelAndOtherFiles) {
  RandomTrace().write(folder_ / "t.h5");
  RandomTrace{.num_attention_heads = 2, .num_key_value_heads = 1}.write(folder_ / "other.h5");
  const TraceReader other(folder_ / "other.h5");
  write_query_statistics(folder_ / "other-statistics.h5", std::span(&other, 1), 4);
  EXPECT_THAT(message_of("t.h5", with_statistics("other-statistics.h5")), HasSubstr("is not of"));
  EXPECT_THAT(message_of("t.h5", with_statistics("t.h5")), HasSubstr("is no file of query statistics"));
  std::vector<TraceReader> unlike;
  unlike.emplace_back(folder_ / "t.h5");
  unlike.emplace_back(folder_ / "other.h5");
  EXPECT_THROW(write_query_statistics(folder_ / "x.h5", unlike, 4), Error);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "x.h5"));
}

}  // namespace
}  // namespace kvreplay::test
