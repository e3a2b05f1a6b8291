#include "tracer/tokenizer/tokenizer_json.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "base/file_text.h"
#include "base/printable.h"
#include "tracer/tokenizer/added_tokens.h"
#include "tracer/tokenizer/aligned_text.h"
#include "tracer/tokenizer/bpe.h"
#include "tracer/tokenizer/text_pattern.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

// How GPT-2 divides text into words.
constexpr std::string_view kGpt2Words = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// The steps of a tokenizer.json.

struct Prepend {
  std::string content;
};
struct Replace {
  TextPattern pattern;
  std::string content;
};
struct ComposeNfc {};
using Normalizer = std::variant<Prepend, Replace, ComposeNfc>;

enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

struct Split {
  TextPattern pattern;
  Behavior behavior = Behavior::isolated;
  bool invert = false;
};
struct ByteLevel {
  bool add_prefix_space = true;
  std::optional<TextPattern> words;
};
enum class PrependScheme { always, first, never };
struct Metaspace {
  std::string replacement;
  PrependScheme prepend = PrependScheme::always;
  bool split = true;
};
using PreTokenizer = std::variant<Split, ByteLevel, Metaspace>;

struct ByteFallback {};
struct Fuse {};
struct Strip {
  std::string content;  // one character
  std::size_t start = 0;
  std::size_t stop = 0;
};
struct FromByteLevel {};
using Decoder = std::variant<Replace, ByteFallback, Fuse, Strip, Metaspace, FromByteLevel>;

template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

// A byte-level tokenizer's letters: each byte has one that can be printed.
struct ByteAlphabet {
  std::array<std::string, 256> letters;
  std::map<char32_t, char> bytes;

  ByteAlphabet() {
    char32_t next = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable_byte = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
      const char32_t letter = printable_byte ? byte : next++;
      letters[byte] = utf8(letter);
      bytes[letter] = static_cast<char>(byte);
    }
  }
};

const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// The bytes that a token's letters stand for, or nothing if one of them is no letter of the alphabet.
std::optional<std::string> bytes_of_letters(std::string_view token) {
  std::string bytes;
  while (!token.empty()) {
    const auto letter = byte_alphabet().bytes.find(leading_code_point(token));
    if (letter == byte_alphabet().bytes.end()) return std::nullopt;
    bytes += letter->second;
    token.remove_prefix(leading_character(token));
  }
  return bytes;
}

// The byte that a token such as <0x0A> stands for.
std::optional<char> byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return std::nullopt;
  unsigned value = 0;
  for (const char digit : token.substr(3, 2)) {
    const std::size_t found = std::string_view("0123456789abcdefABCDEF").find(digit);
    if (found == std::string_view::npos) return std::nullopt;
    value = value * 16 + static_cast<unsigned>(found < 16 ? found : found - 6);
  }
  return static_cast<char>(value);
}

constexpr std::string_view kReplacementCharacter = "\ufffd";

// Bytes at the beginning of `bytes`, which are no character, that stand for one: those that some continuation would
// make one, but at least one.
std::size_t broken_character(std::string_view bytes) {
  const auto is_between = [&](std::size_t at, unsigned first, unsigned last) {
    return at < bytes.size() && static_cast<unsigned char>(bytes[at]) >= first &&
           static_cast<unsigned char>(bytes[at]) <= last;
  };
  if (!is_between(0, 0xe0, 0xf4)) return 1;
  const auto lead = static_cast<unsigned char>(bytes.front());
  const unsigned first = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned last = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (!is_between(1, first, last)) return 1;
  return lead >= 0xf0 && is_between(2, 0x80, 0xbf) ? 3 : 2;
}

// UTF-8 with U+FFFD for what is none.
std::string repaired(std::string_view bytes) {
  std::string text;
  while (const auto at = find_invalid_utf8(bytes)) {
    text.append(bytes.substr(0, *at)).append(kReplacementCharacter);
    bytes.remove_prefix(*at);
    bytes.remove_prefix(broken_character(bytes));
  }
  return text.append(bytes);
}

