#include "replay/residency.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>

#include "base/error.h"
#include "replay/definitions.h"
#include "replay/measurement.h"
#include "replay/overlap.h"
#include "replay/replay.h"
#include "replay/results_file.h"
#include "replay/results_reader.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using test::CachedPositions;
using test::RandomTrace;
using test::TemporaryFolder;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr int kNever = Residency::kNever;

TEST(Residency, IsEqualHoweverItWasWrittenDown) {
  const Residency once(std::vector{1, 4, 7});
  EXPECT_TRUE(once.is_one_eviction());
  EXPECT_EQ(Residency({1, 4, 7}, {kNever, kNever, kNever}, 10), once);
  EXPECT_EQ(Residency({1, 4, 7, 12}, {kNever, kNever, kNever, kNever}, 10), once)
      << "what came since and is never evicted is as if it were not listed";
  const Residency twice({1, 4, 7, 12, 13}, {kNever, 11, 20, 15, kNever}, 10);
  EXPECT_NE(twice, once);
  EXPECT_FALSE(twice.is_one_eviction());
  EXPECT_THAT(twice.kept(), ElementsAre(1, 4, 7));
  EXPECT_THAT(twice.positions(), ElementsAre(1, 4, 7, 12));
  EXPECT_THAT(twice.until(), ElementsAre(kNever, 11, 20, 15));
  EXPECT_THAT(once.until(), IsEmpty());
}

TEST(Residency, TellsWhatAQuerySees) {
  const Residency residency({1, 4, 7, 11}, {kNever, 11, 12, 12}, 10);
  EXPECT_THAT(residency.cached_at(10, 10), ElementsAre(1, 4, 7, 10));
  EXPECT_THAT(residency.cached_at(11, 10), ElementsAre(1, 4, 7, 10, 11));
  EXPECT_THAT(residency.cached_at(12, 10), ElementsAre(1, 7, 10, 11, 12));
  EXPECT_THAT(residency.cached_at(13, 10), ElementsAre(1, 10, 12, 13));
  EXPECT_THAT(residency.cached_at(13, 10, 5), ElementsAre(10, 12, 13)) << "its sliding window begins at 5";
  EXPECT_THAT(Residency(std::vector{1, 4}).cached_at(11, 10), ElementsAre(1, 4, 10, 11));
}

