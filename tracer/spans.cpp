#include "tracer/spans.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

// The tokens that stand for bytes [begin, end) of the prompt.
std::optional<Span> tokens_of(const Encoding& encoding, std::size_t begin, std::size_t end) {
  std::optional<Span> span;
  for (std::size_t token = 0; token < encoding.ids.size(); ++token) {
    const auto [token_begin, token_end] = encoding.bytes[token];
    if (token_begin == token_end || token_begin >= end || token_end <= begin) continue;
    if (!span) span = Span{static_cast<int>(token), 0, ""};
    span->end = static_cast<int>(token) + 1;
  }
  return span;
}

json read_list(const std::filesystem::path& path, std::string_view example) {
  std::ifstream stream(path);
  if (!stream) throw Error(fmt::format("{}: cannot be read", path.string()));
  json content = json::parse(stream, nullptr, false);
  if (!content.is_array()) throw Error(fmt::format("{}: is not a JSON list such as {}", path.string(), example));
  return content;
}

// Calls `found` with the place of every occurrence of `text`, one after the other.
template <class Action>
void for_each_occurrence(std::string_view prompt, std::string_view text, const Action& found) {
  for (std::size_t at = prompt.find(text); at != std::string_view::npos; at = prompt.find(text, at + text.size())) {
    found(at);
  }
}

// The byte at which a text's n-th character begins, or nothing where it has no more than n.
std::optional<std::size_t> byte_of_character(std::string_view text, std::int64_t character) {
  for (std::size_t at = 0; at < text.size(); ++at) {
    const bool begins = (static_cast<unsigned char>(text[at]) & 0xc0) != 0x80;
    if (begins && character-- == 0) return at;
  }
  return std::nullopt;
}

}  // namespace