// Text on its way to tokens: its words are ranges of it.
struct Words {
  AlignedText text;
  std::vector<TextRange> ranges;
};

std::string_view part(std::string_view text, TextRange range) {
  return text.substr(range.begin, range.end - range.begin);
}

// Divides a word at the matches, which are in order, and appends what is not empty to `words`.
void divide(TextRange word, const std::vector<TextRange>& matches, Behavior behavior, bool invert,
            std::vector<TextRange>& words) {
  struct Piece {
    TextRange range;
    bool match;
  };
  std::vector<Piece> pieces;
  std::size_t reached = word.begin;
  for (const TextRange& match : matches) {
    const TextRange range{word.begin + match.begin, word.begin + match.end};
    if (reached < range.begin) pieces.push_back({{reached, range.begin}, invert});
    pieces.push_back({range, !invert});
    reached = range.end;
  }
  if (reached < word.end) pieces.push_back({{reached, word.end}, invert});

  if (behavior == Behavior::merged_with_next) std::reverse(pieces.begin(), pieces.end());
  const std::size_t first = words.size();
  bool previous_match = false;
  for (const Piece& piece : pieces) {
    bool joins = false;
    switch (behavior) {
      case Behavior::removed:
        if (piece.match) continue;
        break;
      case Behavior::isolated:
        break;
      case Behavior::merged_with_previous:
      case Behavior::merged_with_next:
        joins = piece.match && !previous_match;
        break;
      case Behavior::contiguous:
        joins = piece.match == previous_match;
        break;
    }
    previous_match = piece.match;
    if (joins && words.size() > first) {
      words.back().begin = std::min(words.back().begin, piece.range.begin);
      words.back().end = std::max(words.back().end, piece.range.end);
    } else {
      words.push_back(piece.range);
    }
  }
  if (behavior == Behavior::merged_with_next) {
    std::reverse(words.begin() + static_cast<std::ptrdiff_t>(first), words.end());
  }
}

std::vector<TextRange> divided(const Words& words, const Split& split) {
  std::vector<TextRange> ranges;
  std::vector<TextRange> matches;
  for (const TextRange& word : words.ranges) {
    matches.clear();
    split.pattern.find(part(words.text.text, word), matches);
    divide(word, matches, split.behavior, split.invert, ranges);
  }
  return ranges;
}

void apply(const Split& split, Words& words) { words.ranges = divided(words, split); }

void apply(const ByteLevel& level, Words& words) {
  if (level.add_prefix_space) {
    Words spaced;
    for (const TextRange& word : words.ranges) {
      const std::size_t begin = spaced.text.text.size();
      if (!part(words.text.text, word).starts_with(' ')) {
        const std::size_t origin = words.text.origin_at(word.begin);
        spaced.text.append(" ", {origin, origin});
      }
      spaced.text.append(words.text, word);
      spaced.ranges.push_back({begin, spaced.text.text.size()});
    }
    words = std::move(spaced);
  }
  if (level.words) words.ranges = divided(words, {*level.words, Behavior::isolated, false});
  Words lettered;
  lettered.text.text.reserve(words.text.text.size() + words.text.text.size() / 2);
  lettered.text.origins.reserve(words.text.text.size() + words.text.text.size() / 2);
  lettered.ranges.reserve(words.ranges.size());
  for (const TextRange& word : words.ranges) {
    const std::size_t begin = lettered.text.text.size();
    for (std::size_t at = word.begin; at < word.end; ++at) {
      const auto byte = static_cast<unsigned char>(words.text.text[at]);
      lettered.text.append(byte_alphabet().letters[byte], words.text.origins[at]);
    }
    lettered.ranges.push_back({begin, lettered.text.text.size()});
  }
  words = std::move(lettered);
}

