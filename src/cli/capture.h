// kvreplay capture: a real model's run into a trace.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay::cli {

/// Adds the `capture` subcommand, which throws Error or UsageError when it is run.
void add_capture_command(CLI::App& app);

}  // namespace kvreplay::cli