std::vector<SpanRequest> read_spans(const std::filesystem::path& path) {
  const json content = read_list(path, R"([{"label": "needle", "text": "..."}])");
  std::vector<SpanRequest> requests;
  for (const json& entry : content) {
    const auto fail = [&](std::string_view reason) {
      return Error(fmt::format("{}: entry {}: {}", path.string(), requests.size() + 1, reason));
    };
    if (!entry.is_object() || !entry.contains("label") || !entry["label"].is_string()) {
      throw fail("needs a \"label\" that is a text");
    }
    SpanRequest request;
    request.label = entry["label"].get<std::string>();
    const bool has_positions = entry.contains("start") || entry.contains("end");
    if (entry.contains("text") == has_positions) {
      throw fail("needs either a \"text\" that occurs in the prompt or a \"start\" and an \"end\" in token positions");
    }
    if (entry.contains("text")) {
      if (!entry["text"].is_string() || entry["text"].get_ref<const std::string&>().empty()) {
        throw fail("\"text\" must be a text that is not empty");
      }
      request.text = entry["text"].get<std::string>();
    } else {
      for (const char* key : {"start", "end"}) {
        if (!entry.contains(key) || !entry[key].is_number_unsigned() ||
            entry[key].get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<int>::max())) {
          throw fail("\"start\" and \"end\" must be token positions");
        }
      }
      request.start = entry["start"].get<int>();
      request.end = entry["end"].get<int>();
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

std::vector<Span> locate_spans(std::span<const SpanRequest> requests, std::string_view prompt, const Encoding* encoding,
                               int prompt_length) {
  std::vector<Span> spans;
  for (const SpanRequest& request : requests) {
    if (request.text.empty()) {
      if (request.start < 0 || request.start >= request.end || request.end > prompt_length) {
        throw Error(fmt::format("span \"{}\": [{}, {}) is not a range of the prompt's {} tokens", request.label,
                                request.start, request.end, prompt_length));
      }
      spans.push_back({request.start, request.end, request.label});
      continue;
    }
    if (encoding == nullptr) {
      throw Error(
          fmt::format("span \"{}\": a text can only be found in a text prompt; give its \"start\" and \"end\" "
                      "in token positions",
                      request.label));
    }
    const std::size_t before = spans.size();
    for_each_occurrence(prompt, request.text, [&](std::size_t at) {
      std::optional<Span> span = tokens_of(*encoding, at, at + request.text.size());
      if (!span) throw Error(fmt::format("span \"{}\": no token stands for its text", request.label));
      span->label = request.label;
      spans.push_back(*std::move(span));
    });
    if (spans.size() == before) {
      throw Error(fmt::format("span \"{}\": its text does not occur in the prompt", request.label));
    }
  }
  return spans;
}

std::vector<TurnRequest> read_turns(const std::filesystem::path& path) {
  const json content = read_list(path, R"([0, 45] or [{"text": "<|im_start|>"}])");
  const auto is_number = [](const json& value, std::uint64_t most) {
    return value.is_number_unsigned() && value.get<std::uint64_t>() <= most;
  };
  const auto is_text = [](const json& value) {
    return value.is_string() && !value.get_ref<const std::string&>().empty();
  };
  std::vector<TurnRequest> requests;
  for (const json& entry : content) {
    TurnRequest request;
    const bool has_role = entry.is_object() && entry.contains("role") && is_text(entry["role"]);
    const std::size_t keys = has_role ? 2 : 1;
    const auto says = [&](const char* key) {
      return entry.is_object() && entry.size() == keys && entry.contains(key) &&
             (is_text(entry[key]) || is_number(entry[key], std::numeric_limits<int>::max()));
    };
    if (is_number(entry, std::numeric_limits<int>::max())) {
      request.position = entry.get<int>();
    } else if (says("position") && entry["position"].is_number()) {
      request.position = entry["position"].get<int>();
    } else if (says("text") && entry["text"].is_string()) {
      request.text = entry["text"].get<std::string>();
    } else if (says("character") && entry["character"].is_number()) {
      request.character = entry["character"].get<std::int64_t>();
    } else {
      throw Error(fmt::format(
          "{}: entry {}: must be a token position, {{\"text\": ...}} that begins turns, or "
          "{{\"character\": ...}}, an offset into the prompt's text; a \"role\" may stand beside it, and the "
          "position is then a \"position\"",
          path.string(), requests.size() + 1));
    }
    if (has_role) request.role = entry["role"].get<std::string>();
    requests.push_back(std::move(request));
  }
  if (requests.empty()) throw Error(fmt::format("{}: names no turns", path.string()));
  const auto has_no_role = [](const TurnRequest& request) { return request.role.empty(); };
  const auto without = std::ranges::find_if(requests, has_no_role);
  if (without != requests.end() && !std::ranges::all_of(requests, has_no_role)) {
    throw Error(fmt::format("{}: entry {}: has no \"role\", though others have; give it to all or to none",
                            path.string(), without - requests.begin() + 1));
  }
  return requests;
}

std::vector<Turn> locate_turns(std::span<const TurnRequest> requests, std::string_view prompt, const Encoding* encoding,
                               int prompt_length) {
  std::vector<Turn> turns;
  for (const TurnRequest& request : requests) {
    if (request.position >= 0) {
      if (request.position >= prompt_length) {
        throw Error(fmt::format("turn at {}: is not in the prompt of {} tokens", request.position, prompt_length));
      }
      turns.push_back({request.position, request.role});
      continue;
    }
    const std::string name = request.text.empty() ? fmt::format("turn at character {}", request.character)
                                                  : fmt::format("turn \"{}\"", request.text);
    if (encoding == nullptr) {
      throw Error(fmt::format("{}: can only be found in a text prompt; give its token position", name));
    }
    const auto add = [&](std::size_t begin, std::size_t end) {
      const std::optional<Span> tokens = tokens_of(*encoding, begin, end);
      if (!tokens) throw Error(fmt::format("{}: no token stands for its text", name));
      turns.push_back({tokens->start, request.role});
    };
    const std::size_t before = turns.size();
    if (!request.text.empty()) {
      for_each_occurrence(prompt, request.text, [&](std::size_t at) { add(at, at + request.text.size()); });
    } else if (const auto at = byte_of_character(prompt, request.character)) {
      add(*at, *at + 1);
    }
    if (turns.size() == before) throw Error(fmt::format("{}: does not occur in the prompt", name));
  }
  std::ranges::stable_sort(turns, {}, &Turn::start);
  if (const auto twice = std::ranges::adjacent_find(turns, {}, &Turn::start); twice != turns.end()) {
    throw Error(fmt::format("two turns begin at token {}", twice->start));
  }
  return turns;
}

}  // namespace kvreplay::tracer