void apply(const Metaspace& metaspace, Words& words) {
  Words marked;
  const Split at_marks{TextPattern::literal(metaspace.replacement), Behavior::merged_with_next, false};
  const TextPattern space = TextPattern::literal(" ");
  for (const TextRange& word : words.ranges) {
    const AlignedText text = replaced(words.text.slice(word), space, metaspace.replacement);
    const std::size_t begin = marked.text.text.size();
    const std::size_t origin = text.origin_at(0);
    const bool prepends =
        metaspace.prepend == PrependScheme::always || (metaspace.prepend == PrependScheme::first && origin == 0);
    if (prepends && !text.text.starts_with(metaspace.replacement)) {
      marked.text.append(metaspace.replacement, {origin, origin});
    }
    marked.text.append(text, {0, text.text.size()});
    marked.ranges.push_back({begin, marked.text.text.size()});
  }
  words = std::move(marked);
  if (metaspace.split) words.ranges = divided(words, at_marks);
}

AlignedText normalized(AlignedText text, const std::vector<Normalizer>& normalizers) {
  for (const Normalizer& normalizer : normalizers) {
    std::visit(Overloaded{[&](const Prepend& prepend) {
                            if (text.text.empty()) return;
                            const std::size_t origin = text.origin_at(0);
                            AlignedText longer;
                            longer.append(prepend.content, {origin, origin});
                            longer.append(text, {0, text.text.size()});
                            text = std::move(longer);
                          },
                          [&](const Replace& replace) { text = replaced(text, replace.pattern, replace.content); },
                          [&](const ComposeNfc&) { text = composed(text); }},
               normalizer);
  }
  return text;
}

using Tokens = std::vector<std::string>;

Tokens decoded(const Replace& replace, Tokens tokens) {
  for (std::string& token : tokens) {
    const AlignedText whole = AlignedText::copy(token, {0, token.size()});
    token = replaced(whole, replace.pattern, replace.content).text;
  }
  return tokens;
}

// Bytes in a row become their text, or U+FFFD for each of them if that is no text.
Tokens decoded(const ByteFallback&, const Tokens& tokens) {
  Tokens result;
  std::string bytes;
  const auto end_bytes = [&] {
    if (bytes.empty()) return;
    if (find_invalid_utf8(bytes)) {
      result.insert(result.end(), bytes.size(), std::string(kReplacementCharacter));
    } else {
      result.push_back(bytes);
    }
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    if (const auto byte = byte_of(token)) {
      bytes += *byte;
      continue;
    }
    end_bytes();
    result.push_back(token);
  }
  end_bytes();
  return result;
}

Tokens decoded(const Fuse&, const Tokens& tokens) { return {fmt::format("{}", fmt::join(tokens, ""))}; }

Tokens decoded(const Strip& strip, Tokens tokens) {
  for (std::string& token : tokens) {
    for (std::size_t i = 0; i < strip.start && token.starts_with(strip.content); ++i) {
      token.erase(0, strip.content.size());
    }
    for (std::size_t i = 0; i < strip.stop && token.ends_with(strip.content); ++i) {
      token.resize(token.size() - strip.content.size());
    }
  }
  return tokens;
}

Tokens decoded(const Metaspace& metaspace, Tokens tokens) {
  const bool drops_first = metaspace.prepend != PrependScheme::never;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const Replace replace{TextPattern::literal(metaspace.replacement), i == 0 && drops_first ? "" : " "};
    tokens[i] = decoded(replace, Tokens{tokens[i]}).front();
  }
  return tokens;
}

Tokens decoded(const FromByteLevel&, const Tokens& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) bytes += bytes_of_letters(token).value_or(token);
  return {repaired(bytes)};
}

