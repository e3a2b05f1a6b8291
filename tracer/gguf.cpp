#include "tracer/gguf.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/dequantize.h"

namespace kvreplay::tracer {

static_assert(std::endian::native == std::endian::little, "numbers are read as they lie in the file");

namespace {

// The format's default for where tensors may begin.
constexpr std::uint64_t kAlignment = 32;

// The most dimensions that ggml knows.
constexpr std::uint32_t kMostDimensions = 4;

// The fewest bytes that a string, an entry of the metadata and a tensor's description take: lengths, types and counts.
constexpr std::uint64_t kLeastString = 8;
constexpr std::uint64_t kLeastEntry = kLeastString + 4 + 1;
constexpr std::uint64_t kLeastDescription = kLeastString + 4 + 4 + 8;

// A name from a file, made safe to print on one line.
std::string in_quotes(std::string_view text) {
  constexpr std::size_t kLongest = 200;
  return fmt::format("\"{}\"", printable(text.substr(0, kLongest)));
}

template <class T>
T number_at(const std::byte* bytes) {
  T number;
  std::memcpy(&number, bytes, sizeof(T));
  return number;
}

// Bytes of a scalar, or 0 for what is none.
std::uint64_t size_of(GgufValueType type) {
  switch (type) {
    case GgufValueType::uint8:
    case GgufValueType::int8:
    case GgufValueType::boolean:
      return 1;
    case GgufValueType::uint16:
    case GgufValueType::int16:
      return 2;
    case GgufValueType::uint32:
    case GgufValueType::int32:
    case GgufValueType::float32:
      return 4;
    case GgufValueType::uint64:
    case GgufValueType::int64:
    case GgufValueType::float64:
      return 8;
    case GgufValueType::string:
    case GgufValueType::array:
      break;
  }
  return 0;
}

GgufScalar scalar_at(GgufValueType type, const std::byte* bytes) {
  switch (type) {
    case GgufValueType::uint8:
      return std::uint64_t{number_at<std::uint8_t>(bytes)};
    case GgufValueType::int8:
      return std::int64_t{number_at<std::int8_t>(bytes)};
    case GgufValueType::boolean:
      return number_at<std::uint8_t>(bytes) != 0;
    case GgufValueType::uint16:
      return std::uint64_t{number_at<std::uint16_t>(bytes)};
    case GgufValueType::int16:
      return std::int64_t{number_at<std::int16_t>(bytes)};
    case GgufValueType::uint32:
      return std::uint64_t{number_at<std::uint32_t>(bytes)};
    case GgufValueType::int32:
      return std::int64_t{number_at<std::int32_t>(bytes)};
    case GgufValueType::float32:
      return double{number_at<float>(bytes)};
    case GgufValueType::uint64:
      return number_at<std::uint64_t>(bytes);
    case GgufValueType::int64:
      return number_at<std::int64_t>(bytes);
    case GgufValueType::float64:
      return number_at<double>(bytes);
    case GgufValueType::string:
    case GgufValueType::array:
      break;
  }
  return false;
}

// A place in a file from which one thing after the other is read. `what` names the thing for the message.
class Cursor {
 public:
  Cursor(std::span<const std::byte> file, std::string_view name) : file_(file), name_(name) {}

  std::uint64_t place() const { return at_; }
  std::uint64_t left() const { return file_.size() - at_; }

  std::span<const std::byte> take(std::uint64_t bytes, std::string_view what) {
    if (bytes > left()) {
      throw Error(
          fmt::format("{}: {} takes {} bytes from byte {} on, but only {} follow; the file is truncated or damaged",
                      name_, what, bytes, at_, left()));
    }
    const auto taken = file_.subspan(static_cast<std::size_t>(at_), static_cast<std::size_t>(bytes));
    at_ += bytes;
    return taken;
  }

  template <class T>
  T number(std::string_view what) {
    return number_at<T>(take(sizeof(T), what).data());
  }

