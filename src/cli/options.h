// What the options of several commands have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace kvreplay::cli {

/// `threads` stays 0 where the option is not given.
void add_threads_option(CLI::App& command, int& threads);

/// OpenMP's number of threads where `threads` is 0: every processor, or what OMP_NUM_THREADS says.
int threads_or_all(int threads);

/// A check for CLI11: what is wrong with a value, or nothing. Unlike CLI11's own they add nothing to the help's column
/// of types.
using Check = std::function<std::string(const std::string& value)>;

/// The value is one of `choices`; a nearby one is suggested.
Check one_of(std::vector<std::string> choices);

/// The value is an integer in [minimum, maximum]; `what` is the noun of the message, as in "a position".
Check integer_in(int minimum, int maximum, std::string what);

/// The value is a finite number that `fits`; `what` describes it, as in "a goal: a number above 0".
Check number_that(std::function<bool(double number)> fits, std::string what);

/// The value is an amount of memory: a number of bytes, or one with K, M, G or T for powers of 1024, as in 1.5G.
std::string is_memory_size(const std::string& value);

/// The bytes of such a value.
std::int64_t memory_size(const std::string& value);

/// The value names a file. An empty one is a script's unset variable, and hours of work would go nowhere.
std::string names_a_file(const std::string& value);

/// Lets an option take several values after its name, so that `-c 64 128` means `-c 64 -c 128`, as far as what follows
/// the first looks like one of them: `is_value` says so. Files may follow.
void take_several(CLI::Option& option, std::function<bool(const std::string&)> is_value);
bool takes_several(const CLI::Option& option);

/// Whether such an option, which has a value, takes `value` as a further one.
bool takes_another(const CLI::Option& option, const std::string& value);

/// Arguments in which every value of such options of the command that they name has the option's name before it.
std::vector<std::string> one_value_each(const CLI::App& app, const std::vector<std::string>& arguments);

/// Values that completion offers for an option, which takes them alone or several with commas between them.
void offer_values(const CLI::Option& option, std::vector<std::string> values);
const std::vector<std::string>& offered_values(const CLI::Option& option);

/// The value looks like a policy's spec and not like the name of a file, like counts or shares, or like counts alone.
bool looks_like_policies(const std::string& value);
bool looks_like_capacities(const std::string& value);
bool looks_like_counts(const std::string& value);

/// The value is no option.
bool looks_like_files(const std::string& value);

/// The value looks like names of what the program has, as in error-by-head,regret.
bool looks_like_names(const std::string& value);

/// What --queries says: N of "window:N", or nothing for "all". Throws UsageError.
std::optional<int> parse_queries(const std::string& text);

/// "1 trace", "2 traces", "2 policies", "2 processes".
std::string counted(std::size_t count, std::string_view noun);

}  // namespace kvreplay::cli
