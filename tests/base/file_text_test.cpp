// Reading small files as a whole.
#include "base/file_text.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

TEST(FileText, AllBytesAreRead) {
  const test::TemporaryFolder folder;
  std::string content(100'000, 'x');
  content[7] = '\0';
  content[99'999] = '\n';
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{1} << 14, content.size()}) {
    test::write_file(folder / "file", content.substr(0, size));
    EXPECT_TRUE(file_text(folder / "file") == content.substr(0, size)) << size;
  }
}

TEST(FileText, WhatCannotBeReadIsNamed) {
  const test::TemporaryFolder folder;
  EXPECT_EQ(test::message_of<Error>([&]() { file_text(folder / "none"); }),
            (folder / "none").string() + ": cannot be read");
  EXPECT_EQ(test::message_of<Error>([&]() { file_text(folder.path()); }),
            folder.path().string() + ": is a folder, not a file");
}

}  // namespace
}  // namespace kvreplay
