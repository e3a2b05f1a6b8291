#include "cli/interruption.h"

#include <unistd.h>

#include <csignal>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base/output_file.h"

namespace kvreplay::cli {
namespace {

std::mutex& message_lock() {
  static std::mutex lock;
  return lock;
}
std::string& message() {
  static std::string text = "nothing is left half-written";
  return text;
}

}  // namespace

void say_when_interrupted(std::string text) {
  const std::lock_guard guard(message_lock());
  message() = std::move(text);
}

void clean_up_when_interrupted() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction action {};
    if (::sigaction(number, nullptr, &action) == 0 && action.sa_handler != SIG_IGN) sigaddset(&signals, number);
  }
  // A handler may do next to nothing; a thread that waits may remove files. All threads inherit the mask, so that none
  // but that one is interrupted.
  if (::pthread_sigmask(SIG_BLOCK, &signals, nullptr) != 0) return;
  std::thread([signals]() {
    int number = 0;
    if (::sigwait(&signals, &number) != 0) return;
    const auto held = OutputFile::abandon_all();
    {
      const std::lock_guard guard(message_lock());
      const std::string text = message().empty() ? "" : "\nkvreplay: interrupted; " + message() + "\n";
      [[maybe_unused]] const auto told = ::write(STDERR_FILENO, text.data(), text.size());
    }
    std::signal(number, SIG_DFL);
    ::pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
    ::raise(number);
  }).detach();
}

}  // namespace kvreplay::cli