  std::string_view string(std::string_view what) {
    const auto length = number<std::uint64_t>(what);
    const auto bytes = take(length, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  // A count of things that take `least` bytes each, or more.
  std::uint64_t count(std::uint64_t least, std::string_view what) {
    const auto claimed = number<std::uint64_t>(what);
    if (claimed > left() / least) {
      throw Error(fmt::format("{}: {} is {}, but only {} bytes follow; the file is truncated or damaged", name_, what,
                              claimed, left()));
    }
    return claimed;
  }

 private:
  std::span<const std::byte> file_;
  std::string_view name_;
  std::uint64_t at_ = 0;
};

// Throws Error unless every truth value is 0 or 1.
void check_truth(std::span<const std::byte> values, std::string_view name, std::string_view what) {
  const auto other = std::ranges::find_if(values, [](std::byte value) { return value > std::byte{1}; });
  if (other == values.end()) return;
  throw Error(fmt::format("{}: {} holds {} where a truth value is 0 or 1; the file is damaged", name, what,
                          std::to_integer<int>(*other)));
}

GgufValueType read_type(Cursor& cursor, std::string_view name, std::string_view what) {
  const auto type = cursor.number<std::uint32_t>(what);
  if (type > static_cast<std::uint32_t>(GgufValueType::float64)) {
    throw Error(
        fmt::format("{}: {} has type {}, which GGUF does not have; the file is damaged or newer than this reader", name,
                    what, type));
  }
  return static_cast<GgufValueType>(type);
}

GgufValue read_array(Cursor& cursor, std::string_view name, std::string_view what) {
  const GgufValueType type = read_type(cursor, name, what);
  if (type == GgufValueType::array)
    throw Error(fmt::format("{}: {} is an array of arrays, which is not read", name, what));
  const std::string size = fmt::format("the size of {}", what);
  if (type == GgufValueType::string) {
    std::vector<std::string_view> strings(static_cast<std::size_t>(cursor.count(kLeastString, size)));
    for (std::string_view& string : strings) string = cursor.string(what);
    return strings;
  }
  GgufScalars scalars;
  scalars.type = type;
  const std::uint64_t count = cursor.count(size_of(type), size);
  scalars.size = static_cast<Index>(count);
  scalars.data = cursor.take(count * size_of(type), what);
  if (type == GgufValueType::boolean) check_truth(scalars.data, name, what);
  return scalars;
}

GgufValue read_value(Cursor& cursor, std::string_view name, std::string_view what) {
  const GgufValueType type = read_type(cursor, name, what);
  if (type == GgufValueType::string) return cursor.string(what);
  if (type == GgufValueType::array) return read_array(cursor, name, what);
  const auto bytes = cursor.take(size_of(type), what);
  if (type == GgufValueType::boolean) check_truth(bytes, name, what);
  return scalar_at(type, bytes.data());
}

// The whole number at `key`, if the metadata have one.
std::optional<std::uint64_t> whole_number(const GgufContents& contents, std::string_view name, std::string_view key) {
  const auto found = contents.metadata.find(key);
  if (found == contents.metadata.end()) return std::nullopt;
  if (const auto* scalar = std::get_if<GgufScalar>(&found->second)) {
    if (const auto* number = std::get_if<std::uint64_t>(scalar)) return *number;
    const auto* number = std::get_if<std::int64_t>(scalar);
    if (number != nullptr && *number >= 0) return static_cast<std::uint64_t>(*number);
  }
  throw Error(fmt::format("{}: {} is not a whole number", name, key));
}

void check_header(Cursor& cursor, std::span<const std::byte> file, std::string_view name) {
  constexpr std::string_view kMagic = "GGUF";
  constexpr std::size_t kHeader = 4 + 4 + 8 + 8;
  if (file.size() < kHeader) throw Error(fmt::format("{}: {} bytes are too short for a GGUF file", name, file.size()));
  const auto magic = cursor.take(kMagic.size(), "the file's beginning");
  if (std::memcmp(magic.data(), kMagic.data(), kMagic.size()) != 0) {
    throw Error(fmt::format("{}: does not begin with GGUF; the file is damaged or no GGUF file", name));
  }
}

std::uint32_t read_version(Cursor& cursor, std::string_view name) {
  const auto version = cursor.number<std::uint32_t>("the version");
  if (version == 2 || version == 3) return version;
  if (version != 0 && (version & 0xffff) == 0) {
    throw Error(
        fmt::format("{}: is big-endian; only little-endian files are read: convert it with gguf-convert-endian of the "
                    "Python package "
                    "gguf",
                    name));
  }
  throw Error(fmt::format("{}: is GGUF of version {}; versions 2 and 3 are read", name, version));
}

// A tensor's description, whose place among the tensors' bytes is still to be looked up.
struct Described {
  GgufTensor tensor;
  std::uint64_t begin = 0;  // within the tensors' bytes
  Index bytes = 0;
};

Described read_description(Cursor& cursor, std::string_view name, std::string_view what) {
  const auto fail = [&](const std::string& reason) { return Error(fmt::format("{}: {}: {}", name, what, reason)); };
  Described described;
  const auto dimensions = cursor.number<std::uint32_t>(what);
  if (dimensions > kMostDimensions) {
    throw fail(fmt::format("it has {} dimensions, but the most are {}", dimensions, kMostDimensions));
  }
  std::vector<std::uint64_t> sizes(dimensions);
  for (std::uint64_t& size : sizes) size = cursor.number<std::uint64_t>(what);
  described.tensor.type = static_cast<GgmlType>(cursor.number<std::uint32_t>(what));
  described.begin = cursor.number<std::uint64_t>(what);

  const auto block = block_of(described.tensor.type);
  if (!block) {
    throw fail(fmt::format("its type {} is none of ggml's; the file is damaged or newer than this reader",
                           static_cast<std::uint32_t>(described.tensor.type)));
  }
  const std::uint64_t row = sizes.empty() ? 1 : sizes.front();
  if (row % static_cast<std::uint64_t>(block->elements) != 0) {
    throw fail(fmt::format("its rows of {} elements are not whole blocks of {}, which {} stores", row, block->elements,
                           block->name));
  }
  described.bytes = block->bytes;
  if (!sizes.empty()) sizes.front() /= static_cast<std::uint64_t>(block->elements);
  // An overflow stays one where another dimension is 0.
  Index extent = block->bytes;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::uint64_t elements = i == 0 ? row : sizes[i];
    if (elements > static_cast<std::uint64_t>(std::numeric_limits<Index>::max()) ||
        __builtin_mul_overflow(extent, std::max<Index>(static_cast<Index>(elements), 1), &extent)) {
      throw fail("its shape overflows");
    }
    described.bytes *= static_cast<Index>(sizes[i]);
    described.tensor.shape.insert(described.tensor.shape.begin(), static_cast<Index>(elements));
  }
  return described;
}

// Gives every tensor its bytes among those that begin at `data`.
void place_tensors(std::map<std::string, Described>& described, std::span<const std::byte> data,
                   std::uint64_t alignment, std::string_view name) {
  std::vector<std::pair<std::uint64_t, const std::string*>> order;
  for (auto& [tensor, description] : described) {
    const auto fail = [&, &key = tensor](const std::string& reason) {
      return Error(fmt::format("{}: tensor {}: {}", name, in_quotes(key), reason));
    };
    const std::uint64_t begin = description.begin;
    const auto bytes = static_cast<std::uint64_t>(description.bytes);
    if (begin % alignment != 0) {
      throw fail(fmt::format("its bytes begin at {}, which is no multiple of the alignment {}", begin, alignment));
    }
    if (begin > data.size() || bytes > data.size() - begin) {
      throw fail(
          fmt::format("its {} bytes from {} on lie outside the file's {} bytes of tensors; the file is truncated or "
                      "damaged",
                      bytes, begin, data.size()));
    }
    description.tensor.data = data.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes));
    if (bytes > 0) order.emplace_back(begin, &tensor);
  }
  std::ranges::sort(order, {}, &std::pair<std::uint64_t, const std::string*>::first);
  for (std::size_t i = 1; i < order.size(); ++i) {
    const Described& before = described.at(*order[i - 1].second);
    if (order[i].first >= before.begin + static_cast<std::uint64_t>(before.bytes)) continue;
    throw Error(fmt::format("{}: tensors {} and {} overlap", name, in_quotes(*order[i - 1].second),
                            in_quotes(*order[i].second)));
  }
}

}  // namespace

