// Texts and tables for a terminal.
#include "notebooks-export/tables/tables.h"

#include <gtest/gtest.h>

namespace kvreplay {
namespace {

TEST(WrappedTest, LinesEndAtSpaces) {
  EXPECT_EQ(wrapped("one two three", 2, 9), "  one two\n  three\n");
  EXPECT_EQ(wrapped("one", 0, 2), "one\n") << "a word that is too long stays whole";
}

TEST(WrappedTest, NumbersStayWithTheirUnits) {
  EXPECT_EQ(wrapped("or -3.7 %, better", 0, 8), "or\n-3.7 %,\nbetter\n");
  EXPECT_EQ(wrapped("better, p = 0.003, corrected", 0, 10), "better,\np = 0.003,\ncorrected\n");
  EXPECT_EQ(wrapped("so p < 0.001.", 0, 8), "so\np < 0.001.\n");
}

TEST(RangeText, IsOfTheFirstAndTheLast) {
  EXPECT_EQ(range_text({}), "");
  EXPECT_EQ(range_text({512}), "512");
  EXPECT_EQ(range_text({1852, 512, 1024}), "512 to 1852");
}

}  // namespace
}  // namespace kvreplay
