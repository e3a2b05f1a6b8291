// What a sweep's tests run: traces, grids, and a sweep to be interrupted.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "cli/command.h"
#include "support/random_trace.h"

namespace kvreplay::test {

/// A folder with two traces.
class Sweep : public Commands {
 protected:
  Sweep() {
    RandomTrace{.num_layers = 3, .spans = {{10, 14, "needle"}}}.write(folder_ / "a.h5");
    RandomTrace{.seed = 2}.write(folder_ / "b.h5");
  }

  static constexpr const char* kGrid =
      " a.h5 b.h5 --policy full restkv(alpha={0.3,0.6},window={4,8}) snapkv(window=4) --capacity 20,50% --evict-at "
      "40,60 ";

  std::string bytes(const std::string& name) const { return read_file(folder_ / name); }

  bool there(const std::string& name) const { return std::filesystem::exists(folder_ / name); }

  /// Refused, leaving everything as it was, units included.
  void refuse_words(const std::string& arguments, int exit_code, const std::vector<std::string>& reasons) const {
    refuse(words(arguments), exit_code, reasons);
  }

  TemporaryFolder elsewhere_;
};

/// With a third trace and what a sweep of it writes when nothing interrupts it.
class Interrupted : public Sweep {
 protected:
  Interrupted() {
    RandomTrace{.num_layers = 6, .head_dim = 32, .prompt_length = 300, .num_tokens = 340, .spans = {{3, 30, "x"}}}
        .write(folder_ / "c.h5");
    succeed(words(command_ + "whole.h5"));
    whole_ = bytes("whole.h5");
  }

  /// Runs the sweep until a file like this appears; whether it was killed before it had finished. `result` as in
  /// interrupt().
  bool kill_when(const std::string& file, int signal, const std::string& result = "") {
    last_ =
        interrupt({.arguments = words(command_ + "s.h5"), .interrupt_when = file, .interrupt_with = signal}, result);
    return last_.signal == signal;
  }

  std::string command_ =
      "sweep a.h5 c.h5 --policy restkv(window={8,16,24},alpha={0.2,0.5}) h2o tova cake(window=8) "
      "--capacity 50,100 --evict-at 60 -o ";
  std::string whole_;
  Outcome last_;
};

}  // namespace kvreplay::test
