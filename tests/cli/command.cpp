#include "cli/command.h"
#include "support/places.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <poll.h>
#include <pty.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <sstream>
#include <stdexcept>

namespace kvreplay::test {
namespace {

// Between fork and exec: only calls that are safe there, and no return.
[[noreturn]] void become_program(const std::filesystem::path& folder, const Invocation& invocation, int input,
                                 int output, int errors, const std::vector<char*>& argv) {
  ::dup2(input, 0);
  ::dup2(output, 1);
  ::dup2(errors, 2);
  if (invocation.closed_output) ::close(1);
  bool ready = ::chdir(folder.c_str()) == 0;
  if (invocation.largest_file) {
    const rlimit limit{*invocation.largest_file, *invocation.largest_file};
    ready = ready && ::setrlimit(RLIMIT_FSIZE, &limit) == 0;
  }
  constexpr unsigned kNobody = 65534;
  if (invocation.unprivileged && ::getuid() == 0) {
    ready = ready && ::setgid(kNobody) == 0 && ::setuid(kNobody) == 0;
  }
  if (ready) ::execv(argv[0], argv.data());
  ::_exit(127);
}

bool holds_file_like(const std::filesystem::path& folder, const std::string& part) {
  std::error_code gone;  // files and folders vanish while one looks
  for (std::filesystem::recursive_directory_iterator entry(folder, gone), end; !gone && entry != end;
       entry.increment(gone)) {
    if (entry->path().filename().string().find(part) != std::string::npos) return true;
  }
  return false;
}

}  // namespace

Outcome run_in(const std::filesystem::path& folder, const Invocation& invocation) {
  const TemporaryFolder aside;
  write_file(aside / "input", invocation.input);
  std::vector<std::string> arguments = invocation.arguments;
  arguments.insert(arguments.begin(), kvreplay_executable());
  arguments.insert(arguments.begin(), invocation.launcher.begin(), invocation.launcher.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);

  std::array<int, 2> output{};
  std::array<int, 2> errors{};
  if (::pipe2(output.data(), O_CLOEXEC) != 0 ||
      (invocation.terminal ? ::openpty(&errors[0], &errors[1], nullptr, nullptr, nullptr)
                           : ::pipe2(errors.data(), O_CLOEXEC)) != 0) {
    throw std::runtime_error("no pipe");
  }
  const int input = ::open((aside / "input").c_str(), O_RDONLY | O_CLOEXEC);
  const int place = invocation.output_file.empty()
                        ? output[1]
                        : ::open((folder / invocation.output_file).c_str(), O_WRONLY | O_CLOEXEC);
  const pid_t process = ::fork();
  if (process == 0) become_program(folder, invocation, input, place, errors[1], argv);
  if (place != output[1]) ::close(place);
  ::close(output[1]);
  ::close(errors[1]);
  ::close(input);

  Outcome outcome;
  bool interrupted = invocation.interrupt_when.empty();
  std::array<pollfd, 2> streams = {pollfd{output[0], POLLIN, 0}, pollfd{errors[0], POLLIN, 0}};
  while (streams[0].fd >= 0 || streams[1].fd >= 0) {
    ::poll(streams.data(), streams.size(), interrupted ? -1 : 1);
    if (!interrupted && holds_file_like(folder, invocation.interrupt_when)) {
      ::kill(process, invocation.interrupt_with);
      interrupted = true;
    }
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if (streams[i].fd < 0 || streams[i].revents == 0) continue;
      std::array<char, 4096> buffer{};
      const ssize_t count = ::read(streams[i].fd, buffer.data(), buffer.size());
      if (count > 0) {
        (i == 0 ? outcome.output : outcome.errors).append(buffer.data(), static_cast<std::size_t>(count));
      } else {
        ::close(streams[i].fd);
        streams[i].fd = -1;
      }
    }
  }
  int status = 0;
  rusage usage{};
  ::wait4(process, &status, 0, &usage);
  outcome.peak_memory = std::int64_t{usage.ru_maxrss} * 1024;
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  return outcome;
}

Outcome Commands::interrupt(const Invocation& invocation, const std::string& result) const {
  constexpr int kMostAttempts = 10;
  const std::vector<std::string> before = folder_.names();
  for (int attempt = 1;; ++attempt) {
    Outcome outcome = run(invocation);
    const bool done = outcome.exit_code == 0 || (!result.empty() && std::filesystem::exists(folder_ / result));
    if (!done || attempt == kMostAttempts) return outcome;
    for (const std::string& name : folder_.names()) {
      if (std::ranges::find(before, name) == before.end()) std::filesystem::remove_all(folder_ / name);
    }
  }
}

Outcome Commands::succeed(const std::vector<std::string>& arguments) const {
  const Outcome outcome = run(arguments);
  EXPECT_EQ(outcome.exit_code, 0) << fmt::format("{}", fmt::join(arguments, " ")) << '\n' << outcome.errors;
  return outcome;
}

void Commands::refuse(const std::vector<std::string>& arguments, int exit_code,
                      const std::vector<std::string>& reasons) const {
  SCOPED_TRACE(fmt::format("kvreplay {}", fmt::join(arguments, " ")));
  const auto before = files();
  const Outcome outcome = run(arguments);
  EXPECT_EQ(outcome.exit_code, exit_code);
  EXPECT_EQ(outcome.output, "");
  EXPECT_THAT(outcome.errors, testing::StartsWith("kvreplay: "));
  EXPECT_EQ(outcome.errors.find('\n'), outcome.errors.size() - 1) << "not one line: " << outcome.errors;
  for (const std::string& reason : reasons) EXPECT_THAT(outcome.errors, testing::HasSubstr(reason));
  EXPECT_EQ(files(), before);
}

std::vector<std::pair<std::string, std::string>> Commands::files() const {
  std::vector<std::pair<std::string, std::string>> found;
  for (const std::string& name : folder_.names()) {
    const bool regular = std::filesystem::is_regular_file(std::filesystem::symlink_status(folder_ / name));
    found.emplace_back(name, regular ? read_file(folder_ / name) : "");
  }
  return found;
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), std::istream_iterator<std::string>()};
}

}  // namespace kvreplay::test
