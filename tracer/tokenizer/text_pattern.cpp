#define PCRE2_CODE_UNIT_WIDTH 8
#include "tracer/tokenizer/text_pattern.h"

#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdint>
#include <iterator>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/tokenizer/aligned_text.h"

namespace kvreplay::tracer {

namespace {

// The general categories that do not depend on what Unicode has yet to assign.
constexpr std::string_view kCategories[] = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N", "Nd",
                                            "Nl", "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm",
                                            "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};

// Oniguruma's \s is Unicode's White_Space; PCRE2's has U+180E as well.
constexpr std::string_view kSpaceMembers = "\\x{09}-\\x{0d} \\x{85}\\p{Z}";

// Oniguruma lets some single characters, such as U+FB01, match two letters where case is ignored; PCRE2 does not.
constexpr std::array<std::string_view, 5> kLigatures = {"ff", "fi", "fl", "ss", "st"};

// Reads an expression in Oniguruma's syntax and writes it in PCRE2's.
class Translation {
 public:
  explicit Translation(std::string_view expression) : rest_(expression) {}

  std::string run() {
    alternatives(false);
    if (!rest_.empty()) refuse("an unmatched )");
    return result_;
  }

 private:
  enum class Atom { none, literal, set, group, look };

  // A member of a set: a character, or a class such as \p{L}.
  struct Member {
    std::optional<std::string> character;
    std::string written;
  };

  [[noreturn]] static void refuse(std::string_view what) { throw Error(fmt::format("{} is not supported", what)); }

  bool accept(std::string_view text) {
    if (!rest_.starts_with(text)) return false;
    rest_.remove_prefix(text.size());
    return true;
  }

  std::string_view take(std::size_t length) {
    const std::string_view taken = rest_.substr(0, length);
    rest_.remove_prefix(taken.size());
    return taken;
  }

  std::string_view take_character() {
    const auto lead = static_cast<unsigned char>(rest_.front());
    return take(lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4);
  }

  static std::string written(std::string_view character) {
    if (character.size() > 1) return std::string(character);
    const auto byte = static_cast<unsigned char>(character.front());
    if (std::isalnum(byte) != 0) return std::string(character);
    return fmt::format("\\x{{{:02x}}}", byte);
  }

  void alternatives(bool ignoring_case) {
    constexpr int kDeepest = 64;
    if (++depth_ > kDeepest) refuse("so deep a nesting");
    sequence(ignoring_case);
    while (accept("|")) {
      result_ += '|';
      sequence(ignoring_case);
    }
    --depth_;
  }

  void sequence(bool ignoring_case) {
    std::string letters;  // the literals in a row
    while (!rest_.empty() && rest_.front() != '|' && rest_.front() != ')') {
      const Atom atom = one(ignoring_case, letters);
      if (atom != Atom::literal) letters.clear();
      const bool repeated = quantifier(atom);
      if (repeated && ignoring_case && atom != Atom::group) refuse("a repetition where case is ignored");
    }
  }

  Atom one(bool ignoring_case, std::string& letters) {
    if (accept("(")) return group(ignoring_case);
    if (accept("[")) {
      set(ignoring_case);
      return Atom::set;
    }
    if (accept(".")) {
      result_ += "[^\\n]";
      return Atom::set;
    }
    for (const std::string_view special : {"^", "$", "*", "+", "?", "{", "}", "]"}) {
      if (rest_.starts_with(special)) refuse(fmt::format("{} here", special));
    }
    if (rest_.starts_with("\\s") || rest_.starts_with("\\S")) {
      if (ignoring_case) refuse("\\s where case is ignored");
      result_ += fmt::format("[{}{}]", take(2) == "\\S" ? "^" : "", kSpaceMembers);
      return Atom::set;
    }
    const Member member = next_member();
    if (!member.character) {
      if (ignoring_case) refuse("a class where case is ignored");
      result_ += member.written;
      return Atom::set;
    }
    if (ignoring_case) {
      if (member.character->size() > 1) refuse("a letter outside ASCII where case is ignored");
      letters += static_cast<char>(std::tolower(static_cast<unsigned char>(member.character->front())));
      for (const std::string_view ligature : kLigatures) {
        if (letters.ends_with(ligature)) refuse(fmt::format("{:?} where case is ignored", ligature));
      }
    }
    result_ += member.written;
    return Atom::literal;
  }

  Atom group(bool ignoring_case) {
    Atom atom = Atom::group;
    if (accept("?i:")) {
      result_ += "(?i:";
      ignoring_case = true;
    } else if (accept("?>")) {
      result_ += "(?>";
    } else if (rest_.starts_with("?=") || rest_.starts_with("?!")) {
      result_ += fmt::format("({}", take(2));
      atom = Atom::look;
    } else if (accept("?:") || (!rest_.starts_with('?') && !rest_.starts_with('*'))) {
      result_ += "(?:";
    } else {
      refuse(fmt::format("({}", rest_.substr(0, 3)));
    }
    alternatives(ignoring_case);
    if (!accept(")")) refuse("an unmatched (");
    result_ += ')';
    return atom;
  }

