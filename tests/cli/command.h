// kvreplay as a user runs it: a process with arguments, streams and an exit code.
#pragma once

#include <gtest/gtest.h>

#include <csignal>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "support/temporary_folder.h"

namespace kvreplay::test {

struct Outcome {
  int exit_code = -1;  ///< −1 where a signal ended the process
  int signal = 0;
  std::string output;
  std::string errors;
  std::int64_t peak_memory = 0;  ///< bytes that were resident at most, as the system counts them
};

struct Invocation {
  std::vector<std::string> arguments;
  std::string input = {};                          ///< what stands on standard input
  std::optional<std::uint64_t> largest_file = {};  ///< no file may grow beyond: what a full disk looks like
  bool closed_output = false;                      ///< standard output is closed
  std::string output_file = {};                    ///< standard output goes there instead
  bool unprivileged = false;                       ///< as nobody, where the test runs as root
  std::string interrupt_when = {};  ///< once a file below the folder has a name that contains this, the process gets …
  int interrupt_with = SIGINT;      ///< … this signal
  std::vector<std::string> launcher = {};  ///< a program with arguments that starts kvreplay, such as mpirun
  bool terminal = false;                   ///< standard error is a terminal
};

/// Runs the program in `folder` and waits for it.
Outcome run_in(const std::filesystem::path& folder, const Invocation& invocation);

/// A folder in which commands are run.
class Commands : public testing::Test {
 protected:
  Outcome run(const std::vector<std::string>& arguments) const { return run_in(folder_.path(), {arguments}); }
  Outcome run(const Invocation& invocation) const { return run_in(folder_.path(), invocation); }

  /// Runs what `interrupt_when` interrupts; again, without what it added to the folder, where it was done before the
  /// signal ended it, at most ten times. It was where it exits with 0, and where `result` stands, if one is named.
  Outcome interrupt(const Invocation& invocation, const std::string& result = "") const;

  /// Runs what must succeed.
  Outcome succeed(const std::vector<std::string>& arguments) const;

  /// Runs what must fail with this code, in one line on standard error that says all of `reasons`, with nothing on
  /// standard output, and leaving the folder's files as they were.
  void refuse(const std::vector<std::string>& arguments, int exit_code, const std::vector<std::string>& reasons) const;

  /// The folder's files with their contents.
  std::vector<std::pair<std::string, std::string>> files() const;

  TemporaryFolder folder_;
};

/// Arguments written with spaces between them; none may contain one.
std::vector<std::string> words(const std::string& text);

}  // namespace kvreplay::test