class JsonTokenizer final : public TokenizerBackend {
 public:
  Encoding encode(std::string_view text, bool add_special_tokens) const override {
    if (const auto at = find_invalid_utf8(text)) {
      throw Error(fmt::format("byte {} of the text is not UTF-8", *at));
    }
    Encoding encoding;
    const auto add = [&](std::int32_t id, TextRange range) {
      encoding.ids.push_back(id);
      encoding.bytes.emplace_back(range.begin, range.end);
    };
    if (add_special_tokens) {
      for (const std::int32_t id : prefix) add(id, {0, 0});
    }
    for (const AddedTokens::Part& section : raw_tokens.split(text)) {
      if (section.token != nullptr) {
        add(section.token->id, section.range);
        continue;
      }
      const AlignedText whole = normalized(AlignedText::copy(text, section.range), normalizers);
      for (const AddedTokens::Part& between : normalized_tokens.split(whole.text)) {
        if (between.token != nullptr) {
          add(between.token->id, whole.origin_of(between.range));
        } else {
          encode_words(whole.slice(between.range), add);
        }
      }
    }
    if (add_special_tokens) {
      for (const std::int32_t id : suffix) add(id, {text.size(), text.size()});
    }
    return encoding;
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    Tokens tokens;
    for (const std::int32_t id : ids) {
      const std::string* token = token_of(id);
      if (token != nullptr && !special_names.contains(*token)) tokens.push_back(*token);
    }
    if (!decoders) return fmt::format("{}", fmt::join(tokens, " "));
    for (const Decoder& decoder : *decoders) {
      tokens = std::visit([&](const auto& step) { return decoded(step, std::move(tokens)); }, decoder);
    }
    return fmt::format("{}", fmt::join(tokens, ""));
  }

  std::string piece(std::int32_t id) const override {
    const auto added_token = added.find(id);
    if (added_token != added.end() && added_token->second.special) {
      return with_bytes_named(added_token->second.content);
    }
    const std::string* token = token_of(id);
    if (token == nullptr) return fmt::format("<{}>", id);
    std::string text = *token;
    for (std::size_t i = 0; decoders && i < decoders->size(); ++i) {
      text = std::visit(Overloaded{[&](const Replace& replace) { return decoded(replace, Tokens{text}).front(); },
                                   [&](const ByteFallback&) {
                                     const auto byte = byte_of(text);
                                     return byte ? std::string(1, *byte) : text;
                                   },
                                   [&](const Metaspace& metaspace) {
                                     const auto mark = TextPattern::literal(metaspace.replacement);
                                     return decoded(Replace{mark, " "}, Tokens{text}).front();
                                   },
                                   [&](const FromByteLevel&) { return bytes_of_letters(text).value_or(text); },
                                   // These look at a whole text.
                                   [&](const Fuse&) { return text; }, [&](const Strip&) { return text; }},
                        (*decoders)[i]);
      if (find_invalid_utf8(text)) break;
    }
    return with_bytes_named(text);
  }

  std::optional<std::int32_t> id_of(const std::string& token) const {
    const auto found = added_ids.find(token);
    return found != added_ids.end() ? std::optional(found->second) : bpe.id_of(token);
  }

  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  std::optional<std::vector<Decoder>> decoders;
  Bpe bpe;
  AddedTokens raw_tokens;
  AddedTokens normalized_tokens;
  std::map<std::int32_t, AddedToken> added;
  std::map<std::int32_t, std::string> normalized_contents;  // of added tokens, where it is another text
  std::map<std::string, std::int32_t> added_ids;
  std::set<std::string> special_names;
  std::vector<std::int32_t> prefix;
  std::vector<std::int32_t> suffix;

 private:
  template <class Add>
  void encode_words(AlignedText text, const Add& add) const {
    const TextRange all{0, text.text.size()};
    Words words{std::move(text), {all}};
    for (const PreTokenizer& step : pre_tokenizers) std::visit([&](const auto& each) { apply(each, words); }, step);
    std::vector<Bpe::Token> tokens;
    for (const TextRange& word : words.ranges) {
      bpe.encode(part(words.text.text, word), tokens);
      std::size_t at = word.begin;
      for (const Bpe::Token& token : tokens) {
        add(token.id, words.text.origin_of({at, at + token.length}));
        at += token.length;
      }
    }
  }

  const std::string* token_of(std::int32_t id) const {
    const auto normalized_content = normalized_contents.find(id);
    if (normalized_content != normalized_contents.end()) return &normalized_content->second;
    const auto added_token = added.find(id);
    return added_token != added.end() ? &added_token->second.content : bpe.token(id);
  }
};

std::string shortened(std::string_view text) {
  constexpr std::size_t kLongest = 120;
  std::string whole = printable(text);
  return whole.size() > kLongest ? whole.substr(0, whole.find_first_not_of('.', kLongest)) + "..." : whole;
}

