// kvreplay inspect: what is in a trace, and whether it can be trusted.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay::cli {

void add_inspect_command(CLI::App& app);

}  // namespace kvreplay::cli
