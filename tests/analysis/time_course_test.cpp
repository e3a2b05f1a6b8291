// What is said over time, against means that are taken step by step.
#include "analysis/time_course.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "replay/replay.h"
#include "replay/results_file.h"
#include "support/random_trace.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::RandomTrace;
using testing::AllOf;
using testing::Field;
using testing::IsEmpty;
using testing::SizeIs;

TEST(StepBinsTest, HoldEveryStepOnce) {
  const StepBins each = StepBins::of(5, 8);
  EXPECT_EQ(each.count(), 5);
  EXPECT_EQ(each.first_step(4), 5);
  EXPECT_EQ(each.last_step(4), 5);
  const StepBins wide = StepBins::of(11, 4);
  EXPECT_EQ(wide.count(), 4);
  EXPECT_EQ(wide.first_step(3), 10);
  EXPECT_EQ(wide.last_step(3), 11);
  for (int step = 1; step <= 11; ++step) {
    const int bin = wide.bin_of(step);
    EXPECT_LE(wide.first_step(bin), step);
    EXPECT_GE(wide.last_step(bin), step);
  }
}

class TimeCourseTest : public testing::Test {
 protected:
  TimeCourseTest() {
    for (const char* name : {"a.h5", "b.h5"}) {
      RandomTrace{.num_layers = 3,
                  .prompt_length = 40,
                  .num_tokens = 63,
                  .spans = {{4, 9, "first"}, {20, 30, "second"}},
                  .seed = name[0] == 'a' ? 1u : 2u}
          .write(folder_ / name);
      readers_.emplace_back(folder_ / name);
    }
    replays_ = replay(readers_, make_request({"knorm+every(4)", "recent", "full"}, {"16"}));
    write_results(folder_ / "results.h5", replays_, {});
    write_kept_sets(folder_ / "kept.h5", replays_);
  }

  ResultSet results() const { return ResultSet::open(std::vector<std::filesystem::path>{folder_ / "results.h5"}); }
  static constexpr int kSteps = 23;

  test::TemporaryFolder folder_;
  std::vector<TraceReader> readers_;
  std::vector<TraceReplay> replays_;
};

TEST_F(TimeCourseTest, AreMeansOfStepsThatStandTogether) {
  const std::vector<Measure> measures = {Measure::layer_error, Measure::cache_size};
  const std::vector<TimeCourse> courses = time_courses(results(), measures, 6);
  ASSERT_THAT(courses, SizeIs(3)) << "layer errors of both, and the size of the cache that changes";
  EXPECT_EQ(courses[0].policy, "knorm+every(interval=4)");
  EXPECT_EQ(courses[1].policy, "recent");
  EXPECT_EQ(courses[2].measure, Measure::cache_size);
  for (const TimeCourse& course : courses) {
    ASSERT_THAT(course.points, SizeIs(6));
    EXPECT_EQ(course.points[5].first_step, 21);
    EXPECT_EQ(course.points[5].last_step, kSteps);
    for (const TimeCourse::Point& point : course.points) {
      double mean = 0;
      double smallest = 1e9;
      double largest = 0;
      for (const TraceReplay& replayed : replays_) {
        for (const ReplayResult& result : replayed.results) {
          if (result.policy != course.policy) continue;
          const std::vector<float>& numbers = result.measures[course.measure].numbers;
          const std::size_t of_layer = numbers.size() / 3;
          for (std::size_t layer = 0; layer < 3; ++layer) {
            double sum = 0;
            double count = 0;
            for (std::size_t i = 0; i < of_layer; ++i) {
              const int step = static_cast<int>(i % kSteps) + 1;
              if (step < point.first_step || step > point.last_step) continue;
              sum += static_cast<double>(numbers[layer * of_layer + i]);
              ++count;
            }
            mean += sum / count / 6;
            smallest = std::min(smallest, sum / count);
            largest = std::max(largest, sum / count);
          }
        }
      }
      EXPECT_NEAR(point.mean, mean, 1e-6 * std::max(1.0, mean));
      EXPECT_LE(point.low, point.mean + 1e-9);
      EXPECT_GE(point.high, point.mean - 1e-9);
      EXPECT_GE(point.low, smallest - 1e-9);
      EXPECT_LE(point.high, largest + 1e-9);
    }
  }
}

