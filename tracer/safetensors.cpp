#include "tracer/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"

namespace kvreplay::tracer {

namespace {

using nlohmann::json;

// The limit of the format's own implementation: a longer header is an attack or damage.
constexpr std::uint64_t kLongestHeader = 100'000'000;

// Bytes of an element, or 0 for a dtype that the format did not know when this was written.
Index element_size(std::string_view dtype) {
  if (dtype == "BOOL" || dtype == "U8" || dtype == "I8" || dtype == "F8_E5M2" || dtype == "F8_E4M3") return 1;
  if (dtype == "U16" || dtype == "I16" || dtype == "F16" || dtype == "BF16") return 2;
  if (dtype == "U32" || dtype == "I32" || dtype == "F32") return 4;
  if (dtype == "U64" || dtype == "I64" || dtype == "F64") return 8;
  return 0;
}

// A name from a file, made safe to print on one line.
std::string in_quotes(const std::string& text) {
  constexpr std::size_t kLongest = 200;
  return json(text.substr(0, kLongest)).dump(-1, ' ', true, json::error_handler_t::replace);
}

std::optional<Index> as_size(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto number = value.get<std::uint64_t>();
  if (number > static_cast<std::uint64_t>(std::numeric_limits<Index>::max())) return std::nullopt;
  return static_cast<Index>(number);
}

json parse_header(std::string_view text, std::string_view name) {
  // The parser would keep the last of two equal keys, silently.
  std::vector<std::set<std::string>> keys;
  std::string duplicate;
  const auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end && !keys.empty()) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second && duplicate.empty()) duplicate = key;
    }
    return true;
  };
  json header;
  try {
    header = json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception&) {
    throw Error(fmt::format("{}: the header is not valid JSON; the file is damaged or no safetensors file", name));
  }
  if (!duplicate.empty()) throw Error(fmt::format("{}: the header names {} twice", name, in_quotes(duplicate)));
  if (!header.is_object()) throw Error(fmt::format("{}: the header is not a JSON object", name));
  return header;
}

}  // namespace

std::map<std::string, TensorEntry> parse_safetensors(std::span<const std::byte> file, std::string_view name) {
  if (file.size() < 8) {
    throw Error(fmt::format("{}: {} bytes are too short for a safetensors file", name, file.size()));
  }
  std::uint64_t header_length;
  std::memcpy(&header_length, file.data(), 8);
  if (header_length > file.size() - 8) {
    throw Error(
        fmt::format("{}: the header claims {} bytes, but only {} follow; the file is truncated or no "
                    "safetensors file",
                    name, header_length, file.size() - 8));
  }
  if (header_length > kLongestHeader) {
    throw Error(fmt::format("{}: the header claims {} bytes, more than the format's limit of {}", name, header_length,
                            kLongestHeader));
  }
  const auto data = file.subspan(8 + header_length);
  const json header =
      parse_header({reinterpret_cast<const char*>(file.data()) + 8, static_cast<std::size_t>(header_length)}, name);

  std::map<std::string, TensorEntry> tensors;
  std::vector<std::pair<std::pair<Index, Index>, std::string>> places;
  for (const auto& [key, value] : header.items()) {
    if (key == "__metadata__") continue;
    const auto fail = [&, &tensor = key](const std::string& reason) {
      return Error(fmt::format("{}: tensor {}: {}", name, in_quotes(tensor), reason));
    };
    if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string() || !value.contains("shape") ||
        !value["shape"].is_array() || !value.contains("data_offsets") || !value["data_offsets"].is_array() ||
        value["data_offsets"].size() != 2) {
      throw fail("needs a dtype, a shape and two data_offsets");
    }
    TensorEntry entry;
    entry.dtype = value["dtype"].get<std::string>();
    const Index element = element_size(entry.dtype);
    Index bytes = std::max<Index>(element, 1);
    for (const json& dimension : value["shape"]) {
      const auto size = as_size(dimension);
      if (!size) throw fail("its shape holds something that is not a size");
      if (__builtin_mul_overflow(bytes, *size, &bytes)) throw fail("its shape overflows");
      entry.shape.push_back(*size);
    }
    const auto begin = as_size(value["data_offsets"][0]);
    const auto end = as_size(value["data_offsets"][1]);
    if (!begin || !end) throw fail("its data_offsets are not offsets");
    if (*begin > *end || static_cast<std::uint64_t>(*end) > data.size()) {
      throw fail(fmt::format("its bytes [{}, {}) lie outside the file's {} bytes of data", *begin, *end, data.size()));
    }
    if (element > 0 && *begin % element != 0) {
      throw fail(fmt::format("its bytes begin at {}, which is not aligned to its {} of {} bytes", *begin, entry.dtype,
                             element));
    }
    if (element > 0 && *end - *begin != bytes) {
      throw fail(fmt::format("{} of shape [{}] takes {} bytes, but {} are given", entry.dtype,
                             fmt::join(entry.shape, ", "), bytes, *end - *begin));
    }
    entry.data = data.subspan(static_cast<std::size_t>(*begin), static_cast<std::size_t>(*end - *begin));
    if (*begin < *end) places.push_back({{*begin, *end}, key});
    tensors.emplace(key, std::move(entry));
  }
  // The format leaves no byte without an owner, so a gap is as telling as an overlap.
  std::sort(places.begin(), places.end());
  places.push_back({{static_cast<Index>(data.size()), static_cast<Index>(data.size())}, ""});
  Index reached = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Index begin = places[i].first.first;
    if (begin < reached) {
      throw Error(fmt::format("{}: tensors {} and {} overlap", name, in_quotes(places[i - 1].second),
                              in_quotes(places[i].second)));
    }
    if (begin > reached) {
      throw Error(
          fmt::format("{}: bytes [{}, {}) of the data belong to no tensor; the file is damaged", name, reached, begin));
    }
    reached = places[i].first.second;
  }
  return tensors;
}

