// What rankings remember of a head that is filled token by token.
#include <gtest/gtest.h>

#include <numeric>
#include <utility>
#include <vector>

#include "policy/matrix_head.h"

namespace kvreplay {
namespace {

using test::normal;

class Memory : public testing::Test {
 protected:
  static constexpr int kTokens = 30;

  Memory() : whole_(normal(kTokens, 4, 1), normal(kTokens, 4, 2), 2) {
    whole_.member_queries = {normal(kTokens, 4, 3), normal(kTokens, 4, 4)};
  }

  // What the query at `position` pays to the rows of `source`, none of which is behind it: [group, R].
  static Matrix attention_of(const HeadSource& source, int position, int rows) {
    const Head head(source);
    Matrix attention(2, rows);
    for (int member = 0; member < 2; ++member) {
      const std::span<const float> all = head.attention(member, kTokens - 1 - position);
      for (int n = 0; n < rows; ++n) attention(member, n) = all[static_cast<std::size_t>(n)];
    }
    return attention;
  }

  test::MatrixHead whole_;
};

// Rows of a head that is remembered.
class Remembered : public EvictedHead {
 public:
  Remembered(const HeadSource& whole, std::vector<int> rows, const RankingMemory& memory)
      : EvictedHead(whole, std::move(rows)), memory_(memory) {}

  const RankingMemory* memory() const override { return &memory_; }

 private:
  const RankingMemory& memory_;
};

TEST_F(Memory, OfAnUnevictedHeadIsWhatTheHeadTells) {
  for (const std::string spec : {"h2o(window=3)", "h2o(window=3,normalize=true)"}) {
    const Policy policy = make_policy(spec);
    const auto memory = policy.ranking()->memory(whole_.shape());
    ASSERT_NE(memory, nullptr);
    for (int position = 0; position < kTokens; ++position) {
      const Matrix attention = attention_of(whole_, position, position + 1);
      memory->observe({.position = position, .attention = &attention});
    }
    std::vector<int> all(kTokens);
    std::iota(all.begin(), all.end(), 0);
    const Remembered source(whole_, all, *memory);
    const Head remembered(source);
    const Head told(whole_);
    std::vector<float> a(kTokens);
    std::vector<float> b(kTokens);
    for (int member = 0; member < 2; ++member) {
      policy.ranking()->score(remembered, member, a);
      policy.ranking()->score(told, member, b);
      for (std::size_t n = 0; n < a.size(); ++n) EXPECT_NEAR(a[n], b[n], 1e-5f) << spec << " " << n;
    }
  }
}

TEST_F(Memory, GoesWithTheRowsThatStay) {
  const Policy policy = make_policy("h2o(window=2)");
  const auto memory = policy.ranking()->memory(whole_.shape());
  std::vector<int> rows;            // positions in the cache
  std::vector<double> expected[2];  // what they received
  for (int position = 0; position < kTokens; ++position) {
    rows.push_back(position);
    const EvictedHead live(whole_, rows);
    const Matrix attention = attention_of(live, position, static_cast<int>(rows.size()));
    memory->observe({.position = position, .attention = &attention});
    for (int member = 0; member < 2; ++member) {
      expected[member].resize(rows.size(), 0.0);
      for (std::size_t n = 0; n < rows.size(); ++n) {
        expected[member][n] += static_cast<double>(attention(member, static_cast<Index>(n)));
      }
    }
    if (position % 7 != 6) continue;
    // Every third row goes.
    std::vector<int> kept;
    std::vector<int> left;
    std::vector<double> sums[2];
    for (int n = 0; n < static_cast<int>(rows.size()); ++n) {
      if (n % 3 == 1) continue;
      kept.push_back(n);
      left.push_back(rows[static_cast<std::size_t>(n)]);
      for (int member = 0; member < 2; ++member) sums[member].push_back(expected[member][static_cast<std::size_t>(n)]);
    }
    memory->keep(kept);
    rows = left;
    for (int member = 0; member < 2; ++member) expected[member] = sums[member];
  }
  const Remembered live(whole_, rows, *memory);
  const Head head(live);
  std::vector<float> scores(rows.size());
  for (int member = 0; member < 2; ++member) {
    policy.ranking()->score(head, member, scores);
    for (std::size_t n = 0; n < rows.size(); ++n) EXPECT_NEAR(scores[n], expected[member][n], 1e-5) << n;
  }
}

TEST_F(Memory, MostRankingsHaveNone) {
  for (const std::string spec : {"snapkv", "restkv", "tova", "knorm"}) {
    EXPECT_EQ(make_policy(spec).ranking()->memory(whole_.shape()), nullptr) << spec;
  }
}

}  // namespace
}  // namespace kvreplay