std::string shown(const json& value) { return shortened(value.dump(-1, ' ', true, json::error_handler_t::replace)); }

// An object of tokenizer.json, whose fields are read with a check. What is not asked for by the end is an error: it
// could change what the tokenizer does.
class Fields {
 public:
  Fields(const json& object, std::string place) : object_(object), place_(std::move(place)) {
    if (!object.is_object()) throw Error(fmt::format("{} must be an object, not {}", place_, shown(object)));
  }

  const std::string& place() const { return place_; }

  const json& at(const char* key) {
    seen_.insert(key);
    if (!object_.contains(key)) throw Error(fmt::format("{}: {} is missing", place_, key));
    return object_[key];
  }

  // Null if it is not there.
  const json& optional(const char* key) {
    static const json nothing;
    seen_.insert(key);
    return object_.contains(key) ? object_[key] : nothing;
  }

  std::string text(const char* key) {
    if (!at(key).is_string()) throw wrong(key, "a text");
    return object_[key].get<std::string>();
  }

  std::string character(const char* key) {
    std::string value = text(key);
    if (value.empty() || leading_character(value) != value.size()) throw wrong(key, "one character");
    return value;
  }

  bool flag(const char* key) {
    if (!at(key).is_boolean()) throw wrong(key, "true or false");
    return object_[key].get<bool>();
  }

  bool flag_or(const char* key, bool absent) { return optional(key).is_null() ? absent : flag(key); }

  std::size_t count(const char* key) {
    constexpr std::uint64_t kLargest = 1 << 20;
    if (!at(key).is_number_unsigned() || object_[key].get<std::uint64_t>() > kLargest) throw wrong(key, "a number");
    return object_[key].get<std::size_t>();
  }

  const json& list(const char* key) {
    if (!at(key).is_array()) throw wrong(key, "a list");
    return object_[key];
  }

  Error wrong(const char* key, std::string_view expected) const {
    return Error(fmt::format("{}: {} must be {}, not {}", place_, key, expected, shown(object_[key])));
  }

  Error unsupported(const char* key, std::string_view supported) const {
    return Error(fmt::format("{}: {} {} is not supported; supported: {}", place_, key, shown(object_[key]), supported));
  }

  void end() const {
    for (const auto& [key, value] : object_.items()) {
      if (!seen_.contains(key)) {
        throw Error(fmt::format("{}: the field \"{}\" is not supported", place_, shortened(key)));
      }
    }
  }

 private:
  const json& object_;
  std::string place_;
  std::set<std::string> seen_;
};

std::int32_t token_id(const json& value, const std::string& place) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max()) {
    throw Error(fmt::format("{}: {} is not a token id", place, shown(value)));
  }
  return value.get<std::int32_t>();
}

TextPattern read_pattern(Fields& fields) {
  Fields pattern(fields.at("pattern"), fields.place() + ": pattern");
  TextPattern result;
  if (!pattern.optional("String").is_null()) {
    const std::string text = pattern.text("String");
    if (text.empty()) throw pattern.wrong("String", "a text that is not empty");
    result = TextPattern::literal(text);
  } else {
    const std::string expression = pattern.text("Regex");
    try {
      result = TextPattern::expression(expression);
    } catch (const Error& reason) {
      throw Error(fmt::format("{}: {}", fields.place(), reason.what()));
    }
  }
  pattern.end();
  return result;
}

PrependScheme read_prepend_scheme(Fields& fields) {
  const json& scheme = fields.optional("prepend_scheme");
  const json& prefix = fields.optional("add_prefix_space");  // what older files say instead
  if (!prefix.is_null()) fields.flag("add_prefix_space");
  if (scheme.is_null()) return prefix == false ? PrependScheme::never : PrependScheme::always;
  const std::string name = fields.text("prepend_scheme");
  if (prefix == false && name != "never") throw fields.wrong("add_prefix_space", "true or absent with this scheme");
  if (name == "always") return PrependScheme::always;
  if (name == "first") return PrependScheme::first;
  if (name == "never") return PrependScheme::never;
  throw fields.unsupported("prepend_scheme", "always, first, never");
}