SafeTensors::SafeTensors(const std::filesystem::path& folder) : folder_(folder) {
  const auto single = folder / "model.safetensors";
  const auto index = folder / "model.safetensors.index.json";
  if (std::filesystem::exists(single)) {
    add_file(single);
  } else if (std::filesystem::exists(index)) {
    add_shards(index);
  } else {
    std::vector<std::filesystem::path> found;
    std::error_code failure;
    for (const auto& entry : std::filesystem::directory_iterator(folder, failure)) {
      if (entry.path().extension() == ".safetensors") found.push_back(entry.path());
    }
    if (found.empty()) {
      throw Error(
          fmt::format("{}: holds no weights: no model.safetensors, model.safetensors.index.json or other "
                      "*.safetensors file",
                      folder.string()));
    }
    std::sort(found.begin(), found.end());
    for (const auto& path : found) add_file(path);
  }
}

void SafeTensors::add_file(const std::filesystem::path& path) {
  const auto file = std::make_shared<MappedFile>(path);
  for (auto& [name, entry] : parse_safetensors(file->bytes(), path.string())) {
    const auto [place, is_new] = tensors_.try_emplace(name, Located{entry, path.filename().string()});
    if (!is_new) {
      throw Error(fmt::format("{}: tensor {} is in {} as well", path.string(), in_quotes(name), place->second.file));
    }
  }
  files_.push_back(file);
}

void SafeTensors::add_shards(const std::filesystem::path& index) {
  std::ifstream stream(index);
  const json content = json::parse(stream, nullptr, false);
  if (!content.is_object() || !content.contains("weight_map") || !content["weight_map"].is_object()) {
    throw Error(fmt::format("{}: is not valid JSON with a weight_map", index.string()));
  }
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, shard] : content["weight_map"].items()) {
    if (!shard.is_string()) {
      throw Error(fmt::format("{}: tensor {} has no file name", index.string(), in_quotes(tensor)));
    }
    const auto file = shard.get<std::string>();
    // A name, not a path: an index must not reach outside its folder.
    if (file.empty() || file == "." || file == ".." || file.find('/') != std::string::npos ||
        file.find('\0') != std::string::npos) {
      throw Error(fmt::format("{}: {} is not a file name", index.string(), in_quotes(file)));
    }
    shards[file].insert(tensor);
  }
  for (const auto& [shard, names] : shards) {
    const auto path = folder_ / shard;
    if (!std::filesystem::exists(path)) {
      throw Error(fmt::format("{}: the shard is missing ({} names it)", path.string(), index.filename().string()));
    }
    const auto file = std::make_shared<MappedFile>(path);
    auto entries = parse_safetensors(file->bytes(), path.string());
    for (const auto& name : names) {
      const auto entry = entries.find(name);
      if (entry == entries.end()) {
        throw Error(fmt::format("{}: lacks tensor {}, which {} places there", path.string(), in_quotes(name),
                                index.filename().string()));
      }
      tensors_.insert_or_assign(name, Located{entry->second, shard});
    }
    files_.push_back(file);
  }
}

bool SafeTensors::contains(const std::string& name) const { return tensors_.contains(name); }

Tensor SafeTensors::get(const std::string& name, std::initializer_list<Index> shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    throw Error(
        fmt::format("{}: tensor {} is missing; expected shape [{}]", folder_.string(), name, fmt::join(shape, ", ")));
  }
  const auto& [entry, file] = found->second;
  const std::string path = (folder_ / file).string();
  if (!std::equal(shape.begin(), shape.end(), entry.shape.begin(), entry.shape.end())) {
    throw Error(fmt::format("{}: tensor {} has shape [{}]; expected [{}] from config.json", path, name,
                            fmt::join(entry.shape, ", "), fmt::join(shape, ", ")));
  }
  Tensor tensor;
  if (entry.dtype == "F32") {
    tensor.type = DType::float32;
  } else if (entry.dtype == "F16") {
    tensor.type = DType::float16;
  } else if (entry.dtype == "BF16") {
    tensor.type = DType::bfloat16;
  } else {
    throw Error(fmt::format("{}: tensor {} is stored as {}; supported are F32, F16 and BF16", path, name,
                            in_quotes(entry.dtype)));
  }
  tensor.shape = entry.shape;
  tensor.data = entry.data.data();
  return tensor;
}

}  // namespace kvreplay::tracer
