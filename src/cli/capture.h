// kvreplay capture: a real model's run into a trace.
#pragma once

#include <CLI/CLI.hpp>

namespace kvreplay::cli {

/// Adds the `capture` subcommand. Its callback runs the capture; it throws UsageError or Error.
void add_capture_command(CLI::App& app);

}  // namespace kvreplay::cli
