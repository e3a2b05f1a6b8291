#include "cli/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <utility>

namespace kvreplay::cli {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Progress::Progress() : terminal_(::isatty(STDERR_FILENO) == 1), started_(now()) {}

Progress::~Progress() {
  {
    const std::lock_guard guard(lock_);
    ended_ = true;
  }
  end_.notify_all();
  if (follower_.joinable()) follower_.join();
  if (terminal_ && shown_ > 0) fmt::print(stderr, "\r\033[K");
}

void Progress::show(const std::string& text, double share) {
  const double time = now();
  if (!terminal_ || time - shown_ < 0.1) return;
  shown_ = time;
  const double left = share > 0 ? (time - started_) * (1 - share) / share : 0;
  fmt::print(stderr, "\r\033[K{}  {:3.0f} %  {}", text, 100 * share,
             share > 0 ? duration_text(left) + " left" : std::string());
  std::fflush(stderr);
}

void Progress::follow(std::function<State()> state) {
  if (!terminal_) return;
  follower_ = std::thread([this, state = std::move(state)]() {
    constexpr std::chrono::milliseconds kInterval(250);
    std::unique_lock guard(lock_);
    do {
      const State present = state();
      show(present.text, present.share);
    } while (!end_.wait_for(guard, kInterval, [this]() { return ended_; }));
  });
}

std::string duration_text(double seconds) {
  if (seconds < 100) return fmt::format("{:.0f} s", seconds);
  if (seconds < 100 * 60) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

}  // namespace kvreplay::cli
