// A line on the terminal that tells how far the work is.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace kvreplay::cli {

/// A duration for a person: "40 s", "12 min", "3.5 h".
std::string duration_text(double seconds);

/// Rewrites one line on standard error while work goes on, at most ten times a second. Silent where standard error is
/// not a terminal. Wipes the line when it is destroyed.
class Progress {
 public:
  Progress();
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Shows `text` and the share of the work done, in [0, 1], with the time left.
  void show(const std::string& text, double share);

  /// What to show, where the work does not tell by itself.
  struct State {
    std::string text;
    double share = 0;
  };

  /// Asks `state` several times a second from a thread of its own and shows what it says, until this is destroyed.
  /// show() must not be called any more.
  void follow(std::function<State()> state);

 private:
  bool terminal_;
  double started_;
  double shown_ = 0;
  std::mutex lock_;
  std::condition_variable end_;
  bool ended_ = false;
  std::thread follower_;
};

}  // namespace kvreplay::cli