TEST(Residency, TellsWhatGoesAndWhen) {
  using Stay = Residency::Stay;
  const Residency residency({1, 4, 7, 11, 12}, {kNever, 12, 11, 12, 20}, 10);
  EXPECT_THAT(residency.evicted_later(10),
              ElementsAre(Stay{7, 10, 11}, Stay{4, 10, 12}, Stay{11, 11, 12}, Stay{12, 12, 20}));
  EXPECT_THAT(residency.seen_between(12, 13, 10),
              ElementsAre(Stay{1, 10, kNever}, Stay{4, 10, 12}, Stay{10, 10, kNever}, Stay{11, 11, 12},
                          Stay{12, 12, 20}, Stay{13, 13, kNever}));
  const std::vector<int> queries = {10, 11, 12, 15};
  EXPECT_THAT(residency.kept_at_each(0, 10, queries), ElementsAre(3, 3, 2, 1));
  EXPECT_THAT(residency.kept_at_each(2, 7, queries), ElementsAre(1, 1, 1, 0));
  const Residency once(std::vector{1, 4});
  EXPECT_THAT(once.evicted_later(10), IsEmpty());
  EXPECT_THAT(once.kept_at_each(0, 3, queries), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(once.seen_between(10, 11, 10),
              ElementsAre(Stay{1, 10, kNever}, Stay{4, 10, kNever}, Stay{10, 10, kNever}, Stay{11, 11, kNever}));
}

TEST(Residency, TellsWhatIsHiddenForAWhile) {
  // 1 is hidden from the query at 12, 4 from the first two after the eviction, 11 from 13 on but for 15; 12 from 14.
  const Residency residency({1, 1, 4, 11, 11, 12, 12}, {11, kNever, kNever, 12, 15, 13, kNever}, 10,
                            {0, 13, 12, 11, 15, 12, 15});
  EXPECT_FALSE(residency.is_one_eviction());
  EXPECT_THAT(residency.kept(), ElementsAre(1, 4));
  EXPECT_THAT(residency.positions(), ElementsAre(1, 4, 11));
  EXPECT_THAT(residency.until(), ElementsAre(kNever, kNever, 15));
  EXPECT_THAT(residency.gaps(), ElementsAre(Residency::Gap{1, 12, 12}, Residency::Gap{4, 10, 11},
                                            Residency::Gap{11, 13, 14}, Residency::Gap{12, 14, 14}));
  const std::vector<std::vector<int>> seen = {
      {1, 10}, {1, 10, 11}, {4, 10, 11, 12}, {1, 4, 10, 12, 13}, {1, 4, 10, 13, 14}, {1, 4, 10, 11, 12, 13, 14, 15}};
  for (int query = 10; query < 16; ++query) {
    const std::vector<int>& expected = seen[static_cast<std::size_t>(query - 10)];
    EXPECT_EQ(residency.cached_at(query, 10), expected) << query;
    EXPECT_EQ(residency.count_at(query, 10), static_cast<int>(expected.size())) << query;
    EXPECT_EQ(residency.count_at(query, 10, 11),
              static_cast<int>(std::ranges::count_if(expected, [](int position) { return position >= 11; })))
        << query;
  }
  EXPECT_DOUBLE_EQ(residency.mean_kept(0, 10, std::vector{10, 11, 12, 13}), (1 + 1 + 1 + 2) / 4.0);
  EXPECT_THAT(residency.kept_at_each(0, 10, std::vector{10, 11, 12, 13}), ElementsAre(1, 1, 1, 2));
  using Stay = Residency::Stay;
  EXPECT_THAT(residency.seen_between(12, 13, 10),
              ElementsAre(Stay{1, 13, kNever}, Stay{4, 12, kNever}, Stay{10, 10, kNever}, Stay{11, 11, 12},
                          Stay{12, 12, 13}, Stay{13, 13, kNever}));
  EXPECT_EQ(Residency({1, 1, 4}, {11, kNever, kNever}, 10, {1, 12, 3}), Residency(std::vector{1, 4}))
      << "spans that touch each other are one";
}

TEST(Residency, WhatCannotBeIsRefused) {
  const auto message = [](const std::vector<int>& positions, const std::vector<int>& until,
                          const std::vector<int>& from = {}) -> std::string {
    try {
      const Residency residency(positions, until, 10, from);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message({1, 2}, {kNever}), HasSubstr("2 positions have 1 last queries"));
  EXPECT_THAT(message({2, 1}, {kNever, kNever}), HasSubstr("do not ascend"));
  EXPECT_THAT(message({1, 1}, {kNever, kNever}), HasSubstr("do not ascend"));
  EXPECT_THAT(message({-1}, {kNever}), HasSubstr("do not ascend"));
  EXPECT_THAT(message({1}, {9}), HasSubstr("position 1 is listed up to the query at 9"));
  EXPECT_THAT(message({12}, {11}), HasSubstr("position 12 is listed up to the query at 11, which is before its own"));
  EXPECT_EQ(message({1, 12}, {10, 12}), "");
  EXPECT_THAT(message({1, 1}, {11, 13}, {0}), HasSubstr("2 positions have 1 first queries"));
  EXPECT_THAT(message({1, 1}, {12, 14}, {0, 12}), HasSubstr("position 1 is listed for the query at 12 twice"));
  EXPECT_THAT(message({1}, {12}, {13}),
              HasSubstr("position 1 is listed up to the query at 12, which is before its first"));
  EXPECT_EQ(message({1, 1}, {11, 13}, {0, 13}), "");
}

// Random residencies beside the plainest form of the same: the last query of every position of the trace.
struct Drawn {
  std::vector<Residency> heads;
  std::vector<std::vector<int>> until;                     // [head][position]; −1: gone with the eviction
  std::vector<std::map<int, std::pair<int, int>>> hidden;  // [head], by position: the queries that do not see it

  // `latest`: what is evicted later is gone before this query. `masked`: some positions are hidden for a while.
  Drawn(const RandomTrace& shape, int heads_drawn, int eviction, int first_held, int latest, unsigned seed,
        bool masked = false) {
    std::mt19937 random(seed);
    const auto chance = [&random](int of) { return static_cast<int>(random() % static_cast<unsigned>(of)); };
    for (int head = 0; head < heads_drawn; ++head) {
      std::vector<int>& of_head = until.emplace_back(static_cast<std::size_t>(shape.num_tokens), kNever);
      std::vector<int> positions;
      std::vector<int> last;
      std::vector<int> from;
      auto& gaps = hidden.emplace_back();
      for (int n = 0; n < shape.num_tokens; ++n) {
        int& each = of_head[static_cast<std::size_t>(n)];
        if (n < eviction && (n < first_held || chance(2) == 0)) {
          each = -1;
          continue;
        }
        const int first = std::max(n, eviction);
        if (chance(2) == 0 && first < latest) each = first + chance(latest - first);
        if (masked && chance(2) == 0 && std::min(each, shape.num_tokens) > first + 2) {
          const int begin = first + chance(std::min(each, shape.num_tokens) - first - 1);
          const int end = begin + chance(std::min(each, shape.num_tokens) - begin - 1);
          gaps[n] = {begin, end};
          if (begin > first) {
            positions.push_back(n);
            last.push_back(begin - 1);
            from.push_back(first);
          }
          positions.push_back(n);
          last.push_back(each);
          from.push_back(end + 1);
          continue;
        }
        positions.push_back(n);
        last.push_back(each);
        from.push_back(n);
      }
      heads.emplace_back(positions, last, eviction, masked ? from : std::vector<int>());
    }
  }

  CachedPositions cached(int group) const {
    return [this, group](int query_head, int position) {
      std::vector<int> seen;
      const std::vector<int>& of_head = until[static_cast<std::size_t>(query_head / group)];
      for (int n = 0; n <= position; ++n) {
        const auto& gaps = hidden[static_cast<std::size_t>(query_head / group)];
        const auto gap = gaps.find(n);
        if (gap != gaps.end() && gap->second.first <= position && position <= gap->second.second) continue;
        if (of_head[static_cast<std::size_t>(n)] >= position) seen.push_back(n);
      }
      return seen;
    };
  }
};

void expect_near(const std::vector<float>& found, const std::vector<double>& expected, const char* what) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    ASSERT_NEAR(found[i], expected[i], 2e-5 * std::max(1.0, expected[i])) << what << " " << i;
  }
}

