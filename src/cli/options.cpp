#include "cli/options.h"

#include <fmt/format.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "policy/parameter.h"

namespace kvreplay::cli {

void add_threads_option(CLI::App& command, int& threads) {
  constexpr int kMost = 4096;
  command.add_option("-t,--threads", threads, "Threads (default: all processors); results do not depend on it")
      ->check(integer_in(1, kMost, "a number of threads"))
      ->type_name("N");
}

int threads_or_all(int threads) { return threads > 0 ? threads : omp_get_max_threads(); }

Check one_of(std::vector<std::string> choices) {
  return [choices = std::move(choices)](const std::string& value) -> std::string {
    if (std::ranges::find(choices, value) != choices.end()) return "";
    std::string legal = choices.front();
    for (std::size_t i = 1; i < choices.size(); ++i) legal += (i + 1 < choices.size() ? ", " : " or ") + choices[i];
    return fmt::format("must be {}, not '{}'.{}", legal, value, suggestion(value, choices));
  };
}

Check integer_in(int minimum, int maximum, std::string what) {
  return [minimum, maximum, what = std::move(what)](const std::string& value) -> std::string {
    int number = 0;
    const char* end = value.data() + value.size();
    const auto [stop, failure] = std::from_chars(value.data(), end, number);
    if (failure == std::errc() && stop == end && number >= minimum && number <= maximum) return "";
    return fmt::format("'{}' is not {}: an integer, {}", value, what,
                       maximum == std::numeric_limits<int>::max() ? fmt::format("at least {}", minimum)
                                                                  : fmt::format("{} to {}", minimum, maximum));
  };
}

Check number_that(std::function<bool(double number)> fits, std::string what) {
  return [fits = std::move(fits), what = std::move(what)](const std::string& value) -> std::string {
    double number = 0;
    const char* end = value.data() + value.size();
    const auto [stop, failure] = std::from_chars(value.data(), end, number);
    if (failure == std::errc() && stop == end && std::isfinite(number) && fits(number)) return "";
    return fmt::format("'{}' is not {}", value, what);
  };
}

std::int64_t memory_size(const std::string& value) {
  double number = 0;
  const char* end = value.data() + value.size();
  const auto [stop, failure] = std::from_chars(value.data(), end, number);
  if (failure != std::errc()) return -1;
  constexpr std::string_view kSuffixes = "KMGT";
  if (end - stop == 1) {
    const std::size_t power = kSuffixes.find(static_cast<char>(std::toupper(static_cast<unsigned char>(*stop))));
    if (power == std::string_view::npos) return -1;
    number *= std::pow(1024.0, static_cast<double>(power + 1));
  } else if (stop != end) {
    return -1;
  }
  constexpr double kMost = 1e15;
  return number >= 1 && number <= kMost ? static_cast<std::int64_t>(number) : -1;
}

std::string is_memory_size(const std::string& value) {
  if (memory_size(value) > 0) return "";
  return fmt::format("'{}' is not an amount of memory: bytes, or a number with K, M, G or T, as in 2G", value);
}

std::string names_a_file(const std::string& value) { return value.empty() ? "the file's name is empty" : ""; }

namespace {

// The options that take several values, of all commands.
std::map<const CLI::Option*, std::function<bool(const std::string&)>>& several() {
  static std::map<const CLI::Option*, std::function<bool(const std::string&)>> options;
  return options;
}

std::map<const CLI::Option*, std::vector<std::string>>& offered() {
  static std::map<const CLI::Option*, std::vector<std::string>> options;
  return options;
}

bool is_made_of(const std::string& value, std::string_view characters) {
  return !value.empty() && value.find_first_not_of(characters) == std::string::npos;
}

}  // namespace

void take_several(CLI::Option& option, std::function<bool(const std::string&)> is_value) {
  option.allow_extra_args(false);
  several()[&option] = std::move(is_value);
}

bool takes_several(const CLI::Option& option) { return several().contains(&option); }

bool takes_another(const CLI::Option& option, const std::string& value) {
  const auto found = several().find(&option);
  return found != several().end() && !value.starts_with('-') && found->second(value);
}

void offer_values(const CLI::Option& option, std::vector<std::string> values) {
  offered()[&option] = std::move(values);
}

const std::vector<std::string>& offered_values(const CLI::Option& option) { return offered()[&option]; }

std::vector<std::string> one_value_each(const CLI::App& app, const std::vector<std::string>& arguments) {
  const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
  const auto named = [&arguments](const CLI::App* command) {
    return !arguments.empty() && command->get_name() == arguments.front();
  };
  const auto command = std::ranges::find_if(commands, named);
  if (command == commands.end()) return arguments;
  std::vector<std::string> spread;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    spread.push_back(argument);
    if (argument == "--") {
      spread.insert(spread.end(), arguments.begin() + static_cast<std::ptrdiff_t>(i) + 1, arguments.end());
      break;
    }
    if (!argument.starts_with('-')) continue;
    // -c 64, -c64, --capacity 64 and --capacity=64
    const bool is_long = argument.starts_with("--");
    const std::string name = is_long ? argument.substr(0, argument.find('=')) : argument.substr(0, 2);
    const CLI::Option* option = (*command)->get_option_no_throw(name);
    if (option == nullptr || !takes_several(*option)) continue;
    if (name == argument && i + 1 < arguments.size()) spread.push_back(arguments[++i]);
    while (i + 1 < arguments.size() && takes_another(*option, arguments[i + 1])) {
      spread.push_back(name);
      spread.push_back(arguments[++i]);
    }
  }
  return spread;
}

bool looks_like_policies(const std::string& value) {
  const std::string name = value.substr(0, value.find_first_of("({"));
  return !name.empty() && name.find_first_of("./") == std::string::npos;
}

bool looks_like_capacities(const std::string& value) { return is_made_of(value, "0123456789.,%"); }

bool looks_like_counts(const std::string& value) { return is_made_of(value, "0123456789,"); }

bool looks_like_files(const std::string& value) { return !value.empty() && value.front() != '-'; }

bool looks_like_names(const std::string& value) { return is_made_of(value, "abcdefghijklmnopqrstuvwxyz-_,"); }

std::optional<int> parse_queries(const std::string& text) {
  if (text == "all") return std::nullopt;
  constexpr std::string_view prefix = "window:";
  int window = 0;
  const char* end = text.data() + text.size();
  if (text.starts_with(prefix)) {
    const auto result = std::from_chars(text.data() + prefix.size(), end, window);
    if (result.ec == std::errc() && result.ptr == end && window >= 1) return window;
  }
  throw UsageError(fmt::format("--queries {}: must be \"all\" or \"window:N\" with N at least 1", text));
}

std::string counted(std::size_t count, std::string_view noun) {
  std::string text = fmt::format("{} {}", count, noun);
  if (count == 1) return text;
  if (noun.ends_with('y')) {
    text.pop_back();
    return text + "ies";
  }
  return text + (noun.ends_with('s') ? "es" : "s");
}

}  // namespace kvreplay::cli
