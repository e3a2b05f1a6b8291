// Reads model weights and what a model says of itself from GGUF files, without copying the weights.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (a header, metadata by key, a table of tensors,
// their bytes), little-endian, versions 2 and 3.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/matrix.h"
#include "tracer/ggml_type.h"
#include "tracer/mapped_file.h"

namespace kvreplay::tracer {

/// A truth value, or a number of any width: signed and unsigned integers keep what they are.
using GgufScalar = std::variant<bool, std::int64_t, std::uint64_t, double>;

/// The types of metadata, with the format's numbers.
enum class GgufValueType : std::uint32_t {
  uint8 = 0,
  int8 = 1,
  uint16 = 2,
  int16 = 3,
  uint32 = 4,
  int32 = 5,
  float32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  uint64 = 10,
  int64 = 11,
  float64 = 12,
};

/// An array of truth values or numbers as it lies in the file.
struct GgufScalars {
  GgufValueType type = GgufValueType::uint8;  ///< of every element
  Index size = 0;                             ///< elements
  std::span<const std::byte> data;

  /// Of an element in [0, size).
  GgufScalar at(Index element) const;
};

/// Strings are views of the file's bytes and need not be UTF-8.
using GgufValue = std::variant<GgufScalar, std::string_view, GgufScalars, std::vector<std::string_view>>;

/// One tensor as a file describes it. Its bytes need not be aligned in memory.
struct GgufTensor {
  GgmlType type = GgmlType::F32;
  std::vector<Index> shape;  ///< outermost dimension first, as PyTorch has it; the file has the innermost first
  std::span<const std::byte> data;
};

/// What a GGUF file holds, as views of its bytes.
struct GgufContents {
  std::uint32_t version = 0;
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::map<std::string, GgufTensor, std::less<>> tensors;
};

/// Throws Error, beginning with `name`, unless the file is whole, says nothing twice, and gives every tensor a place of
/// its own that fits its type and shape. Arrays of arrays, and files that a model was split into, are refused.
GgufContents parse_gguf(std::span<const std::byte> file, std::string_view name);

/// A GGUF file. It stays mapped, and its contents valid, as long as this object lives.
class GgufFile {
 public:
  /// Throws Error as parse_gguf does, or if there is no such file.
  explicit GgufFile(const std::filesystem::path& path);

  const GgufContents& contents() const { return contents_; }

  /// Throws Error, with what was found and what was expected, unless there is such a tensor of this shape
  /// in a type that can be dequantised.
  const GgufTensor& get(std::string_view name, std::initializer_list<Index> shape) const;

 private:
  std::string path_;
  MappedFile file_;
  GgufContents contents_;
};

}  // namespace kvreplay::tracer