struct Shape {
  const char* name;
  RandomTrace trace;
  int eviction;
  int evaluate_from;
};

class ResidencyMeasures : public testing::TestWithParam<Shape> {
 protected:
  ResidencyMeasures() {
    GetParam().trace.write(folder_ / "t.h5");
    trace_.emplace(folder_ / "t.h5");
  }

  std::vector<LayerMeasures> measure(const std::vector<const std::vector<Residency>*>& settings,
                                     std::span<const Span> spans = {}) const {
    return measure_layer(*trace_, 0, eviction(), spans, settings, 2, std::vector<bool>(settings.size(), true));
  }
  Eviction eviction() const { return {GetParam().eviction, GetParam().evaluate_from}; }
  int group() const { return trace_->info().model.group_size(); }
  int first_held() const {
    const int window = GetParam().trace.sliding_window;
    return window == 0 ? 0 : std::max(0, GetParam().eviction - window + 1);
  }

  TemporaryFolder folder_;
  std::optional<TraceReader> trace_;
};

TEST_P(ResidencyMeasures, FollowTheDefinitionsAtEveryQuery) {
  const RandomTrace& shape = GetParam().trace;
  const RandomTrace::Tensors tensors = shape.tensors();
  for (const bool per_query_head : {false, true}) {
    for (unsigned seed = 1; seed <= 4; ++seed) {
      SCOPED_TRACE(fmt::format("seed {}, {}", seed, per_query_head ? "per query head" : "per KV head"));
      const Drawn drawn(shape, per_query_head ? shape.num_attention_heads : shape.num_key_value_heads,
                        GetParam().eviction, first_held(), shape.num_tokens, seed, seed > 2);
      const LayerNumbers found = measure({&drawn.heads})[0].numbers;
      const test::DefinedMeasures expected =
          test::by_definition(shape, tensors, 0, eviction().evaluate_from, drawn.cached(per_query_head ? 1 : group()));
      expect_near(found[Measure::head_error], expected.head_error, "head error");
      expect_near(found[Measure::layer_error], expected.layer_error, "layer error");
      expect_near(found[Measure::attention_recall], expected.attention_recall, "attention recall");
      expect_near(found[Measure::cosine], expected.cosine, "cosine");
      const std::vector<Span> spans = {{first_held() + 1, GetParam().eviction - 2, "held"}};
      const LayerNumbers of_spans = measure({&drawn.heads}, spans)[0].numbers;
      const std::span<const int> queries = evaluation_queries(trace_->info(), eviction()).positions;
      for (int head = 0; head < shape.num_attention_heads; ++head) {
        double seen = 0;
        for (const int query : queries) {
          for (const int n : drawn.cached(per_query_head ? 1 : group())(head, query)) {
            seen += n >= spans[0].start && n < spans[0].end ? 1 : 0;
          }
        }
        EXPECT_NEAR(of_spans[Measure::span_recall].at(static_cast<std::size_t>(head)),
                    seen / (spans[0].end - spans[0].start) / static_cast<double>(queries.size()), 1e-6);
      }
    }
  }
}

