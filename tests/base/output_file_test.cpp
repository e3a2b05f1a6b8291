#include "base/output_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/printable.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

using test::TemporaryFolder;
using std::string_literals::operator""s;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST(OutputFile, WritesTextAsAWhole) {
  const TemporaryFolder folder;
  OutputFile::write_text(folder / "result.csv", "a,b\n1,2\n");
  EXPECT_EQ(content(folder / "result.csv"), "a,b\n1,2\n");
  EXPECT_THAT(folder.names(), ElementsAre("result.csv"));
}

TEST(TextOutput, WritesPieceByPieceAndPutsTheWholeInItsPlace) {
  const TemporaryFolder folder;
  OutputFile::write_text(folder / "result.csv", "first");
  {
    TextOutput output(folder / "result.csv");
    output.add("half of the second");
    EXPECT_EQ(content(folder / "result.csv"), "first");
  }
  EXPECT_EQ(content(folder / "result.csv"), "first") << "abandoned";
  TextOutput output(folder / "result.csv");
  output.add("a,b\n");
  output.add("1,2\n");
  output.finish();
  EXPECT_EQ(content(folder / "result.csv"), "a,b\n1,2\n");
  EXPECT_THAT(folder.names(), ElementsAre("result.csv"));
}

// As long as names can be, and ones of the same beginning.
TEST(OutputFile, TakesNamesOfAnyLengthThatFilesHave) {
  const TemporaryFolder folder;
  for (const std::size_t length : {244, 245, 253, 255}) {
    std::string name(length, 'n');
    OutputFile::write_text(folder / name, "text");
    EXPECT_EQ(content(folder / name), "text") << length;
    OutputFile one(folder / name);
    name.back() = 'm';
    const OutputFile other(folder / name);
    EXPECT_EQ(one.temporary().parent_path(), folder.path());
    EXPECT_NE(one.temporary().filename().string().find(".tmp-"), std::string::npos);
    OutputFolder report(folder / (name + "-"s).substr(1));
    report.commit();
    EXPECT_TRUE(std::filesystem::is_directory(folder / (name + "-"s).substr(1))) << length;
  }
  EXPECT_THAT([&] { OutputFile output(folder / std::string(256, 'n')); },
              testing::ThrowsMessage<Error>(HasSubstr("File name too long")));
  std::string accents;
  while (accents.size() < 250) accents += "é";
  EXPECT_EQ(find_invalid_utf8(with_suffix(accents, ".units").filename().string()), std::nullopt);
  EXPECT_NE(with_suffix(std::string(253, 'a') + "b", ".units"), with_suffix(std::string(253, 'a') + "c", ".units"));
  EXPECT_EQ(with_suffix("folder/short.h5", ".units"), "folder/short.h5.units");
}

TEST(OutputFile, ReplacesWhatStoodThere) {
  const TemporaryFolder folder;
  OutputFile::write_text(folder / "result.csv", "a long first version");
  OutputFile::write_text(folder / "result.csv", "second");
  EXPECT_EQ(content(folder / "result.csv"), "second");
}

TEST(OutputFile, AbandonedLeavesThePlaceAsItWas) {
  const TemporaryFolder folder;
  OutputFile::write_text(folder / "result.csv", "first");
  {
    const OutputFile output(folder / "result.csv");
    std::ofstream(output.temporary()) << "half of the sec";
  }
  EXPECT_EQ(content(folder / "result.csv"), "first");
  EXPECT_THAT(folder.names(), ElementsAre("result.csv"));
}

TEST(OutputFile, NothingStandsInThePlaceBeforeItIsWhole) {
  const TemporaryFolder folder;
  OutputFile output(folder / "result.csv");
  std::ofstream(output.temporary()) << "text";
  EXPECT_FALSE(std::filesystem::exists(folder / "result.csv"));
  output.commit();
  EXPECT_EQ(content(folder / "result.csv"), "text");
}

TEST(OutputFile, SeveralWritersOfOnePlaceDoNotMeet) {
  const TemporaryFolder folder;
  OutputFile one(folder / "result.csv");
  OutputFile other(folder / "result.csv");
  EXPECT_NE(one.temporary(), other.temporary());
}

TEST(OutputFile, IsAsReadableAsAnyOtherFile) {
  const TemporaryFolder folder;
  const mode_t before = ::umask(022);
  OutputFile::write_text(folder / "result.csv", "text");
  ::umask(before);
  struct stat status {};
  ASSERT_EQ(::stat((folder / "result.csv").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0644U);
}

TEST(OutputFile, SaysWhyItCannotBeWritten) {
  const TemporaryFolder folder;
  const auto message = [](const std::filesystem::path& path) -> std::string {
    try {
      const OutputFile output(path);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message(folder / "missing/result.csv"), HasSubstr("result.csv: cannot be written: No such file"));
  EXPECT_THAT(message(folder.path()), HasSubstr("is a folder; name a file to write"));
}

TEST(OutputFile, AFullDiskLeavesNothing) {
  const TemporaryFolder folder;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 1000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(OutputFile::write_text(folder / "result.csv", std::string(5000, 'x')), Error);
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(folder.names().empty());
}

TEST(OutputFolder, IsFilledAsideAndPutInItsPlace) {
  const TemporaryFolder folder;
  OutputFolder output(folder / "report");
  OutputFile::write_text(output.add_folder("tables") / "result.csv", "text");
  EXPECT_FALSE(std::filesystem::exists(folder / "report"));
  output.commit();
  EXPECT_EQ(content(folder / "report/tables/result.csv"), "text");
  EXPECT_THAT(folder.names(), ElementsAre("report"));
}

// What a process leaves behind in `folder` that writes without end and is interrupted amidst it.
template <typename Write>
std::vector<std::string> left_by_interrupted(const TemporaryFolder& folder, const Write& write) {
  const pid_t process = ::fork();
  if (process == 0) {
    std::thread([&]() {
      try {
        write();
      } catch (const Error&) {  // it cannot write what is abandoned, and waits for the end before it can say so
      }
    }).detach();
    while (std::filesystem::is_empty(folder.path())) {
    }
    const auto held = OutputFile::abandon_all();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // for whoever does not wait for the lock
    ::_exit(0);
  }
  int status = -1;
  ::waitpid(process, &status, 0);
  EXPECT_EQ(status, 0);
  return folder.names();
}

constexpr int kInterruptions = 20;

TEST(OutputFolder, InterruptedWhileItIsFilledLeavesNothing) {
  const TemporaryFolder folder;
  for (int i = 0; i < kInterruptions; ++i) {
    ASSERT_THAT(left_by_interrupted(folder,
                                    [&]() {
                                      const OutputFolder output(folder / "report");
                                      for (int n = 0;; ++n) output.add_folder(std::to_string(n));
                                    }),
                IsEmpty());
  }
}

TEST(TextOutput, InterruptedAtItsBeginningLeavesNothing) {
  const TemporaryFolder folder;
  for (int i = 0; i < kInterruptions; ++i) {
    ASSERT_THAT(left_by_interrupted(folder,
                                    [&]() {
                                      for (;;) TextOutput(folder / "result.csv").add("a,b\n");
                                    }),
                IsEmpty());
  }
}

}  // namespace
}  // namespace kvreplay
