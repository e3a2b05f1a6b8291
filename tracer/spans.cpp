#include "tracer/spans.h"

#include <fmt/format.h>

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

}  // namespace

std::vector<SpanRequest> read_spans(const std::filesystem::path& path) {
  std::ifstream stream(path);
  if (!stream) throw Error(fmt::format("{}: cannot be read", path.string()));
  const json content = json::parse(stream, nullptr, false);
  if (!content.is_array()) {
    throw Error(
        fmt::format("{}: is not a JSON list such as [{{\"label\": \"needle\", \"text\": \"...\"}}]", path.string()));
  }
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
    std::size_t at = prompt.find(request.text);
    if (at == std::string_view::npos) {
      throw Error(fmt::format("span \"{}\": its text does not occur in the prompt", request.label));
    }
    for (; at != std::string_view::npos; at = prompt.find(request.text, at + request.text.size())) {
      std::optional<Span> span = tokens_of(*encoding, at, at + request.text.size());
      if (!span) throw Error(fmt::format("span \"{}\": no token stands for its text", request.label));
      span->label = request.label;
      spans.push_back(*std::move(span));
    }
  }
  return spans;
}

}  // namespace kvreplay::tracer
