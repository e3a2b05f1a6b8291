#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

namespace kvreplay::cli {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Progress::Progress() : terminal_(::isatty(STDERR_FILENO) == 1), started_(now()) {}

Progress::~Progress() {
  if (terminal_ && shown_ > 0) fmt::print(stderr, "\r\033[K");
}

void Progress::show(const std::string& text, double share) {
  const double time = now();
  if (!terminal_ || time - shown_ < 0.1) return;
  shown_ = time;
  const double left = share > 0 ? (time - started_) * (1 - share) / share : 0;
  fmt::print(stderr, "\r\033[K{}  {:3.0f} %  {:.0f} s left", text, 100 * share, left);
  std::fflush(stderr);
}

}  // namespace kvreplay::cli
