#include "sweep/configuration.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <xxhash.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/printable.h"

namespace kvreplay {
namespace {

class TomlReader {
 public:
  TomlReader(std::string_view text, const std::string& shown_as) : text_(text), shown_as_(shown_as) {}

  std::vector<ConfigurationEntry> read() {
    std::vector<ConfigurationEntry> entries;
    std::set<std::string> seen;
    for (skip_blank(true); at_ < text_.size(); skip_blank(true)) {
      ConfigurationEntry entry;
      entry.line = line_;
      if (peek() == '[') fail("tables are not known here; every option stands by itself, as in capacity = \"64,128\"");
      entry.key = peek() == '"' || peek() == '\'' ? quoted() : bare("a key");
      if (!seen.insert(entry.key).second) fail(fmt::format("'{}' stands twice", printable(entry.key)));
      skip_blank(false);
      if (peek() != '=') fail(fmt::format("expected '=' after '{}'", printable(entry.key)));
      ++at_;
      skip_blank(false);
      entry.list = peek() == '[';
      if (entry.list) {
        entry.values = list();
      } else {
        entry.values.push_back(value());
      }
      skip_blank(false);
      if (at_ < text_.size() && peek() != '\n') fail(fmt::format("unexpected text after the value of '{}'", entry.key));
      entries.push_back(std::move(entry));
    }
    return entries;
  }

 private:
  std::vector<std::string> list() {
    std::vector<std::string> values;
    ++at_;
    for (skip_blank(true); peek() != ']'; skip_blank(true)) {
      values.push_back(value());
      skip_blank(true);
      if (peek() == ',') {
        ++at_;
      } else if (peek() != ']') {
        fail("expected ',' or ']' in a list");
      }
    }
    ++at_;
    return values;
  }

  std::string value() {
    if (peek() == '"' || peek() == '\'') return quoted();
    std::string text = bare("a value");
    const bool number = std::ranges::all_of(text, [](char c) {
      return std::isdigit(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '-' || c == '+';
    });
    if (!number && text != "true" && text != "false") fail(fmt::format("text goes in quotes: \"{}\"", text));
    return text;
  }

  std::string bare(std::string_view expected) {
    const std::size_t start = at_;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(peek())) != 0 || peek() == '-' ||
                                  peek() == '_' || peek() == '.' || peek() == '+')) {
      ++at_;
    }
    if (at_ == start) fail(fmt::format("expected {}", expected));
    return std::string(text_.substr(start, at_ - start));
  }

  std::string quoted() {
    const char quote = text_[at_++];
    std::string value;
    while (peek() != quote) {
      if (at_ == text_.size() || peek() == '\n') fail(fmt::format("expected a closing {}", quote));
      if (peek() != '\\' || quote == '\'') {
        value += text_[at_++];
        continue;
      }
      ++at_;
      constexpr std::pair<char, char> kEscapes[] = {{'"', '"'}, {'\\', '\\'}, {'n', '\n'}, {'t', '\t'}, {'r', '\r'}};
      const auto* escape = std::ranges::find(kEscapes, peek(), &std::pair<char, char>::first);
      if (peek() == 'u' && at_ + 4 < text_.size()) {
        // Only what write_configuration writes: control characters.
        unsigned code = 0;
        const char* first = text_.data() + at_ + 1;
        const auto [end, failure] = std::from_chars(first, first + 4, code, 16);
        if (failure != std::errc() || end != first + 4 || code > 0x7f) fail("\\u is known up to 007F");
        value += static_cast<char>(code);
        at_ += 5;
      } else if (escape != std::end(kEscapes)) {
        value += escape->second;
        ++at_;
      } else {
        fail("an unknown escape; text in '…' has none");
      }
    }
    ++at_;
    return value;
  }

