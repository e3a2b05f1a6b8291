// kvreplay: capture a real LLM run once; replay any KV-cache eviction policy offline.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "base/error.h"
#include "cli/capture.h"
#include "cli/commands.h"
#include "cli/inspect.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

int report(std::string message, int exit_code) {
  std::ranges::replace(message, '\n', ' ');
  fmt::print(stderr, "kvreplay: {}\n", message);
  return exit_code;
}

int run(int argc, char** argv) {
  CLI::App app("Capture a real LLM run once; replay any KV-cache eviction policy offline.", "kvreplay");
  app.require_subcommand(1);
  app.set_version_flag("--version", "kvreplay " KVREPLAY_VERSION);
  app.footer("Exit codes: 0 fine, 1 failed, 2 wrong usage. 'kvreplay COMMAND --help' explains a command.");
  kvreplay::cli::add_capture_command(app);
  kvreplay::cli::add_inspect_command(app);
  kvreplay::cli::add_replay_command(app);
  kvreplay::cli::add_policies_command(app);
  kvreplay::cli::add_variants_command(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    std::string command;
    for (const CLI::App* chosen : app.get_subcommands()) command = " " + chosen->get_name();
    return report(fmt::format("{}; see 'kvreplay{} --help'", error.what(), command), kWrongUsage);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const kvreplay::UsageError& error) {
    return report(error.what(), kWrongUsage);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kFailed);
  } catch (const std::exception& error) {
    return report(error.what(), kFailed);
  }
}
