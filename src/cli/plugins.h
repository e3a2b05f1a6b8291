// The option with which a command takes plug-ins.
#pragma once

namespace CLI {
class App;
}

namespace kvreplay::cli {

/// Adds --plugin FILE, as often as given. Plug-ins are loaded before the command runs, so that its specs find them.
void add_plugin_option(CLI::App& command);

}  // namespace kvreplay::cli