TEST_P(ResidencyMeasures, OneEvictionIsTheSpecialCaseToTheBit) {
  const RandomTrace& shape = GetParam().trace;
  const Drawn drawn(shape, shape.num_key_value_heads, GetParam().eviction, first_held(), shape.num_tokens, 7);
  const int last = trace_->info().query_positions.back();
  std::vector<Residency> once;
  std::vector<Residency> explicitly;  // what is kept, and all that comes since, up to the last query
  for (const Residency& each : drawn.heads) {
    once.emplace_back(std::vector<int>(each.kept().begin(), each.kept().end()));
    std::vector<int> positions(each.kept().begin(), each.kept().end());
    for (int n = GetParam().eviction; n < shape.num_tokens; ++n) positions.push_back(n);
    explicitly.emplace_back(positions, std::vector<int>(positions.size(), last), GetParam().eviction);
    EXPECT_FALSE(explicitly.back().is_one_eviction());
  }
  const std::vector<Span> spans = {{2, 9, "a"}, {first_held(), GetParam().eviction, "all"}};
  const std::vector<LayerMeasures> found = measure({&once, &explicitly}, spans);
  for (const MeasureTraits& measure : measures()) {
    const auto bits_of = [&](std::size_t setting) {
      std::vector<std::uint32_t> bits;
      for (const float number : found[setting].numbers[measure.measure]) {
        bits.push_back(std::bit_cast<std::uint32_t>(number));
      }
      return bits;
    };
    EXPECT_EQ(bits_of(0), bits_of(1)) << measure.name;
  }
}

TEST_P(ResidencyMeasures, QueriesBeforeALaterEvictionDoNotFeelIt) {
  const RandomTrace& shape = GetParam().trace;
  const Drawn drawn(shape, shape.num_key_value_heads, GetParam().eviction, first_held(), shape.num_tokens, 17);
  const std::span<const int> queries = evaluation_queries(trace_->info(), eviction()).positions;
  const auto count = static_cast<std::ptrdiff_t>(queries.size());
  const std::ptrdiff_t before = count - 4;
  const int until = queries[static_cast<std::size_t>(before - 1)];
  std::vector<Residency> once;
  std::vector<Residency> twice;  // every other position goes, of those since the eviction too
  for (const Residency& each : drawn.heads) {
    std::vector<int> positions(each.kept().begin(), each.kept().end());
    once.emplace_back(positions);
    for (int n = GetParam().eviction; n <= until; ++n) positions.push_back(n);
    std::vector<int> last(positions.size(), kNever);
    for (std::size_t i = 0; i < last.size(); i += 2) last[i] = until;
    twice.emplace_back(positions, last, GetParam().eviction);
  }
  const std::vector<LayerMeasures> found = measure({&once, &twice});
  for (const Measure measure :
       {Measure::layer_error, Measure::head_error, Measure::attention_recall, Measure::cosine}) {
    const std::vector<float>& a = found[0].numbers[measure];
    const std::vector<float>& b = found[1].numbers[measure];
    for (std::ptrdiff_t first = 0; first < std::ssize(a); first += count) {
      EXPECT_TRUE(std::equal(a.begin() + first, a.begin() + first + before, b.begin() + first)) << first;
      EXPECT_FALSE(std::equal(a.begin() + first + before, a.begin() + first + count, b.begin() + first + before));
    }
  }
}

