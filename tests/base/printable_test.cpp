#include "base/printable.h"

#include <gtest/gtest.h>

namespace kvreplay {
namespace {

TEST(Printable, LeavesTextInAnyScriptAlone) {
  for (const char* text : {"", "plain ASCII ~", "naïve", "漢字かな", "▁needle", "🙂"})
    EXPECT_EQ(printable(text), text);
}

TEST(Printable, WritesControlCharactersOut) {
  EXPECT_EQ(printable("a\nb\tc"), "a\\nb\\tc");
  EXPECT_EQ(printable("\x1b[31mred"), "\\x1b[31mred");
  EXPECT_EQ(printable(std::string_view("\0\x7f", 2)), "\\x00\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"), "\\xc2\\x9b");  // one control character in two bytes
}

TEST(Printable, WritesBytesOutThatAreNotUtf8) {
  EXPECT_EQ(printable("a\xff"), "a\\xff");
  EXPECT_EQ(printable("\xc3"), "\\xc3");                    // ends early
  EXPECT_EQ(printable("\xe2\x96z"), "\\xe2\\x96z");         // interrupted
  EXPECT_EQ(printable("\xc0\xaf"), "\\xc0\\xaf");           // overlong
  EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // a surrogate
  EXPECT_EQ(printable("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");
}

}  // namespace
}  // namespace kvreplay