  void set(bool ignoring_case) {
    result_ += '[';
    if (accept("^")) {
      if (ignoring_case) refuse("[^ where case is ignored");
      result_ += '^';
    }
    if (rest_.starts_with(']')) refuse("[]");
    while (!accept("]")) {
      if (rest_.empty()) refuse("an unmatched [");
      if (rest_.starts_with('[')) refuse("a [ inside a [...]");
      if (rest_.starts_with("&&")) refuse("&&");
      if (accept("\\s")) {
        if (ignoring_case) refuse("\\s where case is ignored");
        result_ += kSpaceMembers;
        not_a_range();
        continue;
      }
      const Member first = next_member();
      check_case(first, ignoring_case);
      result_ += first.written;
      if (!rest_.starts_with('-') || rest_.starts_with("-]")) continue;
      if (!first.character) refuse("a range that begins with a class");
      accept("-");
      if (rest_.empty() || rest_.starts_with('[')) refuse("such a range");
      const Member last = next_member();
      if (!last.character) refuse("a range that ends with a class");
      check_case(last, ignoring_case);
      result_ += '-' + last.written;
    }
    result_ += ']';
  }

  void not_a_range() {
    if (rest_.starts_with('-') && !rest_.starts_with("-]")) refuse("a range that begins with a class");
  }

  static void check_case(const Member& member, bool ignoring_case) {
    if (!ignoring_case) return;
    if (!member.character || member.character->size() > 1) refuse("more than ASCII letters where case is ignored");
  }

  Member next_member() {
    if (!accept("\\")) {
      const std::string_view character = take_character();
      return {std::string(character), written(character)};
    }
    if (rest_.empty()) refuse("a \\ at the end");
    const std::string_view escaped = take_character();
    if (escaped == "p" || escaped == "P") return {std::nullopt, category(escaped)};
    if (escaped == "d") return {std::nullopt, "\\p{Nd}"};
    if (escaped == "D") return {std::nullopt, "\\P{Nd}"};
    constexpr std::pair<std::string_view, std::string_view> kControls[] = {{"t", "\t"}, {"n", "\n"}, {"v", "\v"},
                                                                           {"f", "\f"}, {"r", "\r"}, {"a", "\a"}};
    for (const auto& [name, character] : kControls) {
      if (escaped == name) return {std::string(character), written(character)};
    }
    if (escaped == "u") {
      const std::string character = code_point(take(4));
      return {character, written(character)};
    }
    if (escaped == "x" && accept("{")) {
      const std::string character = code_point(take(rest_.find('}')));
      accept("}");
      return {character, written(character)};
    }
    if (escaped.size() > 1 || std::ispunct(static_cast<unsigned char>(escaped.front())) == 0) {
      refuse(fmt::format("\\{}", escaped));
    }
    return {std::string(escaped), written(escaped)};
  }

