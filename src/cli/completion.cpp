#include "cli/completion.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <string_view>

#include "cli/commands.h"
#include "cli/options.h"
#include "policy/policy.h"

namespace kvreplay::cli {
namespace {

const CLI::App* command_named(const CLI::App& program, const std::string& name) {
  const auto found = program.get_subcommands([&name](const CLI::App* each) { return each->get_name() == name; });
  return found.empty() ? nullptr : found.front();
}

bool has_name(const CLI::Option& option, const std::string& name) {
  const auto is = [&name](std::string_view dashes) {
    return [&name, dashes](const std::string& each) { return name == fmt::format("{}{}", dashes, each); };
  };
  return std::ranges::any_of(option.get_lnames(), is("--")) || std::ranges::any_of(option.get_snames(), is("-"));
}

const CLI::Option* option_named(const CLI::App& command, const std::string& name) {
  const auto found = command.get_options([&name](const CLI::Option* each) { return has_name(*each, name); });
  return found.empty() ? nullptr : found.front();
}

// "a|b|c" of an option's column of types are its values; what is put there for others is in capitals, or stands for
// something.
std::vector<std::string> alternatives(const std::string& type) {
  const bool are_values = std::ranges::all_of(
      type, [](unsigned char c) { return std::islower(c) != 0 || std::isdigit(c) != 0 || c == '-' || c == '|'; });
  if (!are_values || type.find('|') == std::string::npos) return {};
  return CLI::detail::split(type, '|');
}

// Policies, and after one the steps that may follow it. What stands between parentheses is left to who types.
std::vector<Candidate> specs(const std::string& begun) {
  std::size_t spec = 0;  // where the last of several begins
  std::size_t step = 0;
  int depth = 0;
  for (std::size_t at = 0; at < begun.size(); ++at) {
    if (begun[at] == '(') ++depth;
    if (begun[at] == ')') --depth;
    if (begun[at] == '+' && depth == 0) step = at + 1;
    if (begun[at] == ',' && depth == 0) spec = step = at + 1;
  }
  std::vector<Candidate> found;
  if (depth > 0) return found;
  for (const Method* method : registered_methods()) {
    if ((method->step == Method::Step::policy) != (step == spec)) continue;
    found.push_back({begun.substr(0, step) + method->name, method->summary});
  }
  return found;
}

std::vector<Candidate> methods_with_variants() {
  std::vector<Candidate> found;
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) continue;
    const Candidate candidate{method->variant_of, find_method(method->variant_of)->summary};
    if (std::ranges::find(found, candidate) == found.end()) found.push_back(candidate);
  }
  return found;
}

std::vector<Candidate> values_of(const CLI::Option& option, const std::string& begun) {
  const std::string type = option.get_type_name();
  if (type.starts_with("FILE") || type.starts_with("NAME|FILE")) return {{kFiles, ""}};
  if (type == "DIR") return {{kFolders, ""}};
  if (type.starts_with("SPEC") || type == "NAME|SPEC") return specs(begun);
  if (type == "METHOD") return methods_with_variants();
  std::vector<Candidate> found;
  for (const std::string& value : alternatives(type)) found.push_back({value, ""});
  // Of several, the last is being typed.
  const std::size_t comma = begun.rfind(',');
  const std::string before = comma == std::string::npos ? "" : begun.substr(0, comma + 1);
  for (const std::string& value : offered_values(option)) found.push_back({before + value, ""});
  return found;
}

// Long options, and the short ones to whoever has typed no more than a dash.
std::vector<Candidate> options_of(const CLI::App& command, const std::string& begun) {
  std::vector<Candidate> found;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) found.push_back({"--" + name, option->get_description()});
    if (begun.size() > 1) continue;
    for (const std::string& name : option->get_snames()) found.push_back({"-" + name, option->get_description()});
  }
  return found;
}

std::vector<Candidate> commands_of(const CLI::App& program) {
  std::vector<Candidate> found;
  for (const CLI::App* command :
       program.get_subcommands([](const CLI::App* each) { return !each->get_group().empty(); })) {
    found.push_back({command->get_name(), command->get_description()});
  }
  return found;
}

// The values of the positional argument that the next word belongs to.
std::vector<Candidate> arguments_of(const CLI::App& command, int before, const std::string& begun) {
  for (const CLI::Option* option :
       command.get_options([](const CLI::Option* each) { return each->get_positional(); })) {
    if (before < option->get_items_expected_max()) return values_of(*option, begun);
    before -= option->get_items_expected_max();
  }
  return {};
}

// Reads a command line up to the word that is being typed.
class CommandLine {
 public:
  explicit CommandLine(const CLI::App& program) : command_(&program), is_program_(true) {}

  void read(const std::string& word) {
    if (word == "=") return;  // shells that break words there give it as one
    if (!only_arguments_ && word == "--") {
      only_arguments_ = true;
      taking_ = nullptr;
    } else if (!only_arguments_ && word.starts_with('-') && word.size() > 1) {
      const std::size_t equals = word.find('=');
      take(option_named(*command_, word.substr(0, equals)), equals == std::string::npos ? 0 : 1);
    } else if (taking_ != nullptr && (taken_ == 0 || !takes_several(*taking_) || takes_another(*taking_, word))) {
      take(taking_, taken_ + 1);
    } else if (taking_ != nullptr) {
      taking_ = nullptr;
      ++arguments_;
    } else if (is_program_) {
      if (const CLI::App* chosen = command_named(*command_, word)) {
        command_ = chosen;
        is_program_ = false;
      }
    } else {
      ++arguments_;
    }
  }