TEST_P(ResidencyMeasures, NothingIsRecalledLessForStayingLonger) {
  const RandomTrace& shape = GetParam().trace;
  const Drawn drawn(shape, shape.num_key_value_heads, GetParam().eviction, first_held(), shape.num_tokens, 11);
  std::vector<Residency> longer;
  for (const Residency& each : drawn.heads) {
    std::vector<int> until(each.until().begin(), each.until().end());
    for (int& last : until) last += last == kNever ? 0 : 2;
    longer.emplace_back(std::vector<int>(each.positions().begin(), each.positions().end()), until, GetParam().eviction);
  }
  const std::vector<Span> spans = {{first_held(), GetParam().eviction, "all"}};
  const std::vector<LayerMeasures> found = measure({&drawn.heads, &longer}, spans);
  for (const Measure measure : {Measure::attention_recall, Measure::span_recall}) {
    const std::vector<float>& shorter_numbers = found[0].numbers[measure];
    const std::vector<float>& longer_numbers = found[1].numbers[measure];
    for (std::size_t i = 0; i < shorter_numbers.size(); ++i) EXPECT_LE(shorter_numbers[i], longer_numbers[i] + 1e-6f);
  }
}

TEST_P(ResidencyMeasures, SpanRecallIsTheMeanOverTheQueries) {
  const RandomTrace& shape = GetParam().trace;
  const Drawn drawn(shape, shape.num_key_value_heads, GetParam().eviction, first_held(), shape.num_tokens, 13);
  const std::vector<Span> spans = {{first_held() + 1, GetParam().eviction - 2, "held"}};
  const LayerNumbers found = measure({&drawn.heads}, spans)[0].numbers;
  const std::span<const int> queries = evaluation_queries(trace_->info(), eviction()).positions;
  for (int head = 0; head < shape.num_attention_heads; ++head) {
    double seen = 0;
    for (const int query : queries) {
      for (const int n : drawn.cached(group())(head, query)) seen += n >= spans[0].start && n < spans[0].end ? 1 : 0;
    }
    const double held = spans[0].end - spans[0].start;
    EXPECT_NEAR(found[Measure::span_recall].at(static_cast<std::size_t>(head)),
                seen / held / static_cast<double>(queries.size()), 1e-6);
  }
}

// Means over the heads that have a number, of each query.
std::vector<double> means(const std::vector<std::vector<double>>& of_heads) {
  std::vector<double> means;
  for (std::size_t q = 0; q < of_heads.front().size(); ++q) {
    double sum = 0;
    double count = 0;
    for (const std::vector<double>& head : of_heads) {
      if (std::isnan(head[q])) continue;
      sum += head[q];
      ++count;
    }
    means.push_back(sum / count);
  }
  return means;
}

void expect_near_or_missing(const std::vector<float>& found, const std::vector<double>& expected, const char* what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (std::size_t i = 0; i < found.size(); ++i) {
    ASSERT_EQ(std::isnan(found[i]), std::isnan(expected[i])) << what << " " << i;
    if (!std::isnan(found[i])) {
      ASSERT_NEAR(found[i], expected[i], 2e-5 * std::max(1.0, expected[i])) << what << " " << i;
    }
  }
}