  // The character of a number in hexadecimal.
  static std::string code_point(std::string_view digits) {
    unsigned value = 0;
    const auto [end, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (failure != std::errc() || end != digits.data() + digits.size() || value > 0x10ffff ||
        (value >= 0xd800 && value < 0xe000)) {
      refuse(fmt::format("the character {:?}", digits));
    }
    return utf8(value);
  }

  std::string category(std::string_view letter) {
    const std::size_t end = rest_.find('}');
    if (!accept("{") || end == std::string_view::npos) refuse(fmt::format("\\{} without {{...}}", letter));
    const std::string_view name = take(end - 1);
    accept("}");
    if (std::find(std::begin(kCategories), std::end(kCategories), name) == std::end(kCategories)) {
      refuse(fmt::format("\\{}{{{}}}", letter, name));
    }
    return fmt::format("\\{}{{{}}}", letter, name);
  }

  // Whether there is one.
  bool quantifier(Atom atom) {
    if (rest_.empty() || std::string_view("*+?{").find(rest_.front()) == std::string_view::npos) return false;
    if (atom == Atom::look) refuse("a repeated lookahead");
    const bool counted = rest_.front() == '{';
    if (counted) {
      const std::size_t end = rest_.find('}');
      const std::string_view bounds = rest_.substr(1, end == std::string_view::npos ? end : end - 1);
      const std::size_t comma = bounds.find(',');
      const auto is_number = [](std::string_view text) {
        return !text.empty() && text.size() < 6 && text.find_first_not_of("0123456789") == std::string_view::npos;
      };
      const bool valid =
          is_number(bounds.substr(0, comma)) &&
          (comma == std::string_view::npos || comma + 1 == bounds.size() || is_number(bounds.substr(comma + 1)));
      if (end == std::string_view::npos || !valid) refuse("such a {");
      result_ += take(end + 1);
    } else {
      result_ += take(1);
      // Possessive or lazy. After {n,m} Oniguruma takes these for another repetition.
      if (rest_.starts_with('+') || rest_.starts_with('?')) result_ += take(1);
    }
    if (!rest_.empty() && std::string_view("*+?{").find(rest_.front()) != std::string_view::npos) {
      refuse("a repeated repetition");
    }
    return true;
  }

  std::string_view rest_;
  std::string result_;
  int depth_ = 0;
};

std::string message_of(int code) {
  std::array<unsigned char, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

struct FreeCode {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct FreeContext {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct FreeStack {
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};
struct FreeMatch {
  void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
};

// With a stack for compiled expressions that grows as far as a long text needs it; each thread has its own.
pcre2_match_context* match_context() {
  constexpr std::size_t kSmallestStack = std::size_t{32} << 10;
  constexpr std::size_t kLargestStack = std::size_t{64} << 20;
  thread_local const std::unique_ptr<pcre2_jit_stack, FreeStack> stack(
      pcre2_jit_stack_create(kSmallestStack, kLargestStack, nullptr));
  thread_local const std::unique_ptr<pcre2_match_context, FreeContext> context = [] {
    std::unique_ptr<pcre2_match_context, FreeContext> created(pcre2_match_context_create(nullptr));
    pcre2_jit_stack_assign(created.get(), nullptr, stack.get());
    return created;
  }();
  return context.get();
}

}  // namespace

struct TextPattern::Compiled {
  std::string expression;  // as it was given
  std::unique_ptr<pcre2_code, FreeCode> code;
};

bool begins_with_word_character(std::string_view text) {
  constexpr std::string_view kWord = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]";
  static const std::unique_ptr<pcre2_code, FreeCode> code = [&] {
    int failure = 0;
    std::size_t place = 0;
    return std::unique_ptr<pcre2_code, FreeCode>(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kWord.data()), kWord.size(),
                                                               PCRE2_UTF | PCRE2_ANCHORED, &failure, &place, nullptr));
  }();
  if (!code) throw Error("PCRE2 is older than 10.40");
  const std::unique_ptr<pcre2_match_data, FreeMatch> match(pcre2_match_data_create_from_pattern(code.get(), nullptr));
  return pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0, PCRE2_NO_UTF_CHECK,
                     match.get(), nullptr) > 0;
}

std::string pcre2_expression(std::string_view oniguruma) {
  if (find_invalid_utf8(oniguruma)) throw Error("the regular expression is not UTF-8 text");
  try {
    return Translation(oniguruma).run();
  } catch (const Error& reason) {
    throw Error(fmt::format("the regular expression {}: {}", printable(oniguruma), reason.what()));
  }
}

TextPattern TextPattern::literal(std::string text) {
  TextPattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

TextPattern TextPattern::expression(std::string_view oniguruma) {
  const std::string translated = pcre2_expression(oniguruma);
  auto compiled = std::make_shared<Compiled>();
  compiled->expression = printable(oniguruma);
  int failure = 0;
  std::size_t place = 0;
  compiled->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), PCRE2_UTF,
                                     &failure, &place, nullptr));
  if (!compiled->code) {
    throw Error(fmt::format("the regular expression {}: {}", compiled->expression, message_of(failure)));
  }
  std::uint32_t matches_nothing = 0;
  pcre2_pattern_info(compiled->code.get(), PCRE2_INFO_MATCHEMPTY, &matches_nothing);
  if (matches_nothing != 0) {
    throw Error(fmt::format("the regular expression {}: a match of nothing is not supported", compiled->expression));
  }
  // Where there is no compiler for the processor, the expression is interpreted.
  pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE);
  TextPattern pattern;
  pattern.compiled_ = std::move(compiled);
  return pattern;
}

void TextPattern::find(std::string_view text, std::vector<TextRange>& matches) const {
  if (!compiled_) {
    for (std::size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, at)) {
      matches.push_back({at, at + literal_.size()});
      at += literal_.size();
    }
    return;
  }
  if (text.empty()) return;
  const std::unique_ptr<pcre2_match_data, FreeMatch> match(
      pcre2_match_data_create_from_pattern(compiled_->code.get(), nullptr));
  for (std::size_t at = 0; at < text.size();) {
    const int count = pcre2_match(compiled_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                  PCRE2_NO_UTF_CHECK, match.get(), match_context());
    if (count == PCRE2_ERROR_NOMATCH) return;
    if (count < 0) throw Error(fmt::format("the regular expression {}: {}", compiled_->expression, message_of(count)));
    const std::size_t* ends = pcre2_get_ovector_pointer(match.get());
    matches.push_back({ends[0], ends[1]});
    at = ends[1];
  }
}

}  // namespace kvreplay::tracer
