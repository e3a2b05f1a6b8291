// The manual page, from the same descriptions as --help.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>

#include "cli/commands.h"

namespace kvreplay::cli {
namespace {

// Text as troff takes it for itself: what it would understand as commands is none, and a hyphen can be copied as one.
std::string escaped(std::string_view text) {
  std::string safe;
  bool begins_line = true;
  for (const char c : text) {
    if (begins_line && (c == '.' || c == '\'')) safe += "\\&";
    begins_line = c == '\n';
    if (c == '\\') {
      safe += "\\e";
    } else if (c == '-') {
      safe += "\\-";
    } else {
      safe += c;
    }
  }
  return safe;
}

// A request's argument.
std::string request_argument(std::string_view text) {
  std::string safe;
  for (const char c : escaped(text)) safe += c == '"' ? std::string("\\(dq") : std::string(1, c);
  return fmt::format("\"{}\"", safe);
}

std::string without_final_newlines(std::string text) {
  while (text.ends_with('\n')) text.pop_back();
  return text;
}

std::string options_of(const CLI::App& command) {
  std::string page;
  for (const CLI::Option* option : command.get_options()) {
    const std::string name = option->get_positional() ? option->get_name(true) : option->get_name(false, true);
    const std::string type = option->get_items_expected_max() == 0 ? "" : option->get_type_name();
    page +=
        fmt::format(".TP\n.BI {} {}\n{}{}\n", request_argument(name), request_argument(type.empty() ? "" : " " + type),
                    escaped(option->get_description()), option->get_required() ? " (required)" : "");
  }
  return page;
}

std::string synopsis_of(const CLI::App& command) {
  std::string text = command.get_name() + " [OPTIONS]";
  for (const CLI::Option* option : command.get_options([](const CLI::Option* o) { return o->get_positional(); })) {
    const std::string name =
        fmt::format("{}{}", option->get_name(true), option->get_items_expected_max() > 1 ? "..." : "");
    text += option->get_required() ? " " + name : fmt::format(" [{}]", name);
  }
  return text;
}

std::string manual_of(const CLI::App& program) {
  std::string page = fmt::format(
      ".\\\" Printed by `kvreplay manual`.\n.TH KVREPLAY 1 \"\" \"kvreplay {}\" \"User Commands\"\n.SH NAME\nkvreplay "
      "\\- {}\n"
      ".SH SYNOPSIS\n.B kvreplay\n.I COMMAND\n[OPTIONS]\n.SH COMMANDS\n",
      KVREPLAY_VERSION, escaped(program.get_description()));
  for (const CLI::App* command : program.get_subcommands([](const CLI::App* c) { return !c->get_group().empty(); })) {
    page += fmt::format(".SS {}\n{}.\n{}", request_argument("kvreplay " + synopsis_of(*command)),
                        escaped(command->get_description()), options_of(*command));
    const std::string footer = without_final_newlines(command->get_footer());
    // The program's own is everybody's.
    if (!footer.empty() && footer != without_final_newlines(program.get_footer()))
      page += fmt::format(".PP\n{}\n", escaped(footer));
  }
  page += ".SH OPTIONS\n" + options_of(program);
  page +=
      ".SH EXIT STATUS\n"
      ".TP\n.B 0\nIt was done. What a reader of the numbers has to know stands on standard error, as notes.\n"
      ".TP\n.B 1\nIt failed: a file that is damaged, missing or lacks what is asked for, a full disk, too little "
      "memory. One "
      "line on\nstandard error says what, where and what to do; no output is left half\\-written.\n"
      ".TP\n.B 2\nThe command line or a configuration file asks for what cannot be; nothing was begun.\n"
      ".PP\nA signal ends kvreplay as it ends other programs, which shells show as 128 and its number (130 after "
      "Ctrl\\-C).\n"
      ".SH ENVIRONMENT\n"
      ".TP\n.B OMP_NUM_THREADS\nHow many threads there are where\n.B \\-\\-threads\nis not given.\n";
  return page;
}

}  // namespace

void add_manual_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("manual", "Print this program's manual page, as man reads it");
  command->callback([&app]() { fmt::print("{}", manual_of(app)); });
}

}  // namespace kvreplay::cli