Metaspace read_metaspace(Fields& fields) {
  Metaspace metaspace;
  metaspace.replacement = fields.character("replacement");
  metaspace.prepend = read_prepend_scheme(fields);
  metaspace.split = fields.flag_or("split", true);
  fields.optional("str_rep");  // the replacement again
  return metaspace;
}

Behavior read_behavior(Fields& fields) {
  constexpr std::pair<std::string_view, Behavior> kNames[] = {{"Removed", Behavior::removed},
                                                              {"Isolated", Behavior::isolated},
                                                              {"MergedWithPrevious", Behavior::merged_with_previous},
                                                              {"MergedWithNext", Behavior::merged_with_next},
                                                              {"Contiguous", Behavior::contiguous}};
  const std::string name = fields.text("behavior");
  for (const auto& [known, behavior] : kNames) {
    if (name == known) return behavior;
  }
  throw fields.unsupported("behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous");
}

// Calls `read` for each step: those of a Sequence one after the other, in whatever depth.
template <class Read>
void each_step(const json& value, const std::string& place, const char* list_key, const Read& read, int depth = 0) {
  constexpr int kDeepest = 16;
  if (value.is_null()) return;
  Fields fields(value, place);
  const std::string type = fields.text("type");
  if (type != "Sequence") {
    read(fields, type);
    fields.end();
    return;
  }
  if (depth == kDeepest) throw Error(fmt::format("{}: more than {} sequences in one another", place, kDeepest));
  for (const json& step : fields.list(list_key)) each_step(step, place, list_key, read, depth + 1);
  fields.end();
}

void read_normalizers(const json& value, JsonTokenizer& tokenizer) {
  each_step(value, "normalizer", "normalizers", [&](Fields& fields, std::string_view type) {
    if (type == "Prepend") {
      tokenizer.normalizers.emplace_back(Prepend{fields.text("prepend")});
    } else if (type == "Replace") {
      tokenizer.normalizers.emplace_back(Replace{read_pattern(fields), fields.text("content")});
    } else if (type == "NFC") {
      tokenizer.normalizers.emplace_back(ComposeNfc{});
    } else {
      throw fields.unsupported("type", "NFC, Prepend, Replace, Sequence");
    }
  });
}

void read_pre_tokenizers(const json& value, JsonTokenizer& tokenizer) {
  each_step(value, "pre_tokenizer", "pretokenizers", [&](Fields& fields, std::string_view type) {
    if (type == "Split") {
      tokenizer.pre_tokenizers.emplace_back(Split{read_pattern(fields), read_behavior(fields), fields.flag("invert")});
    } else if (type == "Digits") {
      const bool individual = fields.flag("individual_digits");
      tokenizer.pre_tokenizers.emplace_back(
          Split{TextPattern::expression("\\p{N}"), individual ? Behavior::isolated : Behavior::contiguous, false});
    } else if (type == "ByteLevel") {
      ByteLevel level;
      level.add_prefix_space = fields.flag("add_prefix_space");
      if (fields.flag_or("use_regex", true)) level.words = TextPattern::expression(kGpt2Words);
      fields.flag("trim_offsets");
      tokenizer.pre_tokenizers.emplace_back(std::move(level));
    } else if (type == "Metaspace") {
      tokenizer.pre_tokenizers.emplace_back(read_metaspace(fields));
    } else {
      throw fields.unsupported("type", "ByteLevel, Digits, Metaspace, Sequence, Split");
    }
  });
}

