// Reads model weights from safetensors files without copying them.
// Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
#pragma once

#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"
#include "tracer/mapped_file.h"

namespace kvreplay::tracer {

/// One tensor as a header describes it.
struct TensorEntry {
  std::string dtype;  ///< as written, such as BF16
  std::vector<Index> shape;
  std::span<const std::byte> data;
};

/// The tensors of one safetensors file, by name, as views of its bytes.
/// Throws Error, beginning with `name`, unless the header is whole, lies inside the file, and gives every tensor a
/// place of its own that fits its shape. A dtype that is not known here is no error yet.
std::map<std::string, TensorEntry> parse_safetensors(std::span<const std::byte> file, std::string_view name);

/// A row-major tensor in mapped memory. Its bytes need not be aligned.
struct Tensor {
  DType type = DType::float32;
  std::vector<Index> shape;
  const std::byte* data = nullptr;

  Index rows() const { return shape.at(0); }
  Index columns() const { return shape.at(1); }
};

/// The weights of a model's folder: model.safetensors, the shards that model.safetensors.index.json names, or every
/// *.safetensors file. The files stay mapped, and tensors valid, as long as this object or a copy of it lives.
class SafeTensors {
 public:
  /// Throws Error if there are no weights, a shard is missing or a header lies.
  explicit SafeTensors(const std::filesystem::path& folder);

  bool contains(const std::string& name) const;

  /// Throws Error, with what was found and what was expected, unless there is such a tensor of this shape in F32, F16
  /// or BF16.
  Tensor get(const std::string& name, std::initializer_list<Index> shape) const;

 private:
  struct Located {
    TensorEntry entry;
    std::string file;
  };

  void add_file(const std::filesystem::path& path);
  void add_shards(const std::filesystem::path& index);

  std::filesystem::path folder_;
  std::vector<std::shared_ptr<MappedFile>> files_;
  std::map<std::string, Located> tensors_;
};

}  // namespace kvreplay::tracer
