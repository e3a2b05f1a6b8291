#include "policy/expansion.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <optional>

#include "base/error.h"

namespace kvreplay {
namespace {

// A decimal number as it is written: digits · 10^−places.
struct Decimal {
  std::int64_t digits = 0;
  int places = 0;
};

constexpr int kMostDigits = 15;  // products of ten stay far from the end of 64 bits

std::optional<Decimal> decimal_from(std::string_view text) {
  Decimal number;
  bool negative = false;
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
    negative = text.front() == '-';
    text.remove_prefix(1);
  }
  bool any = false;
  int significant = 0;
  bool point = false;
  for (const char c : text) {
    if (c == '.' && !point) {
      point = true;
      continue;
    }
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) return std::nullopt;
    any = true;
    number.digits = 10 * number.digits + (c - '0');
    if (number.digits != 0 && ++significant > kMostDigits) return std::nullopt;
    if (point && ++number.places > kMostDigits) return std::nullopt;
  }
  if (!any) return std::nullopt;
  if (negative) number.digits = -number.digits;
  return number;
}

std::string text_of(Decimal number) {
  while (number.places > 0 && number.digits % 10 == 0) {
    number.digits /= 10;
    --number.places;
  }
  std::string digits = fmt::format("{}", std::abs(number.digits));
  if (number.places > 0) {
    const auto places = static_cast<std::size_t>(number.places);
    if (digits.size() <= places) digits.insert(0, places + 1 - digits.size(), '0');
    digits.insert(digits.size() - places, 1, '.');
  }
  return number.digits < 0 ? "-" + digits : digits;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())) != 0) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0) text.remove_suffix(1);
  return text;
}

// Expands one text; `whole` is what the user wrote, for messages.
class Expansion {
 public:
  explicit Expansion(std::string_view whole) : whole_(whole) {}

  std::vector<std::string> expand(std::string_view text) const {
    std::vector<std::string> results = {""};
    for (std::size_t at = 0; at < text.size();) {
      if (text[at] == '}') fail("has a '}' without a '{'");
      if (text[at] != '{') {
        const std::size_t end = text[at] == '"' ? end_of_quotes(text, at) : at + 1;
        for (std::string& result : results) result += text.substr(at, end - at);
        at = end;
        continue;
      }
      const std::size_t end = end_of_braces(text, at);
      const std::vector<std::string> values = values_of(text.substr(at + 1, end - at - 2));
      if (results.size() > kMostSpecs / values.size()) too_many();
      std::vector<std::string> combined;
      for (const std::string& result : results) {
        for (const std::string& value : values) combined.push_back(result + value);
      }
      results = std::move(combined);
      at = end;
    }
    return results;
  }

 private:
  // One past the quote that closes the one at `at`.
  std::size_t end_of_quotes(std::string_view text, std::size_t at) const {
    for (++at; at < text.size() && text[at] != '"'; ++at) {
      if (text[at] == '\\') ++at;
    }
    return std::min(at + 1, text.size());  // what is not closed, the spec's grammar tells
  }

  // One past the brace that closes the one at `at`.
  std::size_t end_of_braces(std::string_view text, std::size_t at) const {
    int depth = 0;
    while (at < text.size()) {
      if (text[at] == '"') {
        at = end_of_quotes(text, at);
        continue;
      }
      if (text[at] == '{') ++depth;
      if (text[at] == '}' && --depth == 0) return at + 1;
      ++at;
    }
    fail("has a '{' without a '}'");
  }

  // What the inside of a pair of braces stands for.
  std::vector<std::string> values_of(std::string_view inside) const {
    std::vector<std::string> values;
    std::size_t start = 0;
    int depth = 0;
    for (std::size_t at = 0; at <= inside.size();) {
      if (at < inside.size() && inside[at] == '"') {
        at = end_of_quotes(inside, at);
        continue;
      }
      if (at == inside.size() || (inside[at] == ',' && depth == 0)) {
        add_item(trimmed(inside.substr(start, at - start)), values);
        start = at + 1;
      } else if (inside[at] == '{' || inside[at] == '(') {
        ++depth;
      } else if (inside[at] == '}' || inside[at] == ')') {
        --depth;
      }
      ++at;
    }
    return values;
  }

  void add_item(std::string_view item, std::vector<std::string>& values) const {
    if (item.empty()) fail("has braces with nothing in them, or nothing between two commas");
    if (item.find(':') != std::string_view::npos && item.find_first_of("{(\"") == std::string_view::npos) {
      add_range(item, values);
    } else {
      for (std::string& value : expand(item)) values.push_back(std::move(value));
    }
    if (values.size() > kMostSpecs) too_many();
  }

  void add_range(std::string_view item, std::vector<std::string>& values) const {
    std::vector<Decimal> numbers;
    for (std::size_t start = 0; start <= item.size();) {
      const std::size_t end = std::min(item.find(':', start), item.size());
      const std::optional<Decimal> number = decimal_from(trimmed(item.substr(start, end - start)));
      if (!number || numbers.size() == 3) {
        fail(
            fmt::format("'{}' is no range of numbers first:last:step, with at most {} digits each; text with colons "
                        "goes in quotes",
                        item, kMostDigits));
      }
      numbers.push_back(*number);
      start = end + 1;
    }
    if (numbers.size() == 2) numbers.push_back({1, 0});
    const int places = std::max({numbers[0].places, numbers[1].places, numbers[2].places});
    for (Decimal& number : numbers) {
      for (; number.places < places; ++number.places) {
        if (std::abs(number.digits) > INT64_MAX / 100) {
          fail(fmt::format("the numbers of '{}' are too far apart to be exact", item));
        }
        number.digits *= 10;
      }
    }
    const std::int64_t first = numbers[0].digits;
    const std::int64_t last = numbers[1].digits;
    const std::int64_t step = numbers[2].digits;
    if (step == 0) fail(fmt::format("the range '{}' has the step 0", item));
    if (first != last && (last > first) != (step > 0)) {
      fail(fmt::format("the range '{}' leads away from its end; a descending one has a negative step", item));
    }
    const std::int64_t count = (last - first) / step + 1;
    if (count > static_cast<std::int64_t>(kMostSpecs)) too_many();
    for (std::int64_t i = 0; i < count; ++i) values.push_back(text_of({first + i * step, places}));
  }

  [[noreturn]] void fail(std::string_view reason) const {
    throw UsageError(fmt::format("policy '{}': {}", whole_, reason));
  }

  [[noreturn]] void too_many() const { fail(fmt::format("stands for more than {} settings", kMostSpecs)); }

  std::string_view whole_;
};

}  // namespace

std::vector<std::string> expand_spec(std::string_view text) { return Expansion(text).expand(text); }

std::vector<std::string> split_specs(std::string_view text) {
  std::vector<std::string> specs = {""};
  int depth = 0;
  bool quoted = false;
  for (const char c : text) {
    if (c == '"') quoted = !quoted;
    if (!quoted && (c == '(' || c == '{')) ++depth;
    if (!quoted && (c == ')' || c == '}')) --depth;
    if (c == ',' && depth == 0 && !quoted) {
      specs.emplace_back();
    } else {
      specs.back() += c;
    }
  }
  return specs;
}

}  // namespace kvreplay