TEST_P(ResidencyMeasures, OverTimeFollowTheirDefinitionsAtEveryStep) {
  const RandomTrace& shape = GetParam().trace;
  const std::span<const int> queries = evaluation_queries(trace_->info(), eviction()).positions;
  const auto steps = queries.size();
  const auto first_visible = [&](int t) {
    return shape.sliding_window == 0 ? 0 : std::max(0, t - shape.sliding_window + 1);
  };
  for (const bool per_query_head : {false, true}) {
    const int sets = per_query_head ? shape.num_attention_heads : shape.num_key_value_heads;
    const Drawn drawn(shape, sets, GetParam().eviction, first_held(), shape.num_tokens, 19);
    const std::vector<Span> spans = {{first_held() + 1, GetParam().eviction - 2, "held"},
                                     {first_held() + 3, first_held() + 5, "two"}};
    const LayerNumbers found = measure({&drawn.heads}, spans)[0].numbers;

    const int group = per_query_head ? 1 : this->group();
    const test::DefinedMeasures defined =
        test::by_definition(shape, shape.tensors(), 0, eviction().evaluate_from, drawn.cached(group));
    const auto by_head = [&](const std::vector<double>& numbers, double from, double factor) {
      std::vector<std::vector<double>> heads(static_cast<std::size_t>(shape.num_attention_heads));
      for (std::size_t i = 0; i < numbers.size(); ++i) heads[i / steps].push_back(from + factor * numbers[i]);
      return heads;
    };
    expect_near(found[Measure::late_hits], means(by_head(defined.attention_recall, 1, -1)), "late hits");
    expect_near(found[Measure::recurrence], means(by_head(defined.recurrence, 0, 1)), "recurrence");

    // Step by step: what stands there, what goes.
    std::vector<std::vector<double>> turnover;
    std::vector<std::vector<double>> time_to_eviction;
    std::vector<std::vector<double>> survival;
    for (int head = 0; head < shape.num_attention_heads; ++head) {
      const std::vector<int>& until = drawn.until[static_cast<std::size_t>(head / group)];
      const auto stands_at = [&](int n, int t) {
        return n <= t && n >= first_visible(t) && until[static_cast<std::size_t>(n)] >= t;
      };
      std::vector<double>& replaced = turnover.emplace_back(steps, std::nan(""));
      std::vector<double>& stayed = time_to_eviction.emplace_back(steps, std::nan(""));
      std::vector<double>& survives = survival.emplace_back();
      for (const Span& span : spans) {
        for (const int t : queries) {
          double seen = 0;
          for (int n = span.start; n < span.end; ++n) seen += until[static_cast<std::size_t>(n)] >= t ? 1 : 0;
          survives.push_back(seen / (span.end - span.start));
        }
      }
      int before = GetParam().eviction - 1;
      for (int t = GetParam().eviction; t < shape.num_tokens; ++t) {
        double left = 0;
        double gone_of_left = 0;
        double gone = 0;
        double age = 0;
        bool evicts = false;
        for (int n = 0; n < shape.num_tokens; ++n) {
          left += n <= before && stands_at(n, before + 1) ? 1 : 0;
          if (until[static_cast<std::size_t>(n)] != t) continue;
          evicts = true;
          if (!stands_at(n, t)) continue;
          gone += 1;
          gone_of_left += n <= before ? 1 : 0;
          age += t - std::max(n, GetParam().eviction - 1);
        }
        if (!evicts) continue;
        before = t;
        const auto at = std::ranges::find(queries, t);
        if (at == queries.end() || t == queries.back() || gone == 0) continue;
        const auto step = static_cast<std::size_t>(at - queries.begin());
        if (left > 0) replaced[step] = gone_of_left / left;
        stayed[step] = age / gone;
      }
    }
    expect_near_or_missing(found[Measure::turnover], means(turnover), "turnover");
    expect_near_or_missing(found[Measure::time_to_eviction], means(time_to_eviction), "time to eviction");
    expect_near(found[Measure::span_survival], means(survival), "span survival");
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ResidencyMeasures,
    testing::Values(Shape{"grouped", {.num_layers = 1}, 60, 60},                            //
                    Shape{"evaluated_later", {.num_layers = 1, .num_tokens = 90}, 60, 75},  //
                    Shape{"sliding_window", {.num_layers = 1, .num_tokens = 90, .sliding_window = 25}, 60, 60},
                    Shape{"softcapping", {.num_layers = 1, .softcapping = 5}, 40, 40},                         //
                    Shape{"many_queries", {.num_layers = 1, .prompt_length = 30, .num_tokens = 180}, 30, 30},  //
                    Shape{"many_positions", {.num_layers = 1, .prompt_length = 1300, .num_tokens = 1310}, 1290, 1290},
                    Shape{"no_projection", {.num_layers = 1, .output_projection = false}, 60, 60}),
    [](const auto& test) { return test.param.name; });

TEST(Residency, OverlapIsTheMeanOverTheQueries) {
  const std::vector<int> queries = {10, 11, 12, 13};
  const Residency a({1, 2, 3, 11}, {11, kNever, 12, 12}, 10);
  const Residency b({2, 3, 4}, {kNever, kNever, 10}, 10);
  // {1 2 3} and {2 3 4}; {1 2 3 10} and {2 3 10}; {2 3 10 11} and the same; {2 10 12} and {2 3 10 11 12}.
  EXPECT_FLOAT_EQ(overlap(a, b, queries, 10).jaccard, (2.0f / 4 + 3.0f / 4 + 1 + 3.0f / 5) / 4);
  EXPECT_FLOAT_EQ(overlap(a, b, queries, 10).containment, (2.0f / 3 + 1 + 1 + 1) / 4);
  EXPECT_FLOAT_EQ(overlap(b, a, queries, 10).jaccard, overlap(a, b, queries, 10).jaccard);
  EXPECT_EQ(overlap(a, a, queries, 10).jaccard, 1);
  // The same with 2 hidden from 11 and 12: {1 2 3} and {2 3 4}; {1 2 3 10} and {3 10}; {2 3 10 11} and {3 10 11}; {2 10
  // 12} and {2 3 10 11 12}.
  const Residency masked({2, 2, 3, 4}, {10, kNever, kNever, 10}, 10, {0, 13, 0, 0});
  EXPECT_FLOAT_EQ(overlap(a, masked, queries, 10).jaccard, (2.0f / 4 + 2.0f / 4 + 3.0f / 4 + 3.0f / 5) / 4);
  EXPECT_FLOAT_EQ(overlap(masked, a, queries, 10).jaccard, overlap(a, masked, queries, 10).jaccard);
  const Residency once(std::vector{1, 2, 3});
  EXPECT_EQ(overlap(once, Residency(std::vector{2, 3, 4}), queries, 10).jaccard, 0.5f) << "at every query the same";
}

TEST(Residency, IsStoredWithTheKeptSets) {
  const TemporaryFolder folder;
  RandomTrace{}.write(folder / "t.h5");
  const TraceReader trace(folder / "t.h5");
  TraceReplay replay = kvreplay::replay(trace, make_request({"recent", "snapkv(window=4)"}, {"20"})).at(0);
  KeptSets& recent = replay.results[0].kept;
  recent.sets[1] = Residency({3, 50, 62}, {64, kNever, 66}, 60);
  write_kept_sets(folder / "kept.h5", {replay});
  const KeptSetsReader reader(folder / "kept.h5");
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(reader.read(i, 2).sets, replay.results[i].kept.sets) << i;
  }
  const hdf5::File file = hdf5::File::open(folder / "kept.h5");
  EXPECT_EQ(file.read_int("/", "format_version"), 4) << "so that an older kvreplay does not take it for one eviction";
  EXPECT_TRUE(file.exists("/kept/0/until"));
  EXPECT_FALSE(file.exists("/kept/1/until")) << "where there was one eviction";
  // Rows that are hidden and come back, once at the eviction itself.
  TraceReplay with_gaps = replay;
  std::vector<Residency>& sets = with_gaps.results[0].kept.sets;
  sets[0] = Residency({3, 50, 50, 62, 62}, {kNever, 62, kNever, 63, 66}, 60, {61, 0, 65, 0, 65});
  sets[2] = Residency({40, 61, 61}, {kNever, 61, kNever}, 60, {0, 61, 64});
  write_kept_sets(folder / "masked.h5", {with_gaps});
  EXPECT_EQ(KeptSetsReader(folder / "masked.h5").read(0, 2).sets, sets);
  const hdf5::File masked = hdf5::File::open(folder / "masked.h5");
  EXPECT_EQ(masked.read_int("/", "format_version"), 5) << "so that it is not taken for one that knows no gaps";
  EXPECT_TRUE(masked.exists("/kept/0/from"));
  EXPECT_FALSE(file.exists("/kept/0/from")) << "where nothing was hidden";
  // Which no pattern can tell.
  const std::string spec = fmt::format("kept(file={})", (folder / "kept.h5").string());
  try {
    make_policy(spec);
    FAIL() << "a kept set has no history";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("/kept/0: was evicted more than once"));
  }
  replay.results[0].kept.sets[1] = std::vector{3, 50};
  write_kept_sets(folder / "once.h5", {replay});
  EXPECT_EQ(hdf5::File::open(folder / "once.h5").read_int("/", "format_version"), 3);
}

}  // namespace
}  // namespace kvreplay
