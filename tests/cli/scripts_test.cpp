// Scripts that users run: the demo, whose commands can be pasted, and what installs what is missing.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include <cstdlib>
#include <filesystem>

#include "support/places.h"
#include "support/temporary_folder.h"

namespace kvreplay {
namespace {

// Writes down its arguments, paths in full.
constexpr const char* kProgram = R"(#!/bin/bash
for word in "$@"; do
  case $word in */*) word=$(realpath -m "$word") ;; esac
  printf '<%s>' "$word"
done >>"$LOG"
echo >>"$LOG"
)";

TEST(DemoScript, ShowsCommandsThatCanBePasted) {
  const std::filesystem::path scripts = test::project_folder() / "scripts";
  const test::TemporaryFolder folder;
  const std::filesystem::path project = folder / "the project";
  for (const char* name : {"scripts", "build", "traces/prompts"}) std::filesystem::create_directories(project / name);
  std::filesystem::create_directory(folder / "elsewhere");
  std::filesystem::copy_file(scripts / "demo.sh", project / "scripts/demo.sh");
  test::write_file(project / "build/kvreplay", kProgram);
  std::filesystem::permissions(project / "build/kvreplay", std::filesystem::perms::owner_all);
  test::write_file(project / "traces/prompts/one prompt.txt", "");
  const auto shell = [](const std::string& command) {
    return std::system(fmt::format("bash -c \"{}\"", command).c_str());
  };
  for (const std::filesystem::path& from : {project, project / "build", folder / "elsewhere", folder.path()}) {
    SCOPED_TRACE(from.string());
    for (const char* log : {"done", "pasted"}) test::write_file(folder / log, "");
    ASSERT_EQ(shell(fmt::format("cd '{}' && LOG='{}' bash '{}' build/kvreplay \\\"\\$PWD\\\" >'{}' 2>'{}'",
                                from.string(), (folder / "done").string(), (project / "scripts/demo.sh").string(),
                                (folder / "said").string(), (folder / "shown").string())),
              0)
        << test::read_file(folder / "shown");
    EXPECT_EQ(shell(fmt::format("cd '{}' && sed -n 's/^[$] //p' '{}' >'{}' && LOG='{}' bash -e '{}'", from.string(),
                                (folder / "shown").string(), (folder / "commands").string(),
                                (folder / "pasted").string(), (folder / "commands").string())),
              0);
    const std::string done = test::read_file(folder / "done");
    EXPECT_THAT(done, testing::HasSubstr("<restkv(temporal={mean,last,reversed-ema})>"));
    EXPECT_EQ(test::read_file(folder / "pasted"), done);
    // What to try next can be pasted as well.
    EXPECT_EQ(shell(fmt::format("cd '{}' && grep '^  ' '{}' >'{}' && LOG='{}' bash -e '{}'", from.string(),
                                (folder / "said").string(), (folder / "commands").string(),
                                (folder / "pasted").string(), (folder / "commands").string())),
              0)
        << test::read_file(folder / "said");
  }
}

// On a machine without any of the packages, whose apt-get only says what it was asked for.
TEST(InstallDependencies, AsksForNoMoreThanTheTaskTakes) {
  const std::filesystem::path scripts = test::project_folder() / "scripts";
  const test::TemporaryFolder folder;
  std::filesystem::create_directory(folder / "bin");
  test::write_file(folder / "bin/dpkg-query", "#!/bin/sh\n");
  test::write_file(folder / "bin/apt-get", "#!/bin/sh\necho apt-get \"$@\"\n");
  for (const char* name : {"dpkg-query", "apt-get"}) {
    std::filesystem::permissions(folder / "bin" / name, std::filesystem::perms::owner_all);
  }
  for (const char* name :
       {"bash", "sh", "sed", "grep", "sort", "comm", "cat", "id", "tr", "dirname", "mktemp", "env", "dpkg", "rm"}) {
    for (const char* place : {"/usr/bin", "/bin"}) {
      const std::filesystem::path program = std::filesystem::path(place) / name;
      const std::filesystem::path link = folder / "bin" / name;
      if (std::filesystem::exists(program) && !std::filesystem::exists(link))
        std::filesystem::create_symlink(program, link);
    }
  }
  // The packages that are asked for, or, without rights, that an administrator is to be asked for.
  const auto asked = [&](const std::string& option) {
    const std::string out = (folder / "out").string();
    static_cast<void>(std::system(fmt::format("PATH='{}' bash '{}' {} >'{}' 2>&1", (folder / "bin").string(),
                                              (scripts / "install-dependencies.sh").string(), option, out)
                                      .c_str()));
    const std::string said = test::read_file(out);
    const std::string words = "install --no-install-recommends ";
    const std::size_t at = said.rfind(words);
    if (at == std::string::npos) return said;
    return said.substr(at + words.size(), said.find('\n', at) - at - words.size());
  };
  using testing::HasSubstr;
  using testing::Not;
  EXPECT_EQ(asked("--format"), "clang-format");
  EXPECT_THAT(asked("--tidy"),
              testing::AllOf(HasSubstr("clang "), HasSubstr("python3-venv"), HasSubstr("cmake"),
                             Not(HasSubstr("chromium")), Not(HasSubstr("libclang-rt-dev")), Not(HasSubstr("openmpi"))));
  EXPECT_THAT(asked("--fuzz"), testing::AllOf(HasSubstr("libclang-rt-dev"), HasSubstr("cmake"),
                                              Not(HasSubstr("python")), Not(HasSubstr("openmpi"))));
  EXPECT_THAT(asked("--ci"), testing::AllOf(HasSubstr("clang-format"), HasSubstr("libclang-rt-dev"), HasSubstr("fish"),
                                            HasSubstr("openmpi-bin"), HasSubstr("python3-h5py")));
  EXPECT_THAT(asked(""), testing::AllOf(HasSubstr("cmake"), Not(HasSubstr("clang")), Not(HasSubstr("python"))));
}

}  // namespace
}  // namespace kvreplay