void read_decoders(const json& value, JsonTokenizer& tokenizer) {
  if (value.is_null()) return;
  auto& decoders = tokenizer.decoders.emplace();
  each_step(value, "decoder", "decoders", [&](Fields& fields, std::string_view type) {
    if (type == "ByteLevel") {
      for (const char* key : {"add_prefix_space", "trim_offsets", "use_regex"}) fields.optional(key);
      decoders.emplace_back(FromByteLevel{});
    } else if (type == "Replace") {
      decoders.emplace_back(Replace{read_pattern(fields), fields.text("content")});
    } else if (type == "ByteFallback") {
      decoders.emplace_back(ByteFallback{});
    } else if (type == "Fuse") {
      decoders.emplace_back(Fuse{});
    } else if (type == "Strip") {
      decoders.emplace_back(Strip{fields.character("content"), fields.count("start"), fields.count("stop")});
    } else if (type == "Metaspace") {
      decoders.emplace_back(read_metaspace(fields));
    } else {
      throw fields.unsupported("type", "ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Sequence, Strip");
    }
  });
}

Bpe read_bpe(const json& value) {
  if (value.is_object() && value.contains("type") && value["type"] != "BPE") {
    throw Error(fmt::format("model: type {} is not supported; supported: BPE", shown(value["type"])));
  }
  Fields fields(value, "model");
  fields.optional("type");  // older files do not have it
  const json& dropout = fields.optional("dropout");
  if (!dropout.is_null() && dropout != 0) throw fields.unsupported("dropout", "none");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json& affix = fields.optional(key);
    if (!affix.is_null() && affix != json("")) throw fields.unsupported(key, "none");
  }
  Bpe::Options options;
  if (!fields.optional("unk_token").is_null()) options.unknown_token = fields.text("unk_token");
  options.fuse_unknown = fields.flag_or("fuse_unk", false);
  options.byte_fallback = fields.flag_or("byte_fallback", false);
  options.ignore_merges = fields.flag_or("ignore_merges", false);

  const json& tokens = fields.at("vocab");
  if (!tokens.is_object()) throw fields.wrong("vocab", "an object of tokens and their ids");
  Bpe::Vocabulary vocabulary;
  vocabulary.reserve(tokens.size());
  for (const auto& [token, id] : tokens.items()) vocabulary.emplace(token, token_id(id, "model: vocab"));

  std::vector<std::pair<std::string, std::string>> merges;
  const json& pairs = fields.list("merges");
  merges.reserve(pairs.size());
  for (const json& pair : pairs) {
    if (pair.is_array() && pair.size() == 2 && pair[0].is_string() && pair[1].is_string()) {
      merges.emplace_back(pair[0].get<std::string>(), pair[1].get<std::string>());
      continue;
    }
    // What older files write: the two with a space between them, after a comment perhaps.
    const std::string text = pair.is_string() ? pair.get<std::string>() : "";
    if (text.starts_with("#version")) continue;
    const std::size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      throw Error(fmt::format("model: merges: {} is not a pair of tokens", shown(pair)));
    }
    merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  fields.end();
  try {
    return {std::move(vocabulary), merges, std::move(options)};
  } catch (const Error& reason) {
    throw Error(fmt::format("model: {}", reason.what()));
  }
}

void read_added_tokens(const json& list, JsonTokenizer& tokenizer) {
  if (list.is_null()) return;
  if (!list.is_array()) throw Error("added_tokens must be a list");
  // Tokens that are not in the vocabulary are numbered from its size on, whatever id the file gives them.
  auto next = static_cast<std::int32_t>(tokenizer.bpe.size());
  for (const json& entry : list) {
    Fields fields(entry, "added_tokens");
    AddedToken token;
    token.content = fields.text("content");
    token.single_word = fields.flag("single_word");
    token.lstrip = fields.flag("lstrip");
    token.rstrip = fields.flag("rstrip");
    token.normalized = fields.flag("normalized");
    token.special = fields.flag("special");
    const std::int32_t declared = token_id(fields.at("id"), "added_tokens");
    fields.end();
    if (token.content.empty()) continue;
    const auto known = tokenizer.id_of(token.content);
    token.id = known ? *known : next++;
    if (token.id != declared) {
      throw Error(fmt::format("added_tokens: \"{}\" has the id {}, but Hugging Face's tokenizers give it {}",
                              shortened(token.content), declared, token.id));
    }
    if (token.normalized) {
      const AlignedText content = AlignedText::copy(token.content, {0, token.content.size()});
      std::string other = normalized(content, tokenizer.normalizers).text;
      if (other != token.content) tokenizer.normalized_contents.insert_or_assign(token.id, std::move(other));
    }
    tokenizer.added_ids.insert_or_assign(token.content, token.id);
    if (token.special) tokenizer.special_names.insert(token.content);
    tokenizer.added.insert_or_assign(token.id, std::move(token));
  }
  for (const auto& [id, token] : tokenizer.added) {
    const auto other = tokenizer.normalized_contents.find(id);
    const bool is_other = token.normalized && other != tokenizer.normalized_contents.end();
    const std::string& pattern = is_other ? other->second : token.content;
    if (pattern.empty()) {
      throw Error(fmt::format("added_tokens: the normalizer leaves nothing of \"{}\"", shortened(token.content)));
    }
    (token.normalized ? tokenizer.normalized_tokens : tokenizer.raw_tokens).add(pattern, token);
  }
}