  std::vector<Candidate> candidates_for(const std::string& begun) const {
    if (!only_arguments_ && begun.starts_with('-')) {
      const std::size_t equals = begun.find('=');
      if (equals == std::string::npos) return options_of(*command_, begun);
      const CLI::Option* option = option_named(*command_, begun.substr(0, equals));
      std::vector<Candidate> found;
      if (option != nullptr) found = values_of(*option, begun.substr(equals + 1));
      for (Candidate& candidate : found) {
        if (!candidate.text.starts_with(':')) candidate.text.insert(0, begun.substr(0, equals + 1));
      }
      return found;
    }
    if (taking_ != nullptr) return values_of(*taking_, begun == "=" ? "" : begun);
    return is_program_ ? commands_of(*command_) : arguments_of(*command_, arguments_, begun);
  }

 private:
  // The option has got so many values; whether the next word is one of them too.
  void take(const CLI::Option* option, int values) {
    const bool more =
        option != nullptr && values < option->get_items_expected_max() &&
        (values < option->get_items_expected_min() || option->get_allow_extra_args() || takes_several(*option));
    taking_ = more ? option : nullptr;
    taken_ = values;
  }

  const CLI::App* command_;
  bool is_program_;
  const CLI::Option* taking_ = nullptr;  // whose values may follow
  int taken_ = 0;
  int arguments_ = 0;  // that belong to no option
  bool only_arguments_ = false;
};

constexpr std::string_view kBash =
    R"(# Completion of kvreplay's command line for bash, which asks the program itself: printed by `kvreplay completion bash`.
_kvreplay() {
  local program=${1/#\~/$HOME} begun=${COMP_WORDS[COMP_CWORD]} candidate
  [ "$begun" != = ] || begun=
  COMPREPLY=()
  while IFS=$'\t' read -r candidate _; do
    case $candidate in
      :files) compopt -o filenames 2>/dev/null; mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$begun") ;;
      :folders) compopt -o filenames 2>/dev/null; mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -d -- "$begun") ;;
      "$begun"*) COMPREPLY+=("${candidate}") ;;
    esac
  done < <("$program" complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _kvreplay kvreplay
)";

constexpr std::string_view kZsh = R"(#compdef kvreplay
# Completion of kvreplay's command line for zsh, which asks the program itself: printed by `kvreplay completion zsh`.
_kvreplay() {
  local line
  local -a described
  for line in "${(@f)$("${(e)words[1]}" complete -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}"; do
    case $line in
      :files*) compset -P '--*='; _files ;;
      :folders*) compset -P '--*='; _files -/ ;;
      ?*) described+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}") ;;
    esac
  done
  (( ! $#described )) || _describe kvreplay described
}
if [ "$funcstack[1]" = _kvreplay ]; then _kvreplay "$@"; else compdef _kvreplay kvreplay; fi
)";

constexpr std::string_view kFish =
    R"(# Completion of kvreplay's command line for fish, which asks the program itself: printed by `kvreplay completion fish`.
function __kvreplay_candidates
    set -l words (commandline -opc)
    set -l begun (commandline -ct)
    for line in ($words[1] complete -- $words[2..] "$begun" 2>/dev/null)
        switch $line
            case ':files*'
                __fish_complete_path (string replace -r -- '^--[^=]*=' '' $begun)
            case ':folders*'
                __fish_complete_directories (string replace -r -- '^--[^=]*=' '' $begun)
            case '*'
                echo $line
        end
    end
end
complete -c kvreplay -f -a '(__kvreplay_candidates)'
)";

}  // namespace

std::vector<Candidate> candidates(const CLI::App& program, const std::vector<std::string>& words) {
  if (words.empty()) return {};
  CommandLine line(program);
  for (std::size_t i = 0; i + 1 < words.size(); ++i) line.read(words[i]);
  return line.candidates_for(words.back());
}

void add_completion_commands(CLI::App& app) {
  auto shell = std::make_shared<std::string>();
  CLI::App* completion =
      app.add_subcommand("completion", "Print what makes a shell complete commands, options and policies");
  completion->add_option("shell", *shell, "Which shell: source <(kvreplay completion bash)")
      ->required()
      ->check(one_of({"bash", "zsh", "fish"}))
      ->type_name("bash|zsh|fish");
  completion->callback([shell]() { fmt::print("{}", *shell == "bash" ? kBash : *shell == "zsh" ? kZsh : kFish); });

  // What the shells ask; nothing for people, so the help does not show it.
  auto words = std::make_shared<std::vector<std::string>>();
  CLI::App* complete = app.add_subcommand("complete", "Print what may stand for the last word")->group("");
  complete->add_option("words", *words, "After --: the words of a command line");
  complete->callback([words, &app]() {
    for (const Candidate& candidate : candidates(app, *words)) {
      fmt::print("{}\t{}\n", candidate.text, candidate.description);
    }
  });
}

}  // namespace kvreplay::cli