TEST_F(TimeCourseTest, ThereAreNoneWithoutASchedule) {
  write_results(folder_ / "once.h5", replay(readers_, make_request({"recent"}, {"16"})), {});
  const ResultSet once = ResultSet::open(std::vector<std::filesystem::path>{folder_ / "once.h5"});
  const std::vector<Measure> measures = {Measure::layer_error};
  EXPECT_THAT(time_courses(once, measures, 8), IsEmpty());
  EXPECT_THAT(span_survivals(once, 8), IsEmpty());
}

TEST_F(TimeCourseTest, SpansSurviveAsFarAsTheyAreCached) {
  const std::vector<SpanSurvival> survivals = span_survivals(results(), 100);
  ASSERT_THAT(survivals, SizeIs(5)) << "of all spans, then two of each trace";
  EXPECT_TRUE(survivals[0].trace.empty());
  const TraceReplay& second_trace = replays_[1];
  const SpanSurvival& survival = survivals[4];
  EXPECT_EQ(survival.label, "second");
  EXPECT_EQ(survival.start, 20);
  ASSERT_THAT(survival.points, SizeIs(kSteps));
  const KeptSets& kept = second_trace.results[0].kept;
  for (int step = 1; step <= kSteps; ++step) {
    double share = 0;
    for (const Residency& set : kept.sets) {
      for (const int position : set.cached_at(39 + step, 40)) share += position >= 20 && position < 30 ? 0.1 : 0;
    }
    EXPECT_NEAR(survival.points[static_cast<std::size_t>(step) - 1].share,
                share / static_cast<double>(kept.sets.size()), 1e-6);
    double mean = 0;
    for (std::size_t i = 1; i < 5; ++i) mean += survivals[i].points[static_cast<std::size_t>(step) - 1].share / 4;
    EXPECT_NEAR(survivals[0].points[static_cast<std::size_t>(step) - 1].share, mean, 1e-9);
  }
}

TEST_F(TimeCourseTest, RastersHoldWhatIsCachedOfWhatHasCome) {
  const ResultSet set = results();
  const RetentionSet kept = RetentionSet::open(std::vector<std::filesystem::path>{folder_ / "kept.h5"}, set);
  const std::vector<ResidencyRaster> rasters = residency_rasters(set, kept, 6, 21);
  ASSERT_THAT(rasters, SizeIs(2));
  const ResidencyRaster& raster = rasters[0];
  EXPECT_EQ(raster.policy, "knorm+every(interval=4)");
  ASSERT_EQ(raster.steps.count(), 6);
  ASSERT_EQ(raster.positions.count(), 21);
  const KeptSets& sets = replays_[0].results[0].kept;
  for (int step_bin = 0; step_bin < 6; ++step_bin) {
    for (int bin = 0; bin < 21; ++bin) {
      double cached = 0;
      double come = 0;
      for (int step = raster.steps.first_step(step_bin); step <= raster.steps.last_step(step_bin); ++step) {
        const int query = 39 + step;
        const auto in_bin = [&](int position) { return position / 3 == bin; };
        for (const Residency& each : sets.sets) {
          const std::vector<int> seen = each.cached_at(query, 40);
          cached += static_cast<double>(std::ranges::count_if(seen, in_bin));
          for (int position = 0; position <= query; ++position) come += in_bin(position) ? 1 : 0;
        }
      }
      if (come == 0) {
        EXPECT_TRUE(std::isnan(raster.at(step_bin, bin)));
      } else {
        EXPECT_NEAR(raster.at(step_bin, bin), cached / come, 1e-6) << step_bin << ", " << bin;
      }
    }
  }
}

}  // namespace
}  // namespace kvreplay