void read_template(Fields& fields, JsonTokenizer& tokenizer) {
  const json& known = fields.at("special_tokens");
  if (!known.is_object()) throw fields.wrong("special_tokens", "an object");
  bool before = true;
  for (const json& piece : fields.list("single")) {
    Fields choice(piece, fields.place() + ": single");
    if (!choice.optional("Sequence").is_null()) {
      Fields sequence(choice.at("Sequence"), choice.place());
      if (sequence.text("id") != "A" || !before) throw choice.unsupported("Sequence", "A, once");
      before = false;
      continue;
    }
    Fields special(choice.at("SpecialToken"), choice.place());
    const std::string name = special.text("id");
    if (!known.contains(name)) {
      throw Error(fmt::format("{}: special_tokens has no \"{}\"", fields.place(), shortened(name)));
    }
    Fields token(known[name], fields.place() + ": special_tokens");
    for (const json& id : token.list("ids")) {
      (before ? tokenizer.prefix : tokenizer.suffix).push_back(token_id(id, token.place()));
    }
  }
  if (before) throw Error(fmt::format("{}: single does not contain the text", fields.place()));
  fields.optional("pair");
}

void read_post_processors(const json& value, JsonTokenizer& tokenizer) {
  bool has_template = false;
  each_step(value, "post_processor", "processors", [&](Fields& fields, std::string_view type) {
    if (type == "ByteLevel") {
      // Changes offsets alone.
      for (const char* key : {"add_prefix_space", "trim_offsets", "use_regex"}) fields.optional(key);
    } else if (type == "TemplateProcessing" && !has_template) {
      has_template = true;
      read_template(fields, tokenizer);
    } else {
      throw fields.unsupported("type", "ByteLevel, Sequence, TemplateProcessing (once)");
    }
  });
}

}  // namespace

std::unique_ptr<TokenizerBackend> parse_tokenizer_json(std::string_view content) {
  const json whole = json::parse(content, nullptr, false);
  if (!whole.is_object()) throw Error("is not a valid JSON object");
  Fields fields(whole, "the file");
  if (!fields.optional("version").is_null() && fields.text("version") != "1.0") {
    throw fields.unsupported("version", "1.0");
  }
  // transformers tokenizes without them unless asked.
  fields.optional("truncation");
  fields.optional("padding");
  auto tokenizer = std::make_unique<JsonTokenizer>();
  tokenizer->bpe = read_bpe(fields.at("model"));
  read_normalizers(fields.optional("normalizer"), *tokenizer);
  read_pre_tokenizers(fields.optional("pre_tokenizer"), *tokenizer);
  read_decoders(fields.optional("decoder"), *tokenizer);
  read_added_tokens(fields.optional("added_tokens"), *tokenizer);
  read_post_processors(fields.optional("post_processor"), *tokenizer);
  fields.end();
  return tokenizer;
}

std::unique_ptr<TokenizerBackend> read_tokenizer_json(const std::filesystem::path& path) {
  const std::string content = file_text(path);
  try {
    return parse_tokenizer_json(content);
  } catch (const Error& reason) {
    throw Error(fmt::format("{}: {}; give the prompt's token ids with --tokens", path.string(), reason.what()));
  }
}

}  // namespace kvreplay::tracer
