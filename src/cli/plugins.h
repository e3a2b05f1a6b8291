// The option with which a command takes plug-ins.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace kvreplay::cli {

/// Adds --plugin FILE, as often as given. Plug-ins are loaded before the command runs, so that its specs find them.
void add_plugin_option(CLI::App& command);

/// The same for a command that loads them itself, because it takes their names from elsewhere as well.
void add_plugin_option(CLI::App& command, std::vector<std::string>& files);

}  // namespace kvreplay::cli
