// A line on the terminal that tells how far the work is.
#pragma once

#include <string>

namespace kvreplay::cli {

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

 private:
  bool terminal_;
  double started_;
  double shown_ = 0;
};

}  // namespace kvreplay::cli
