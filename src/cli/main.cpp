// kvreplay: capture a real LLM run once; replay any KV-cache eviction policy offline.
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interruption.h"
#include "cli/options.h"
#include "policy/parameter.h"
#include "sweep/ranks.h"

namespace {

using kvreplay::suggestion;

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

// Whether another process of a sweep says what is wrong, and ends with the exit code: all of them fail together, and
// MPI's launcher ends the others as soon as it sees one fail, even that which still has to speak.
bool told_elsewhere = false;

int report(std::string message, int exit_code) {
  if (told_elsewhere) return 0;
  std::ranges::replace(message, '\n', ' ');
  // Not with fmt, which throws where standard error cannot be written to.
  std::fprintf(stderr, "kvreplay: %s\n", message.c_str());
  return exit_code;
}

// A standard stream that was closed would be the number that the next opened file gets, and messages would go into it.
// The wrong direction makes standard output fail, as it should; messages have nowhere to go.
void occupy_standard_streams() {
  for (const auto& [number, mode] : {std::pair{0, O_WRONLY}, {1, O_RDONLY}, {2, O_WRONLY}}) {
    if (::fcntl(number, F_GETFD) < 0 && errno == EBADF) static_cast<void>(::open("/dev/null", mode));
  }
}

// CLI11 names leftovers in no helpful order; the first one that looks like an option is what was mistyped.
std::string unexpected(const CLI::App& command) {
  const std::vector<std::string> leftovers = command.remaining(true);
  const auto option = std::ranges::find_if(leftovers, [](const std::string& text) { return text.starts_with('-'); });
  if (option == leftovers.end()) return fmt::format("unexpected '{}'", leftovers.empty() ? "" : leftovers.front());
  std::vector<std::string> known;
  for (const CLI::Option* each : command.get_options()) {
    for (const std::string& name : each->get_lnames()) known.push_back("--" + name);
  }
  return fmt::format("unknown option {}.{}", *option, suggestion(*option, known));
}

std::string without_command(const CLI::App& app) {
  std::vector<std::string> known;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App* each) { return !each->get_group().empty(); })) {
    known.push_back(command->get_name());
  }
  const std::vector<std::string> leftovers = app.remaining();
  if (leftovers.empty()) return fmt::format("name a command: {}", fmt::join(known, ", "));
  if (leftovers.front().starts_with('-')) return unexpected(app);
  return fmt::format("unknown command '{}'.{} Commands: {}", leftovers.front(), suggestion(leftovers.front(), known),
                     fmt::join(known, ", "));
}

int run(int argc, char** argv) {
  CLI::App app("Capture a real LLM run once; replay any KV-cache eviction policy offline.", "kvreplay");
  app.require_subcommand(1);
  app.set_version_flag("--version", "kvreplay " KVREPLAY_VERSION);
  app.footer("Exit codes: 0 fine, 1 failed, 2 wrong usage. 'kvreplay COMMAND --help' explains a command.");
  kvreplay::cli::add_capture_command(app);
  kvreplay::cli::add_synth_command(app);
  kvreplay::cli::add_inspect_command(app);
  kvreplay::cli::add_replay_command(app);
  kvreplay::cli::add_live_command(app);
  kvreplay::cli::add_sweep_command(app);
  kvreplay::cli::add_analyze_command(app);
  kvreplay::cli::add_report_command(app);
  kvreplay::cli::add_policies_command(app);
  kvreplay::cli::add_variants_command(app);
  kvreplay::cli::add_query_statistics_command(app);
  kvreplay::cli::add_bench_command(app);
  kvreplay::cli::add_completion_commands(app);
  kvreplay::cli::add_manual_command(app);
  try {
    std::vector<std::string> arguments =
        kvreplay::cli::one_value_each(app, std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
    std::ranges::reverse(arguments);  // as CLI11 takes them
    app.parse(std::move(arguments));
    return 0;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    const std::vector<CLI::App*> chosen = app.get_subcommands();
    const std::string command = chosen.empty() ? "" : " " + chosen.front()->get_name();
    std::string message = error.what();
    if (chosen.empty()) {
      message = without_command(app);
    } else if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
      message = unexpected(*chosen.front());
    }
    const bool suggests = message.ends_with('?');
    if (message.ends_with('.')) message.pop_back();
    return report(fmt::format("{}{} 'kvreplay{} --help'", message, suggests ? " See" : "; see", command), kWrongUsage);
  }
}

int run_and_report(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const kvreplay::UsageError& error) {
    return report(error.what(), kWrongUsage);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kFailed);
  } catch (const std::exception& error) {
    if (std::ferror(stdout) != 0) return kFailed;  // told at the end
    return report(error.what(), kFailed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  occupy_standard_streams();
  // So that a limit on the size of files is an error that is told, like a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
  kvreplay::cli::clean_up_when_interrupted();
  const kvreplay::LaunchedRank launched = kvreplay::launched_rank();
  if (launched.size > 1 && argc > 1 && std::string_view(argv[1]) == "sweep") {
    told_elsewhere = launched.rank > 0;
    kvreplay::cli::say_when_interrupted("");
  }
  const int exit_code = run_and_report(argc, argv);
  errno = 0;
  std::cout.flush();
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout) return exit_code;
  const int reason = errno;
  return report(fmt::format("standard output cannot be written{}{}", reason == 0 ? "" : ": ",
                            reason == 0 ? "" : std::strerror(reason)),
                kFailed);
}
