#include "cli/plugins.h"

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "policy/plugin_interface.h"

namespace kvreplay::cli {
namespace {

constexpr const char* kDescription = "Shared library that adds policies; see docs/adding-a-policy.md";

}  // namespace

void add_plugin_option(CLI::App& command) {
  const auto load = [](const std::vector<std::string>& files) {
    for (const std::string& file : files) load_plugin(file);
  };
  // One file per --plugin, or it would take the arguments that follow as well.
  command.add_option_function<std::vector<std::string>>("--plugin", load, kDescription)
      ->allow_extra_args(false)
      ->type_name("FILE");
}

void add_plugin_option(CLI::App& command, std::vector<std::string>& files) {
  command.add_option("--plugin", files, kDescription)->allow_extra_args(false)->type_name("FILE");
}

}  // namespace kvreplay::cli