GgufScalar GgufScalars::at(Index element) const {
  return scalar_at(type, data.data() + element * static_cast<Index>(size_of(type)));
}

GgufContents parse_gguf(std::span<const std::byte> file, std::string_view name) {
  Cursor cursor(file, name);
  check_header(cursor, file, name);
  GgufContents contents;
  contents.version = read_version(cursor, name);
  const std::uint64_t tensors = cursor.count(kLeastDescription, "the number of tensors");
  const std::uint64_t entries = cursor.count(kLeastEntry, "the number of metadata entries");

  for (std::uint64_t i = 0; i < entries; ++i) {
    const std::string key(cursor.string(fmt::format("the key of metadata entry {}", i + 1)));
    if (contents.metadata.contains(key)) throw Error(fmt::format("{}: has {} twice", name, in_quotes(key)));
    contents.metadata.emplace(key, read_value(cursor, name, in_quotes(key)));
  }
  if (const auto parts = whole_number(contents, name, "split.count"); parts && *parts > 1) {
    throw Error(
        fmt::format("{}: is one of {} files that a model was split into; join them with llama.cpp's "
                    "llama-gguf-split --merge",
                    name, *parts));
  }
  const std::uint64_t alignment = whole_number(contents, name, "general.alignment").value_or(kAlignment);
  if (!std::has_single_bit(alignment)) {
    throw Error(fmt::format("{}: general.alignment is {}; a power of two is expected", name, alignment));
  }

  std::map<std::string, Described> described;
  for (std::uint64_t i = 0; i < tensors; ++i) {
    const std::string tensor(cursor.string(fmt::format("the name of tensor {}", i + 1)));
    if (described.contains(tensor)) throw Error(fmt::format("{}: has tensor {} twice", name, in_quotes(tensor)));
    described.emplace(tensor, read_description(cursor, name, fmt::format("tensor {}", in_quotes(tensor))));
  }
  const std::uint64_t padding = (alignment - cursor.place() % alignment) % alignment;
  // A file without tensors may end before those that it could have.
  place_tensors(described, file.subspan(static_cast<std::size_t>(cursor.place() + std::min(padding, cursor.left()))),
                alignment, name);
  for (auto& [tensor, description] : described) contents.tensors.emplace(tensor, std::move(description.tensor));
  return contents;
}

GgufFile::GgufFile(const std::filesystem::path& path)
    : path_(path.string()), file_(path), contents_(parse_gguf(file_.bytes(), path_)) {}

const GgufTensor& GgufFile::get(std::string_view name, std::initializer_list<Index> shape) const {
  const auto found = contents_.tensors.find(name);
  if (found == contents_.tensors.end()) {
    throw Error(fmt::format("{}: tensor {} is missing; expected shape [{}]", path_, name, fmt::join(shape, ", ")));
  }
  const GgufTensor& tensor = found->second;
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    throw Error(fmt::format("{}: tensor {} has shape [{}]; expected [{}] from its metadata", path_, name,
                            fmt::join(tensor.shape, ", "), fmt::join(shape, ", ")));
  }
  if (!can_dequantize(tensor.type)) {
    throw Error(
        fmt::format("{}: tensor {} is stored as {}; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, "
                    "Q2_K to Q6_K and MXFP4",
                    path_, name, block_of(tensor.type)->name));
  }
  return tensor;
}

}  // namespace kvreplay::tracer
