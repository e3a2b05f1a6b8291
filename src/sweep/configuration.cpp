#include "sweep/configuration.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <toml++/toml.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <set>
#include <system_error>
#include <utility>

#include "base/digest.h"
#include "base/error.h"
#include "base/printable.h"
#include "trace/identity.h"

namespace kvreplay {
namespace {

[[noreturn]] void fail(const std::string& shown_as, const toml::source_region& where, std::string_view reason) {
  throw UsageError(fmt::format("{}: line {}: {}", shown_as, where.begin.line, reason));
}

// For the most likely mistake, which the parser cannot know from others: "; text goes in quotes", or nothing.
std::string advice(std::string_view text, toml::source_index line) {
  for (; line > 1; --line) text.remove_prefix(std::min(text.find('\n'), text.size() - 1) + 1);
  const std::string_view wrong = text.substr(0, text.find('\n'));
  const bool quoted = wrong.find_first_of("\"'") != std::string_view::npos;
  return wrong.find('=') == std::string_view::npos || quoted ? "" : "; text goes in quotes";
}

// A string, number or truth as text. Arrays in arrays, tables and dates are none.
std::string text_of(const toml::node& value, const std::string& key, const std::string& shown_as) {
  if (const auto* text = value.as_string()) return text->get();
  if (const auto* number = value.as_integer()) return fmt::format("{}", number->get());
  if (const auto* number = value.as_floating_point()) return fmt::format("{}", number->get());
  if (const auto* truth = value.as_boolean()) return fmt::format("{}", truth->get());
  fail(shown_as, value.source(),
       fmt::format("the value of '{}' is neither text in quotes nor a number, true, false or an array of these",
                   printable(key)));
}

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
  toml::table table;
  try {
    table = toml::parse(text);
  } catch (const toml::parse_error& error) {
    fail(shown_as, error.source(), printable(error.description()) + advice(text, error.source().begin.line));
  }
  std::vector<ConfigurationEntry> entries;
  for (const auto& [key, value] : table) {
    const std::string name(key.str());
    if (value.is_table() || value.is_array_of_tables()) {
      fail(shown_as, key.source(),
           fmt::format("'{}' is a table; every option stands by itself, as in capacity = \"64,128\"", printable(name)));
    }
    ConfigurationEntry entry{name, {}, value.is_array(), static_cast<int>(key.source().begin.line)};
    if (const auto* array = value.as_array()) {
      for (const toml::node& element : *array) entry.values.push_back(text_of(element, name, shown_as));
    } else {
      entry.values.push_back(text_of(value, name, shown_as));
    }
    entries.push_back(std::move(entry));
  }
  // A table is sorted by its keys; a line holds one entry at most.
  std::ranges::sort(entries, {}, &ConfigurationEntry::line);
  return entries;
}

std::string write_configuration(const std::vector<ConfigurationEntry>& entries) {
  std::string text;
  for (const ConfigurationEntry& entry : entries) {
    for (const std::string& value : entry.values) {
      if (!find_invalid_utf8(value)) continue;
      throw UsageError(fmt::format("{} '{}' is not UTF-8 text, and TOML is", entry.key, printable(value)));
    }
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
  std::string content = trace_digest(trace);
  if (!has_tensor_digests(trace)) {
    std::error_code failure;
    const auto time = std::filesystem::last_write_time(trace.path(), failure);
    if (failure) throw Error(fmt::format("{}: cannot be looked at: {}", trace.path().string(), failure.message()));
    Digest digest;
    digest.add(content);
    digest.add(fmt::format("{}", static_cast<std::int64_t>(time.time_since_epoch().count())));
    content = digest.text();
  }
  return {printable(trace.path().string()), size_of_file(trace.path()), content};
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
  return {printable(file.string()), size, digest.text()};
}

SweepIdentity::SweepIdentity(const ReplayRequest& request, const std::vector<TraceReader>& readers,
                             const std::vector<std::filesystem::path>& other_files)
    : version(KVREPLAY_VERSION) {
  for (const Policy& policy : request.policies) policies.push_back(printable(policy.canonical));
  for (const CapacityRequest& capacity : request.capacities) capacities.push_back(capacity.text);
  for (const int position : request.eviction_positions) eviction_positions.push_back(fmt::format("{}", position));
  if (request.evaluate_from) {
    evaluate_from = *request.evaluate_from == kPromptEnd ? "prompt" : fmt::format("{}", *request.evaluate_from);
  }
  if (request.granularity) heads = name_of(*request.granularity);
  if (request.share) share = name_of(*request.share);
  rank_agreement = request.rank_agreement;
  for (const TraceReader& reader : readers) traces.push_back(identity_of(reader));
  for (const std::filesystem::path& file : other_files) files.push_back(identity_of(file));
}

std::string SweepIdentity::text() const {
  std::vector<ConfigurationEntry> entries = {
      {"version", {version}, false, 0},          {"policy", policies, true, 0}, {"capacity", capacities, true, 0},
      {"evict-at", eviction_positions, true, 0}, {"heads", {heads}, false, 0},  {"share", {share}, false, 0},
  };
  // Not named unless they were asked for: an earlier sweep's folder says nothing of them.
  if (!evaluate_from.empty()) entries.push_back({"evaluate-from", {evaluate_from}, false, 0});
  if (rank_agreement) entries.push_back({"rank-agreement", {"true"}, false, 0});
  if (!live.empty()) entries.push_back({"live", live, true, 0});
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
  if (std::ranges::find(entries, "evaluate-from", &ConfigurationEntry::key) != entries.end()) {
    identity.evaluate_from = single("evaluate-from");
  }
  identity.rank_agreement = std::ranges::find(entries, "rank-agreement", &ConfigurationEntry::key) != entries.end();
  if (std::ranges::find(entries, "live", &ConfigurationEntry::key) != entries.end()) identity.live = values("live");
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
  add_text("--evaluate-from", before.evaluate_from, now.evaluate_from);
  add_text("--heads", before.heads, now.heads);
  add_text("--share", before.share, now.share);
  add_text("--rank-agreement", before.rank_agreement ? "given" : "", now.rank_agreement ? "given" : "");
  add(list_difference("what is asked of a live run", before.live, now.live));
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
  add_files("the list of other files that are read", before.files, now.files);
  return fmt::format("{}", fmt::join(parts, "; "));
}

}  // namespace kvreplay
