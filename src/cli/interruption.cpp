#include "cli/interruption.h"

#include <unistd.h>

#include <csignal>
#include <string_view>
#include <thread>

#include "base/output_file.h"

namespace kvreplay::cli {

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
    constexpr std::string_view kMessage = "\nkvreplay: interrupted; nothing is left half-written\n";
    [[maybe_unused]] const auto told = ::write(STDERR_FILENO, kMessage.data(), kMessage.size());
    std::signal(number, SIG_DFL);
    ::pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
    ::raise(number);
  }).detach();
}

}  // namespace kvreplay::cli