  void skip_blank(bool lines) {
    while (at_ < text_.size()) {
      if (peek() == '#') at_ = std::min(text_.find('\n', at_), text_.size());
      if (at_ == text_.size() || (peek() == '\n' && !lines)) return;
      if (std::isspace(static_cast<unsigned char>(peek())) == 0) return;
      if (peek() == '\n') ++line_;
      ++at_;
    }
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  [[noreturn]] void fail(std::string_view reason) const {
    throw UsageError(fmt::format("{}: line {}: {}", shown_as_, line_, reason));
  }

  std::string_view text_;
  const std::string& shown_as_;
  std::size_t at_ = 0;
  int line_ = 1;
};

std::string in_quotes(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      quoted += fmt::format("\\u{:04X}", static_cast<unsigned char>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

// A digest over values of any type, each with its end marked.
class Digest {
 public:
  Digest() : state_(XXH64_createState(), XXH64_freeState) { XXH64_reset(state_.get(), 0); }

  void add(std::string_view text) {
    add_bytes(text.data(), text.size());
    add_bytes("\0", 1);
  }
  void add_bytes(const char* data, std::size_t size) { XXH64_update(state_.get(), data, size); }

  std::string text() const { return fmt::format("{:016x}", XXH64_digest(state_.get())); }

 private:
  std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> state_;
};

std::int64_t size_of_file(const std::filesystem::path& file) {
  std::error_code failure;
  const auto size = std::filesystem::file_size(file, failure);
  if (failure) throw Error(fmt::format("{}: cannot be looked at: {}", file.string(), failure.message()));
  return static_cast<std::int64_t>(size);
}

// A few of a list, and how many more there are.
std::string some_of(const std::vector<std::string>& texts) {
  constexpr std::size_t kShown = 3;
  if (texts.empty()) return "none";
  const std::size_t shown = std::min(texts.size(), kShown);
  std::string text =
      fmt::format("{}", fmt::join(texts.begin(), texts.begin() + static_cast<std::ptrdiff_t>(shown), ", "));
  if (texts.size() > shown) text += fmt::format(" and {} more", texts.size() - shown);
  return text;
}

std::vector<std::string> without(const std::vector<std::string>& texts, const std::vector<std::string>& others) {
  const std::set<std::string> known(others.begin(), others.end());
  std::vector<std::string> rest;
  std::ranges::copy_if(texts, std::back_inserter(rest), [&known](const auto& text) { return !known.contains(text); });
  return rest;
}

// Empty where both are the same.
std::string list_difference(std::string_view option, const std::vector<std::string>& before,
                            const std::vector<std::string>& now) {
  if (before == now) return "";
  const std::vector<std::string> gone = without(before, now);
  const std::vector<std::string> added = without(now, before);
  if (gone.empty() && added.empty()) return fmt::format("{} stands in another order", option);
  if (before.size() <= 3 && now.size() <= 3) {
    return fmt::format("{} was {}, is {}", option, some_of(before), some_of(now));
  }
  std::string text(option);
  if (!gone.empty()) text += fmt::format(" lacks {}", some_of(gone));
  if (!added.empty()) text += fmt::format("{} has {} as well", gone.empty() ? "" : " and", some_of(added));
  return text;
}

std::vector<std::string> names_of(const std::vector<FileIdentity>& files) {
  std::vector<std::string> names;
  for (const FileIdentity& file : files) names.push_back(file.file);
  return names;
}

}  // namespace

std::vector<ConfigurationEntry> read_configuration(std::string_view text, const std::string& shown_as) {
  return TomlReader(text, shown_as).read();
}

std::string write_configuration(const std::vector<ConfigurationEntry>& entries) {
  std::string text;
  for (const ConfigurationEntry& entry : entries) {
    text += entry.key + " = ";
    if (!entry.list) {
      text += in_quotes(entry.values.front()) + "\n";
    } else if (entry.values.empty()) {
      text += "[]\n";
    } else {
      text += "[\n";
      for (const std::string& value : entry.values) text += fmt::format("  {},\n", in_quotes(value));
      text += "]\n";
    }
  }
  return text;
}

FileIdentity identity_of(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  Digest digest;
  const ModelInfo& model = info.model;
  for (const std::string& text : {model.name, model.architecture, info.created_by, info.created_at, info.source}) {
    digest.add(text);
  }
  for (const int number : {model.num_layers, model.num_attention_heads, model.num_key_value_heads, model.head_dim,
                           model.hidden_size, model.sliding_window, info.prompt_length}) {
    digest.add(fmt::format("{}", number));
  }
  for (const double number : {model.rope_theta, model.softmax_scale, model.attn_logit_softcapping})
    digest.add(fmt::format("{}", number));
  for (const auto* numbers : {&info.token_ids, &info.turn_starts, &info.query_positions}) {
    digest.add(fmt::format("{}", fmt::join(*numbers, ",")));
  }
  digest.add(fmt::format("{}", fmt::join(info.layer_sliding_window, ",")));
  for (const std::string& piece : info.token_pieces) digest.add(piece);
  for (const Span& span : info.spans) digest.add(fmt::format("{},{},{}", span.start, span.end, span.label));
  bool all = true;
  for (const StoredTensor& tensor : trace.stored_tensors()) {
    digest.add(
        fmt::format("{} {} {} {}", tensor.path, name_of(tensor.type), fmt::join(tensor.shape, ","), tensor.xxh64));
    all = all && !tensor.xxh64.empty();
  }
  if (!all) {
    std::error_code failure;
    const auto time = std::filesystem::last_write_time(trace.path(), failure);
    if (failure) throw Error(fmt::format("{}: cannot be looked at: {}", trace.path().string(), failure.message()));
    digest.add(fmt::format("{}", static_cast<std::int64_t>(time.time_since_epoch().count())));
  }
  return {trace.path().string(), size_of_file(trace.path()), digest.text()};
}

FileIdentity identity_of(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  Digest digest;
  std::int64_t size = 0;
  std::vector<char> buffer(1 << 16);
  while (stream.read(buffer.data(), static_cast<std::streamsize>(buffer.size())) || stream.gcount() > 0) {
    digest.add_bytes(buffer.data(), static_cast<std::size_t>(stream.gcount()));
    size += stream.gcount();
  }
  if (!stream.eof()) throw Error(fmt::format("{}: cannot be read", file.string()));
  return {file.string(), size, digest.text()};
}

SweepIdentity::SweepIdentity(const ReplayRequest& request, const std::vector<TraceReader>& readers,
                             const std::vector<std::filesystem::path>& other_files)
    : version(KVREPLAY_VERSION) {
  for (const Policy& policy : request.policies) policies.push_back(policy.canonical);
  for (const CapacityRequest& capacity : request.capacities) capacities.push_back(capacity.text);
  for (const int position : request.eviction_positions) eviction_positions.push_back(fmt::format("{}", position));
  if (request.granularity) heads = name_of(*request.granularity);
  if (request.share) share = name_of(*request.share);
  for (const TraceReader& reader : readers) traces.push_back(identity_of(reader));
  for (const std::filesystem::path& file : other_files) files.push_back(identity_of(file));
}

std::string SweepIdentity::text() const {
  std::vector<ConfigurationEntry> entries = {
      {"version", {version}, false, 0},          {"policy", policies, true, 0}, {"capacity", capacities, true, 0},
      {"evict-at", eviction_positions, true, 0}, {"heads", {heads}, false, 0},  {"share", {share}, false, 0},
  };
  for (const auto& [key, identities] : {std::pair<std::string, const std::vector<FileIdentity>&>{"traces", traces},
                                        std::pair<std::string, const std::vector<FileIdentity>&>{"files", files}}) {
    ConfigurationEntry names{key, {}, true, 0};
    ConfigurationEntry sizes{key + "-size", {}, true, 0};
    ConfigurationEntry contents{key + "-content", {}, true, 0};
    for (const FileIdentity& identity : identities) {
      names.values.push_back(identity.file);
      sizes.values.push_back(fmt::format("{}", identity.size));
      contents.values.push_back(identity.content);
    }
    for (ConfigurationEntry* entry : {&names, &sizes, &contents}) entries.push_back(std::move(*entry));
  }
  return write_configuration(entries);
}

SweepIdentity SweepIdentity::from_text(std::string_view text, const std::string& shown_as) {
  const std::vector<ConfigurationEntry> entries = read_configuration(text, shown_as);
  const auto values = [&](std::string_view key) -> const std::vector<std::string>& {
    const auto found = std::ranges::find(entries, key, &ConfigurationEntry::key);
    if (found == entries.end()) throw UsageError(fmt::format("{}: has no '{}'", shown_as, key));
    return found->values;
  };
  const auto single = [&](std::string_view key) -> const std::string& {
    if (values(key).size() != 1) throw UsageError(fmt::format("{}: '{}' is not one value", shown_as, key));
    return values(key).front();
  };
  SweepIdentity identity;
  identity.version = single("version");
  identity.policies = values("policy");
  identity.capacities = values("capacity");
  identity.eviction_positions = values("evict-at");
  identity.heads = single("heads");
  identity.share = single("share");
  const auto read_files = [&](const std::string& key, std::vector<FileIdentity>& identities) {
    const auto& names = values(key);
    const auto& sizes = values(key + "-size");
    const auto& contents = values(key + "-content");
    if (sizes.size() != names.size() || contents.size() != names.size()) {
      throw UsageError(fmt::format("{}: '{}' and what belongs to it differ in length", shown_as, key));
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
      std::int64_t size = -1;
      std::from_chars(sizes[i].data(), sizes[i].data() + sizes[i].size(), size);
      identities.push_back({names[i], size, contents[i]});
    }
  };
  read_files("traces", identity.traces);
  read_files("files", identity.files);
  return identity;
}

std::string difference(const SweepIdentity& before, const SweepIdentity& now) {
  std::vector<std::string> parts;
  const auto add = [&parts](std::string part) {
    if (!part.empty()) parts.push_back(std::move(part));
  };
  const auto add_text = [&](std::string_view option, const std::string& old_value, const std::string& new_value) {
    const auto shown = [](const std::string& value) { return value.empty() ? std::string("not given") : value; };
    if (old_value != new_value) add(fmt::format("{} was {}, is {}", option, shown(old_value), shown(new_value)));
  };
  add_text("the version of kvreplay", before.version, now.version);
  add(list_difference("--policy", before.policies, now.policies));
  add(list_difference("--capacity", before.capacities, now.capacities));
  add(list_difference("--evict-at", before.eviction_positions, now.eviction_positions));
  add_text("--heads", before.heads, now.heads);
  add_text("--share", before.share, now.share);
  const auto add_files = [&](std::string_view noun, const std::vector<FileIdentity>& old_files,
                             const std::vector<FileIdentity>& new_files) {
    if (names_of(old_files) != names_of(new_files)) {
      add(list_difference(noun, names_of(old_files), names_of(new_files)));
      return;
    }
    for (std::size_t i = 0; i < old_files.size(); ++i) {
      const FileIdentity& was = old_files[i];
      const FileIdentity& is = new_files[i];
      if (was.size != is.size) {
        add(fmt::format("the size of {} was {} bytes, is {}", is.file, was.size, is.size));
      } else if (was.content != is.content) {
        add(fmt::format("the content of {} is another, of the same size", is.file));
      }
    }
  };
  add_files("the list of traces", before.traces, now.traces);
  add_files("the list of files that policies come from", before.files, now.files);
  return fmt::format("{}", fmt::join(parts, "; "));
}

}  // namespace kvreplay
